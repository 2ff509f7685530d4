"""Going on in the middle of an epoch, at the last finished optimiser step, to the same end bit by bit."""

from __future__ import annotations

import os
import random
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import read_artifact
from pipeline.config import AugmentationConfig, OptimConfig
from pipeline.errors import StoppedError, TrainingDivergedError
from pipeline.networks.unet import UNet
from pipeline.run_record import Counts, RunRecord
from pipeline.training.loop_state import Pace
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold

# Five iterations in steps of two: the last step of an epoch is over one iteration.
OPTIONS = {
    "effective_batch": 4,
    "iterations_per_epoch": 5,
    "max_epochs": 3,
    "augmentation": AugmentationConfig(),
    "validate_every_n_epochs": 2,
}
PASSES, PASSES_PER_EPOCH = 15, 5


class Interrupted(nn.Module):
    """A U-Net with dropout and a batch norm, which is interrupted at a given training or validation pass.

    Args:
        training: Number of the training pass, from 1.
        validation: Number of the pass in evaluation mode, from 1.
        by: KeyboardInterrupt is raised at once; a signal lets Lightning finish the pass.
    """

    def __init__(self, plan, *, training: int = 0, validation: int = 0, by: object = KeyboardInterrupt) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.BatchNorm3d(plan.num_channels)
        self.unet = UNet(plan.num_channels, plan.num_classes, plan.network)
        self.dropout = nn.Dropout3d(0.2)
        self.at, self.by = {True: training, False: validation}, by
        self.passes = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.passes[self.training] += 1
        if self.passes[self.training] == self.at[self.training]:
            if self.by is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.by)
        output = self.unet(x)
        return self.dropout(output[0] if isinstance(output, list) else output)


def options_with(optimizer: str) -> dict:
    return {**OPTIONS, "optim": OptimConfig(name=optimizer, ema_decay=0.9)}


@pytest.fixture(scope="module")
def whole(plan, store, splits, config_in, tmp_path_factory):
    """Runs that were not interrupted, by optimiser."""
    runs = {}
    for optimizer in ("sgd", "adamw"):
        config = config_in(tmp_path_factory.mktemp(optimizer), **options_with(optimizer))
        runs[optimizer] = fit_fold(plan, store, splits, config, network=Interrupted(plan)).run_dir
    return runs


@pytest.mark.parametrize(
    ("optimizer", "at"),
    [*(("sgd", at) for at in (1, 2, 3, 5, 6, 8)), *(("adamw", at) for at in (2, 4, 5, 10, 15))],
)
def test_an_interruption_at_any_pass_costs_no_finished_step_and_changes_nothing(
    plan, store, splits, make_config, whole, assert_same_run, optimizer, at
):
    config = make_config(**options_with(optimizer))
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Interrupted(plan, training=at))
    epochs, passes = divmod(at - 1, PASSES_PER_EPOCH)
    network = Interrupted(plan)
    result = fit_fold(plan, store, splits, config, network=network)
    assert network.passes[True] == PASSES - (epochs * PASSES_PER_EPOCH + passes - passes % 2)
    assert_same_run(result.run_dir, whole[optimizer])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [2, 4, 5, 7])
def test_a_signal_ends_a_run_at_a_finished_step_too(
    plan, store, splits, make_config, whole, assert_same_run, number, at
):
    config = make_config(**options_with("sgd"))
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Interrupted(plan, training=at, by=number))
    result = fit_fold(plan, store, splits, config, network=Interrupted(plan))
    assert_same_run(result.run_dir, whole["sgd"])


@pytest.mark.parametrize("at", [1, 3, 20])
def test_an_interrupted_validation_is_done_again_without_a_training_step(
    plan, store, splits, make_config, whole, assert_same_run, at
):
    config = make_config(**options_with("adamw"))
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Interrupted(plan, validation=at))
    saved = torch.load(RunFolder(Path(config.run_dir)).last_checkpoint, weights_only=True)["counts"]
    epoch = saved["epoch"]
    assert saved == {"epoch": epoch, "iteration": 5 * (epoch + 1), "optimizer_step": 3 * (epoch + 1)}
    network = Interrupted(plan)
    result = fit_fold(plan, store, splits, config, network=network)
    assert network.passes[True] == PASSES - PASSES_PER_EPOCH * (epoch + 1)
    assert_same_run(result.run_dir, whole["adamw"])


