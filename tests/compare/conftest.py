"""Run folders as trainings leave them, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import api
from pipeline.artifacts import write_artifact
from pipeline.config import CompareConfig, TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.metrics import ClassScores
from pipeline.evaluation.summary import CaseScores, make_metrics, write_metrics
from pipeline.plan import MemoryPlan, Plan
from pipeline.run_record import RunRecord
from pipeline.training.compared_folders import read_compared_runs
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.run_folder import RunFolder

CLASSES = ("outer", "inner")
RNG = np.random.default_rng(7)
WriteRun = Callable[..., Path]
CASES = tuple(f"case_{number:02}" for number in range(12))


@pytest.fixture
def make_plan(plan_of: Callable[..., Plan]) -> Callable[..., Plan]:
    """Make the plan of the runs; options as in `Plan`."""
    own: dict[str, Any] = {
        "dataset_name": "ellipsoids",
        "fingerprint_hash": "0" * 16,
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "target_spacing": (1.0, 1.0, 1.5),
        "median_shape": (20, 14, 16),
        "patch_size": (16, 8, 12),
        "batch_size": 2,
        "accumulate_grad_batches": 2,
        "memory": MemoryPlan(budget_bytes=2**30, peak_bytes=1, overhead_bytes=0, parts={}),
    }
    return lambda **changes: plan_of(**{**own, **changes})


def _make_dice(shift: float = 0.0, cases: tuple[str, ...] = CASES, spread: float = 0.02) -> dict[str, dict[str, float]]:
    """Dice by case and class: a run that is better by `shift`, with noise of its own."""
    return {
        case: {name: 0.7 + 0.01 * n + shift + float(RNG.normal(0, spread)) for name in CLASSES}
        for n, case in enumerate(cases)
    }


@pytest.fixture
def make_dice() -> Callable[..., Any]:
    """Make scores of a run."""
    return _make_dice


@pytest.fixture
def write_run(make_plan: Callable[..., Plan], tmp_path: Path) -> WriteRun:
    """Write a run folder with the classes that trainings write theirs with."""

    def write(
        name: str,
        *,
        dice: Mapping[str, Mapping[str, float | None]] | None = None,
        plan: Plan | None = None,
        epochs: int = 3,
        loss: float = 1.0,
        is_finished: bool = True,
        record: Mapping[str, Any] | None = None,
        splits: Splits | None = None,
        **options: Any,
    ) -> Path:
        folder, plan = RunFolder(tmp_path / name), plan or make_plan()
        config = TrainConfig(plan="p", store="s", run_dir=str(folder.path), **options)
        folder.begin(
            plan, splits or Splits(seed=0, folds=(Fold(train=("x",), validation=tuple(dice or CASES)),)), config
        )
        table = MetricsTable(folder.metrics, class_names=CLASSES)
        for epoch in range(1, epochs + 1):
            table.append(
                {
                    **{"epoch": epoch, "iteration": 10 * epoch, "optimizer_step": 5 * epoch, "seconds": 60.0},
                    **{
                        "data_wait_share": 0.1,
                        "peak_vram_bytes": 0,
                        "peak_ram_bytes": 2**30 + epoch,
                        "lr": 0.01 / epoch,
                    },
                    **{"train_loss": loss / epoch, "val_dice_mean": 0.2 * epoch if epoch % 2 else None},
                    **{f"val_dice_{name}": 0.2 * epoch if epoch % 2 else None for name in CLASSES},
                    **{"validation_seconds": 30.0 if epoch % 2 else None, "noise_scale": 3.0 * epoch},
                }
            )
        facts: dict[str, Any] = {
            **{"fold": options.get("fold", 0), "max_epochs": 3, "versions": {"torch": "2"}, "device": "cpu"},
            **{"precision": "32-true", "precision_reason": "", "num_threads": 1, "num_workers": 0, "batch_size": 2},
            **{"accumulate_grad_batches": 2, "num_parameters": 5, "status": "finished" if is_finished else "running"},
        }
        write_artifact(folder.record, RunRecord(**{**facts, "validation": dice or {}, **(record or {})}))
        return folder.path

    return write


def _write_final_scores(
    run: Path, dice: Mapping[str, Mapping[str, float]], *, tolerance_mm: float = 1.0, path: Path | None = None
) -> None:
    rest = dict.fromkeys(("iou", "nsd", "assd_mm", "volume_error_ml", "relative_volume_error"), 0.5)
    volumes = {"prediction_ml": 1.0, "reference_ml": 1.0}
    scores = [
        CaseScores(
            case_id=case,
            classes={
                name: ClassScores(dice=value, hd95_mm=9 * (1 - value), **rest, **volumes)
                for name, value in each.items()
            },
        )
        for case, each in dice.items()
    ]
    labels = {name: index for index, name in enumerate(CLASSES, start=1)}
    metrics = make_metrics(scores, labels=labels, tolerance_mm=tolerance_mm, failures={})
    write_metrics(path or run / "validation" / "metrics.json", metrics)


@pytest.fixture
def write_final_scores() -> Callable[..., Any]:
    """Write scores of predictions on their own grids into a run."""
    return _write_final_scores


def _compare(*runs: Path, **options: Any) -> Comparison:
    return compare_runs(read_compared_runs(tuple(map(str, runs))), **options)


@pytest.fixture
def compare() -> Callable[..., Any]:
    """Compare runs, in the order given, without a page, whose pictures take most of the time."""
    return _compare


def _compare_to_page(*runs: Path, **options: Any) -> tuple[Comparison, str]:
    out = runs[0].parent / "page" / "compare.html"
    found = api.compare(CompareConfig(runs=tuple(map(str, runs)), out=str(out), **options))
    return found, out.read_text()


@pytest.fixture
def compare_to_page() -> Callable[..., Any]:
    """Compare runs as the command does; gives the comparison and the page's text."""
    return _compare_to_page
