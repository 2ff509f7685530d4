"""Errors between a step or an epoch and the note that it is finished: nothing is lost, and nothing counted twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from pipeline.artifacts import read_artifact
from pipeline.config import OptimConfig
from pipeline.errors import StoppedError
from pipeline.plan import Plan, Rung
from pipeline.run_record import RunRecord
from pipeline.training import assembly, checkpoints, gradient_noise
from pipeline.training.checkpoints import AtomicCheckpointIO
from pipeline.training.divergence import DivergenceGuard
from pipeline.training.ema import WeightAverage
from pipeline.training.epoch_report import EpochReport
from pipeline.training.loop_state import Pace
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.module import SegmentationModule
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

# Three iterations in steps of two: the last step of an epoch is over one iteration. Validated after epochs 2 and 3.
OPTIONS = {
    "effective_batch": 4,
    "iterations_per_epoch": 3,
    "max_epochs": 3,
    "validate_every_n_epochs": 2,
    "optim": OptimConfig(name="sgd", ema_decay=0.9),
}
# A training goes on by itself after the one, and when it is started again after the other.
ERRORS = pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])


@pytest.fixture
def ladder(plan) -> Plan:
    """Two rungs that only recompute."""
    rungs = (Rung(patch_size=plan.patch_size, batch_size=2, recompute_stages=stages) for stages in (1, 2))
    return Plan(**{**vars(plan), "fallbacks": tuple(rungs)})


@pytest.fixture
def fail(monkeypatch) -> Callable[..., None]:
    """Lets a function raise instead of doing anything, or once it is done, at its n-th call."""

    def prepare(owner: Any, name: str, error: type[BaseException], *, at: int, once_done: bool = False) -> None:
        real, calls = getattr(owner, name), count(1)

        def maybe(*args, **options):
            fails = next(calls) == at
            if fails and not once_done:
                raise error
            result = real(*args, **options)
            if fails:
                raise error
            return result

        monkeypatch.setattr(owner, name, maybe)

    return prepare


@pytest.fixture
def train(ladder, store, splits, make_config) -> Callable[..., Path]:
    """Trains to the end, in a second start where the first one is stopped."""

    def run(name: str, **options) -> Path:
        config = make_config(name, **{**OPTIONS, **options})
        with suppress(StoppedError):
            return fit_fold(ladder, store, splits, config).run_dir
        return fit_fold(ladder, store, splits, config).run_dir

    return run


@pytest.fixture(scope="module")
def whole(plan, store, splits, config_in, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    return fit_fold(plan, store, splits, config_in(tmp_path_factory.mktemp("whole"), **OPTIONS)).run_dir


@ERRORS
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [(MetricsTable, "append", 1), (MetricsTable, "append", 2), (TensorBoardLogger, "log_metrics", 3)],
)
@pytest.mark.parametrize("once_done", [False, True])
def test_an_epoch_cut_off_while_it_is_reported_is_reported_once(
    train, whole, assert_same_run, rows_of, fail, error, owner, name, at, once_done
):
    fail(owner, name, error, at=at, once_done=once_done)
    run_dir = train("cut")
    assert [row["epoch"] for row in rows_of(run_dir)] == ["1", "2", "3"]
    assert_same_run(run_dir, whole)
    # TensorBoard drops what was logged from the step on that a later start of a training names.
    events = [each for path in (run_dir / "tensorboard").iterdir() for each in EventFileLoader(str(path)).Load()]
    starts = {event.step for event in events if event.HasField("session_log")}
    assert starts == {1, 2 * (at - 1) + 1}


@ERRORS
def test_an_epoch_cut_off_after_its_line_was_made_is_done_again_whole(train, whole, assert_same_run, fail, error):
    fail(EpochReport, "_line", error, at=3)
    assert_same_run(train("cut"), whole)


@ERRORS
@pytest.mark.parametrize("once_done", [False, True])
@pytest.mark.parametrize("at", [2, 3, 4, 5, 6])
def test_the_best_weights_are_those_that_the_record_names_whichever_save_was_cut_off(
    train, whole, assert_same_run, fail, error, at, once_done
):
    """Saved are the start, the first epoch, and `best` and `last` of the second and of the third, each the best yet."""
    fail(AtomicCheckpointIO, "save_checkpoint", error, at=at, once_done=once_done)
    run_dir = train("cut")
    folder = RunFolder(run_dir)
    best = torch.load(folder.best_checkpoint, weights_only=True)
    assert read_artifact(folder.record, RunRecord).best_epoch == best["counts"]["epoch"] == 3
    assert best["callbacks"]["CheckpointWriter"]["best_epoch"] == 3
    assert_same_run(run_dir, whole)


@ERRORS
def test_without_a_validation_the_best_weights_are_the_last_ones_wherever_a_save_was_cut_off(train, fail, error):
    fail(checkpoints, "_link_or_copy", error, at=3)
    folder = RunFolder(train("cut", fold="all"))
    best, last = (torch.load(path, weights_only=True) for path in (folder.best_checkpoint, folder.last_checkpoint))
    assert best["counts"] == last["counts"] == {"epoch": 3, "iteration": 9, "optimizer_step": 6}


@ERRORS
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_step_cut_off_while_it_is_counted_is_not_made_twice(train, whole, assert_same_run, fail, error, at):
    fail(Pace, "counts", error, at=at)
    assert_same_run(train("cut"), whole)


@ERRORS
@pytest.mark.parametrize("once_done", [False, True])
def test_noise_that_is_cut_off_while_it_is_added_up_is_added_once(
    train, assert_same_run, monkeypatch, fail, error, once_done
):
    """Four optimiser steps an epoch, all read at its end."""
    options = {"iterations_per_epoch": 8}
    expected = train("undisturbed", **options)
    fail(gradient_noise, "signal_and_noise", error, at=6, once_done=once_done)
    assert_same_run(train("cut", **options), expected)


def test_bad_losses_of_an_accumulation_that_is_done_again_count_once(train, assert_same_run, monkeypatch, fail):
    """Eight losses an optimiser step; seven in a row are infinite in the second, before memory runs out in it."""

    def patient(*args, **options) -> DivergenceGuard:
        return DivergenceGuard(*args, **{**options, "patience": 10})

    real = SegmentationModule.training_step

    def spoilt(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss + float("inf") if self.trainer.current_epoch == 1 and batch_idx < 7 else loss

    monkeypatch.setattr(assembly, "DivergenceGuard", patient)
    monkeypatch.setattr(SegmentationModule, "training_step", spoilt)
    options = {"iterations_per_epoch": 8, "effective_batch": 16, "max_epochs": 2}
    expected = train("undisturbed", **options)
    fail(SegmentationModule, "training_step", torch.OutOfMemoryError, at=16)
    assert_same_run(train("cut", **options), expected)


def test_bad_losses_at_the_end_of_a_finished_step_are_remembered(tmp_path):
    pace, bad, good = Pace(iterations_per_epoch=4, iterations_per_step=2), torch.tensor(float("nan")), torch.ones(())

    class Position:
        current_epoch = 0

    guard, seen = DivergenceGuard(tmp_path / "last.ckpt", pace=pace, patience=5), []
    for index, loss in enumerate((good, bad, bad, good)):
        guard.on_train_batch_end(Position(), None, {"loss": loss}, {}, index)
        guard.check(Position(), torch.nn.Linear(1, 1))
        seen.append(guard.state_dict()["bad_in_a_row"])
    assert seen == [0, 1, 1, 0]


def test_a_step_that_the_scaler_left_out_is_not_averaged_twice(train, assert_same_run, monkeypatch, fail):
    """It changes no weight, so that only Lightning's count tells that it was made."""
    real = SegmentationModule.optimizer_step

    def scaled(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.trainer.global_step == 3:
            optimizer_closure()
        else:
            real(self, epoch, batch_idx, optimizer, optimizer_closure)

    monkeypatch.setattr(SegmentationModule, "optimizer_step", scaled)
    expected = train("undisturbed")
    fail(WeightAverage, "_follow", torch.OutOfMemoryError, at=4, once_done=True)
    assert_same_run(train("cut"), expected)
