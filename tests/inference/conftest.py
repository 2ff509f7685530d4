"""A plan for small synthetic cases, and run folders of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.artifacts import write_artifact
from pipeline.geometry import Spacing
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan, Plan


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_plan(plan_of: Callable[..., Plan]) -> Callable[..., Plan]:
    """A plan for one-channel cases with the values 0, 4 and 7; options as in `Plan`."""

    def make(*, spacing: Spacing = (1.0, 1.0, 1.0), **options: object) -> Plan:
        labels = {"background": 0, "organ_1": 4, "organ_2": 7}
        own = {"labels": labels, "target_spacing": spacing, "patch_size": (12, 16, 8), "precision": "32-true"}
        return plan_of(**{**own, **options})

    return make


@pytest.fixture
def make_network(two_stages: Callable[..., NetworkPlan]) -> Callable[..., UNet]:
    """An untrained U-Net of two small stages, the lower one halved along two axes; options as in `UNet`."""

    def make(in_channels: int, num_classes: int, *, features: int = 4, seed: int = 0, **options: Any) -> UNet:
        torch.manual_seed(seed)
        plan = two_stages(features_per_stage=(features, 6), strides=((1, 1, 1), (2, 2, 1)))
        return UNet(in_channels, num_classes, plan, **options).eval()

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder with an untrained U-Net of the plan as its best checkpoint."""

    def make(
        plan: Plan,
        *,
        config: dict[str, object] | None = None,
        num_classes: int | None = None,
        name: str = "run",
        seed: int = 3,
    ) -> Path:
        torch.manual_seed(seed)
        run_dir = tmp_path / name
        network = UNet(plan.num_channels, num_classes or plan.num_classes, plan.network)
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        (run_dir / "checkpoints").mkdir(parents=True)
        torch.save({"state_dict": state}, run_dir / "checkpoints" / "best.ckpt")
        write_artifact(run_dir / "plan.json", plan)
        if config is not None:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        return run_dir

    return make
