"""A store of six tiny cases with two classes, the plan it was made by, and options that train on it in seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import write_artifact
from pipeline.cli import main
from pipeline.config import AugmentationConfig, HardwareConfig, TrainConfig
from pipeline.datasets.splits import Splits, make_splits
from pipeline.geometry import Grid
from pipeline.plan import ChannelPlan, NetworkPlan, Plan
from pipeline.rank_place import TORCHRUN_NAMES
from pipeline.store import IGNORE_INDEX, CaseStore, StoreInfo, WritableStore

PATCH = (16, 8, 12)
TIMES_AND_MEMORY = {"seconds", "data_wait_share", "peak_ram_bytes", "validation_seconds"}
OBLIQUE = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def plan(plan_of: Callable[..., Plan], two_stages: Callable[..., NetworkPlan]) -> Plan:
    return plan_of(
        dataset_name="ellipsoids",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels={"background": 0, "outer": 1, "inner": 2},
        target_spacing=(1.0, 1.0, 1.5),
        median_shape=(20, 14, 16),
        patch_size=PATCH,
        batch_size=2,
        precision="32-true",
        network=two_stages(num_decoder_blocks=1),
    )


@pytest.fixture(scope="session")
def store(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    store = WritableStore.create(folder, StoreInfo.of(plan))
    for index in range(6):
        rng = np.random.default_rng(index)
        shape = (20 - index, 14 + index, 12 + 2 * index)
        label = _ellipsoids(shape)
        if index == 0:
            label[:2] = IGNORE_INDEX
        image = (label.clip(0) + 0.3 * rng.standard_normal(shape))[None].astype(np.float32)
        store.write_case(f"case_{index}", image, label, native_grid=Grid(shape, OBLIQUE))
    return folder


def _ellipsoids(shape: tuple[int, int, int]) -> np.ndarray:
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum((axis - offset) ** 2 for axis, offset in zip(axes, (0.1, 0.0, -0.1), strict=True)))
    return ((radius < 0.8).astype(np.int16) + (radius < 0.4)).astype(np.int16)


@pytest.fixture(scope="session")
def splits(store: Path) -> Splits:
    return make_splits({case_id: case_id for case_id in CaseStore(store).case_ids}, num_folds=3, seed=0)


@pytest.fixture(scope="session")
def config_in(store: Path) -> Callable[..., TrainConfig]:
    """Makes small options for a run in a given folder."""

    def make(run_dir: Path, **options: Any) -> TrainConfig:
        hardware = {"accelerator": "cpu", "num_workers": 0, "num_threads": 1, **options.pop("hardware", {})}
        defaults: dict[str, Any] = {
            "plan": "plan.json",
            "store": str(store),
            "run_dir": str(run_dir),
            "max_epochs": 3,
            "iterations_per_epoch": 4,
            "validate_every_n_epochs": 2,
            "num_folds": 3,
            "augmentation": AugmentationConfig(enabled=False),
        }
        return TrainConfig(**{**defaults, **options}, hardware=HardwareConfig(**hardware))

    return make


@pytest.fixture
def make_config(config_in: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes small options for a run in this test's folder."""

    def make(run: str = "run", **options: Any) -> TrainConfig:
        return config_in(tmp_path / run, **options)

    return make


def _checkpoint(run_dir: Path) -> dict[str, Any]:
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "counts", "ema_state_dict", "ema_num_updates")
    callbacks = {key: checkpoint["callbacks"].get(key) for key in ("DivergenceGuard", "EpochReport", "GradientNoise")}
    return {**{key: checkpoint[key] for key in keys if key in checkpoint}, **callbacks}


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    """Of metrics.csv, without times and memory."""
    header, *lines = (line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    return [{key: value for key, value in row.items() if key not in TIMES_AND_MEMORY} for row in rows]


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Assert that tensors in dictionaries and lists are the same bit by bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path], list[dict[str, str]]]:
    """Reads the rows of metrics.csv, without times and memory."""
    return read_rows


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Asserts that two runs came to the same, bit by bit: checkpoint, every epoch's row, best weights."""

    def compare(found: Path, expected: Path) -> None:
        assert_equal(_checkpoint(found), _checkpoint(expected))
        assert read_rows(found) == read_rows(expected)
        best = [torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (found, expected)]
        assert_equal(*({key: each[key] for key in ("state_dict", "counts")} for each in best))

    return compare


