"""A training within a given time: what it begins, where it ends, how many epochs fit."""

from __future__ import annotations

import re
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch

from pipeline.artifacts import read_artifact
from pipeline.durations import format_duration, parse_duration, time_problems
from pipeline.errors import InputError, StoppedError
from pipeline.networks.unet import UNet
from pipeline.run_record import RunRecord
from pipeline.status import Heartbeat
from pipeline.training.rehearsal import Cost
from pipeline.training.run_folder import RunFolder
from pipeline.training.time_budget import MARGIN
from pipeline.training.trainer import fit_fold
from pipeline.training.validation import Validator


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("11h30m", 41400),
        ("1d2h", 93600),
        ("45s", 45),
        ("90", 5400),
        ("90:30", 5430),
        ("11:30:00", 41400),
        ("2-03", 183600),
        ("2-03:30", 185400),
        ("2-03:00:00", 183600),
    ],
)
def test_spans_of_time_are_read_as_people_and_slurm_write_them(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["0m", "h", "3x", "-5m", "1:2:3:4", "m90", "1.5h"])
def test_what_is_no_span_of_time_is_said(text):
    assert len(time_problems(text)) == 1
    with pytest.raises(InputError, match="Write it as 90m"):
        parse_duration(text)


def test_spans_are_said_in_their_two_largest_units():
    shown = [format_duration(seconds) for seconds in (0, 4.4, 60, 61, 3600, 41400, 86399, 183601)]
    assert shown == ["0s", "4s", "1m", "1m1s", "1h", "11h30m", "23h59m", "2d3h"]


class PowerCutError(Exception):
    """The machine went down."""


class Slow(UNet):
    """The plan's U-Net, which takes its time in training."""

    def __init__(self, plan, seconds: float, *, fails_at: int = 10**9) -> None:
        torch.manual_seed(5)
        super().__init__(plan.num_channels, plan.num_classes, plan.network, fused_head=True)
        self.seconds, self.fails_at, self.passes = seconds, fails_at, 0

    def forward(self, x):
        self.passes += self.training
        if self.passes == self.fails_at:
            raise PowerCutError
        if self.training:
            sleep(self.seconds)
        return super().forward(x)


OPTIONS = {"max_epochs": 4, "validate_every_n_epochs": 4}


@pytest.fixture(scope="module")
def whole(plan, store, splits, config_in, tmp_path_factory) -> Path:
    config = config_in(tmp_path_factory.mktemp("whole"), **OPTIONS)
    return fit_fold(plan, store, splits, config, network=Slow(plan, 0)).run_dir


def test_an_epoch_that_would_not_end_in_time_is_not_begun(
    plan, store, splits, make_config, whole, assert_same_run, rows_of, tmp_path
):
    """An epoch takes 1.2 s and more, so that a second one fits into 3 s and a third one does not."""
    started = monotonic()
    with pytest.raises(StoppedError) as raised:
        fit_fold(plan, store, splits, make_config(**OPTIONS, max_time="3s"), network=Slow(plan, 0.3))
    assert monotonic() - started < 3.5
    message = str(raised.value)
    assert raised.value.exit_code == 75
    assert re.search(r"max_time 3s is up: no further epoch fits .*; . of 4 epochs are done, about \d+s of tr", message)
    done = len(rows_of(tmp_path / "run"))
    assert 1 <= done <= 2
    beat = read_artifact(tmp_path / "run" / "heartbeat.json", Heartbeat)
    assert (beat.phase, beat.epoch, beat.optimizer_step) == ("stopped", done, 4 * done)
    # The time is no part of the result, and may be another one in the next start.
    config = make_config(**OPTIONS, max_time="1h")
    assert_same_run(fit_fold(plan, store, splits, config, network=Slow(plan, 0)).run_dir, whole)


def test_a_first_epoch_that_takes_longer_than_there_is_time_is_left_at_a_step_and_gone_on_with(
    plan, store, splits, make_config, whole, assert_same_run
):
    config, starts = make_config(**OPTIONS, max_time="2s"), 0
    with pytest.raises(StoppedError, match="max_time 2s is up: it ended; 0 of 4 epochs are done"):
        fit_fold(plan, store, splits, config, network=Slow(plan, 0.5))
    step = torch.load(RunFolder(Path(config.run_dir)).last_checkpoint, weights_only=True)["counts"]["optimizer_step"]
    assert 0 < step < 4
    while starts < 20:
        starts += 1
        try:
            result = fit_fold(plan, store, splits, config, network=Slow(plan, 0.5))
            break
        except StoppedError:
            continue
    assert 2 < starts < 20
    assert_same_run(result.run_dir, whole)