def test_a_run_that_is_interrupted_again_and_again_gets_to_the_same_end(
    plan, store, splits, make_config, whole, assert_same_run
):
    config, moments, starts = make_config(**options_with("adamw")), random.Random(1), count()
    for _ in range(60):
        network = Interrupted(plan, training=moments.randint(1, 4), validation=moments.choice([0, 2, 9]))
        try:
            result = fit_fold(plan, store, splits, config, network=network)
            break
        except StoppedError:
            next(starts)
    assert next(starts) >= 5
    assert_same_run(result.run_dir, whole["adamw"])


def test_data_workers_go_on_at_the_right_sample(plan, store, splits, make_config, whole, assert_same_run):
    config = make_config(**options_with("sgd"), hardware={"num_workers": 2})
    for at in (4, 5):
        with pytest.raises(StoppedError):
            fit_fold(plan, store, splits, config, network=Interrupted(plan, training=at))
    result = fit_fold(plan, store, splits, config, network=Interrupted(plan))
    assert_same_run(result.run_dir, whole["sgd"])


def test_ctrl_c_between_the_update_of_weights_and_the_note_of_it_does_not_count_as_a_finished_step(
    plan, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    """A step whose end nobody saw is done again from the checkpoint before it."""
    config, steps, update = make_config(**options_with("sgd")), count(1), torch._fused_sgd_

    def interrupted_update(*args, **options) -> None:
        update(*args, **options)
        if next(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_fused_sgd_", interrupted_update)
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Interrupted(plan))
    saved = torch.load(RunFolder(Path(config.run_dir)).last_checkpoint, weights_only=True)["counts"]
    assert saved == {"epoch": 1, "iteration": 5, "optimizer_step": 3}
    assert_same_run(fit_fold(plan, store, splits, config, network=Interrupted(plan)).run_dir, whole["sgd"])


def test_weights_that_are_not_finite_are_not_saved_when_a_run_is_stopped(plan, store, splits, make_config):
    class Spoilt(Interrupted):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.passes[True] == 3:
                with torch.no_grad():
                    self.unet.heads[0].weight.fill_(float("nan"))
            return super().forward(x)

    config = make_config(**options_with("sgd"))
    with pytest.raises((TrainingDivergedError, StoppedError)):
        fit_fold(plan, store, splits, config, network=Spoilt(plan, training=5))
    saved = torch.load(RunFolder(Path(config.run_dir)).last_checkpoint, weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


def test_the_start_of_a_run_is_saved_and_the_record_says_that_it_runs(plan, store, splits, make_config):
    config = make_config(**options_with("sgd"))
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=Interrupted(plan, training=1))
    folder = RunFolder(Path(config.run_dir))
    assert torch.load(folder.last_checkpoint, weights_only=True)["counts"]["optimizer_step"] == 0
    assert read_artifact(folder.record, RunRecord).status == "running"


def test_an_epoch_is_cut_up_alike_whatever_the_size_of_a_pass():
    whole, split = (Pace(5, 2, passes) for passes in (1, 3))
    assert (whole.passes_per_epoch, split.passes_per_epoch) == (5, 15)
    assert (whole.passes_per_step, split.passes_per_step) == (2, 6)
    assert whole.steps_per_epoch == split.steps_per_epoch == 3
    for passes in (0, 2, 4, 5):
        counts = whole.counts(epoch=7, passes=passes)
        assert counts == split.counts(epoch=7, passes=3 * passes)
        assert split.passes_into_epoch(counts) == 3 * whole.passes_into_epoch(counts) == 3 * passes
    assert whole.counts(epoch=1, passes=5) == Counts(epoch=1, iteration=10, optimizer_step=6)
    assert [split.iteration(epoch=1, batch_idx=index) for index in (0, 2, 3, 14)] == [6, 6, 7, 10]