class Trainings:
    """Starts `voxfit train` in processes of their own, forked so that a start takes no seconds.

    Args:
        arguments: Of the command, without the run folder.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def start(self, run_dir: Path, prepare: Callable[[], None] | None = None) -> Any:
        """A training in `run_dir`, as a process group of its own; `prepare` is called in it first."""
        process = multiprocessing.get_context("fork").Process(target=self._train, args=(run_dir, prepare))
        process.start()
        return process

    def finish(self, run_dir: Path) -> None:
        """Train to the end."""
        process = self.start(run_dir)
        process.join()
        assert process.exitcode == 0

    def _train(self, run_dir: Path, prepare: Callable[[], None] | None) -> None:
        os.setsid()
        if prepare is not None:
            prepare()
        # As at the end of a command: without what the test runner would do then.
        os._exit(main(["train", *self.arguments, "--run_dir", str(run_dir)]))


@pytest.fixture(scope="session")
def trainings(plan: Plan, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """Small trainings with accumulation, an average of the weights, augmentation and validations."""
    plan_path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_artifact(plan_path, plan)
    options = {
        "plan": plan_path,
        "store": store,
        "num_folds": 3,
        "max_epochs": 6,
        "iterations_per_epoch": 5,
        "effective_batch": 4,
        "validate_every_n_epochs": 2,
        "optim.name": "adamw",
        "optim.ema_decay": 0.9,
        "hardware.accelerator": "cpu",
        "hardware.num_workers": 0,
        "hardware.num_threads": 1,
    }
    return Trainings([word for key, value in options.items() for word in (f"--{key}", str(value))])


class RankedTrainings:
    """Starts `voxfit train` in several processes that train together, as torchrun would, each forked.

    Args:
        arguments: Of the command, without the run folder.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def start(self, run_dir: Path, num_ranks: int, *options: str, prepare: Callable[[int], None] | None = None) -> Any:
        """The processes, by rank; `prepare` is called in each first, with its rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context, processes = multiprocessing.get_context("fork"), []
        for rank in range(num_ranks):
            values = (rank, num_ranks, rank, num_ranks, "127.0.0.1", port)
            environment = {name: str(value) for name, value in zip(TORCHRUN_NAMES, values, strict=True)}
            words = ["train", *self.arguments, *options, "--run_dir", str(run_dir)]
            process = context.Process(target=self._train, args=(environment, words, rank, prepare))
            process.start()
            processes.append(process)
        return processes

    def end(self, processes: Any, seconds: float = 60) -> list[int]:
        """Wait for all; their exit codes."""
        deadline = monotonic() + seconds
        for process in processes:
            process.join(max(0.0, deadline - monotonic()))
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, "ranks hang"
        return [process.exitcode for process in processes]

    def finish(self, run_dir: Path, num_ranks: int, *options: str) -> None:
        """Train to the end."""
        assert self.end(self.start(run_dir, num_ranks, *options)) == [0] * num_ranks

    def _train(
        self, environment: dict[str, str], words: list[str], rank: int, prepare: Callable[[int], None] | None
    ) -> None:
        os.environ.update(environment)
        os.setsid()
        if prepare is not None:
            prepare(rank)
        os._exit(main(words))


@pytest.fixture(scope="session")
def ranked_trainings(trainings: Trainings) -> RankedTrainings:
    """The same small trainings in several processes."""
    return RankedTrainings(trainings.arguments)


class OneLayer(nn.Module):
    """A network of one layer that does something at a training pass; 0 is none."""

    def __init__(self, *, at: int = 0, do: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 3, 1)
        self.at, self.do, self.passes = at, do, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        if self.do is not None and self.training and self.passes == self.at:
            self.do()
        return self.layer(x)


@pytest.fixture(scope="session")
def one_layer() -> type[OneLayer]:
    """Such a network."""
    return OneLayer


@pytest.fixture(scope="session")
def undisturbed(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of such a training that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    trainings.finish(run_dir)
    return run_dir