def test_a_validation_is_left_when_the_time_is_up(
    plan, store, splits, make_config, whole, assert_same_run, monkeypatch
):
    real = Validator._segment

    def slow(self, network, image, device):
        for _ in range(50):
            sleep(0.05)
            self.request.check()
        return real(self, network, image, device)

    with monkeypatch.context() as patched:
        patched.setattr(Validator, "_segment", slow)
        with pytest.raises(StoppedError, match="max_time 2s is up: it ended; 3 of 4 epochs are done"):
            fit_fold(plan, store, splits, make_config(**OPTIONS, max_time="2s"), network=Slow(plan, 0))
    last = RunFolder(Path(make_config().run_dir)).last_checkpoint
    assert torch.load(last, weights_only=True)["counts"] == {"epoch": 3, "iteration": 16, "optimizer_step": 16}
    config = make_config(**OPTIONS)
    assert_same_run(fit_fold(plan, store, splits, config, network=Slow(plan, 0)).run_dir, whole)


def test_as_many_epochs_are_trained_as_fit_and_a_later_start_keeps_to_them(
    plan, store, splits, make_config, tmp_path, rows_of
):
    options = {"max_epochs": "auto", "validate_every_n_epochs": 50}
    # The rehearsal makes eight passes with a copy of the network, and the training itself fails in its third epoch.
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(**options, max_time="8s"), network=Slow(plan, 0.05, fails_at=9))
    folder = RunFolder(tmp_path / "run")
    decided = read_artifact(folder.record, RunRecord).max_epochs
    # An epoch takes 0.2 s and a little.
    assert 3 <= decided <= 8 / 0.2
    assert not list(folder.path.glob(".rehearsal*"))
    result = fit_fold(plan, store, splits, make_config(**options, max_time="9h"), network=Slow(plan, 0))
    assert result.counts.epoch == decided == len(rows_of(folder.path))
    # The schedule is that of a training with so many epochs.
    fixed = {**options, "max_epochs": decided}
    same = fit_fold(plan, store, splits, make_config("fixed", **fixed), network=Slow(plan, 0))
    assert rows_of(same.run_dir) == rows_of(folder.path)


def test_the_epochs_that_fit_leave_time_for_validations_and_saves(make_config):
    config = make_config(iterations_per_epoch=100, validate_every_n_epochs=5, max_epochs="auto", max_time="1h")
    cost = Cost(iteration=0.5, case=10.0, saving=5.0)
    epochs = cost.epochs_within(3600, config, num_cases=4)
    used = epochs * (100 * 0.5 + 5) + (epochs // 5 + 1) * 40
    assert 0.8 * 3600 < used < 3600
    assert cost.epochs_within(7200, config, num_cases=4) > 1.9 * epochs
    with pytest.raises(InputError, match=r"max_time: one epoch with its validation takes 1m\d+s, 1m are left"):
        cost.epochs_within(60, config, num_cases=4)


@pytest.mark.parametrize(("every", "most"), [(1, 0), (5, 0), (5, 2), (200, 1)])
def test_what_a_whole_training_takes_is_what_its_epochs_were_chosen_by(make_config, every, most):
    options = {"validate_every_n_epochs": every, "max_validation_cases": most, "max_epochs": "auto", "max_time": "1h"}
    config, cost = make_config(iterations_per_epoch=10, **options), Cost(iteration=0.5, case=2.0, saving=1.0)
    epochs = cost.epochs_within(3600, config, num_cases=4)
    taken = cost.seconds_of(epochs, config, num_cases=4)
    assert 0.9 * 3600 < MARGIN * taken.total <= 3600
    # Counted one by one.
    due = sum(epoch % every == 0 or epoch == epochs for epoch in range(1, epochs + 1))
    final = 4 if most else 0
    assert taken == (epochs * 10 * 0.5, (due * (most or 4) + final) * 2.0, epochs * 1.0)


def test_epochs_that_follow_from_the_time_need_one(make_config):
    with pytest.raises(InputError, match="max_epochs: auto needs a max_time"):
        make_config(max_epochs="auto")
