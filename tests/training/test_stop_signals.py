"""Signals to a training in a process of its own: it ends with 75 within seconds, and goes on to the same end."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import torch
from torch import Tensor

from pipeline import stop_signals
from pipeline.networks.unet import UNet
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.stop_signals import StopNow, StopRequest, stop_signals_noted
from pipeline.training.checkpoints import AtomicCheckpointIO
from pipeline.training.epoch_report import EpochReport
from pipeline.training.module import SegmentationModule
from pipeline.training.validation import Validator, _Watching

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What a training does, each by a function that is called while it does it, and at which call.
MOMENTS = {
    "data": (PatchDataset, "__getitem__", 12),
    "forward": (SegmentationModule, "training_step", 8),
    "backward": (SegmentationModule, "on_after_backward", 8),
    "optimiser": (SegmentationModule, "optimizer_step", 4),
    "validation": (Validator, "_segment", 2),
    "report": (EpochReport, "_line", 2),
    "checkpoint": (AtomicCheckpointIO, "save_checkpoint", 3),
}
LONG = 30.0


def pausing(moment: str, marker: Path, seconds: float) -> Callable[[], None]:
    """Makes the process write `marker` and pause at a moment."""
    owner, name, at = MOMENTS[moment]

    def prepare() -> None:
        real, calls = getattr(owner, name), count(1)

        def paused(*args, **options):
            if next(calls) == at:
                marker.write_text("")
                until = monotonic() + seconds
                # A signal ends a single sleep of a process that only notes it no earlier, but a handler may raise.
                while monotonic() < until:
                    sleep(0.02)
            return real(*args, **options)

        setattr(owner, name, paused)

    return prepare


def wait_for(path: Path, process) -> None:
    while not path.exists():
        assert process.exitcode is None
        sleep(0.005)


@pytest.mark.parametrize(("moment", "number"), [(moment, SIGNALS[i % 3]) for i, moment in enumerate(MOMENTS)])
def test_a_signal_at_any_moment_ends_with_75_and_changes_nothing(
    trainings, undisturbed, assert_same_run, tmp_path, moment, number
):
    # A wait for data and a validation are left at once, the rest is done first.
    seconds = LONG if moment in ("data", "validation") else 0.3
    process = trainings.start(tmp_path / "run", pausing(moment, tmp_path / "here", seconds))
    wait_for(tmp_path / "here", process)
    asked = monotonic()
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75
    assert monotonic() - asked < LONG / 2
    assert f"({signal.Signals(number).name})" in (tmp_path / "run" / "log.txt").read_text()
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("number", SIGNALS)
def test_more_signals_in_the_middle_of_a_save_tear_nothing(trainings, undisturbed, assert_same_run, tmp_path, number):
    process = trainings.start(tmp_path / "run", pausing("checkpoint", tmp_path / "here", 0.5))
    wait_for(tmp_path / "here", process)
    for each in (number, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process.pid, each)
        sleep(0.05)
    process.join()
    assert process.exitcode == 75
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_the_third_ctrl_c_kills_at_once_and_tears_nothing(trainings, undisturbed, assert_same_run, tmp_path):
    process = trainings.start(tmp_path / "run", pausing("checkpoint", tmp_path / "here", LONG))
    wait_for(tmp_path / "here", process)
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        sleep(0.1)
    process.join(LONG / 2)
    assert process.exitcode == -signal.SIGINT
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_training_stopped_at_random_moments_again_and_again_gets_to_the_same_end(
    trainings, undisturbed, assert_same_run, tmp_path
):
    moments, codes = random.Random(7), []
    while not codes or codes[-1] != 0:
        process = trainings.start(tmp_path / "run")
        beat, before = tmp_path / "run" / "heartbeat.json", 0
        before = beat.stat().st_mtime_ns if beat.exists() else 0
        while process.exitcode is None and (not beat.exists() or beat.stat().st_mtime_ns == before):
            sleep(0.005)
        # Longer with every stop, so that it comes to its end on a slow machine as well.
        sleep(moments.uniform(0, 0.25) * (1 + len(codes) / 5))
        if process.exitcode is None:
            # To the whole group, as SLURM does.
            os.killpg(process.pid, moments.choice(SIGNALS))
        process.join()
        codes.append(process.exitcode)
        assert len(codes) < 80
    assert set(codes[:-1]) == {75}
    assert len(codes) > 1
    assert_same_run(tmp_path / "run", undisturbed)


def children_of(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_data_workers_leave_signals_to_the_training_and_end_with_it(trainings, undisturbed, assert_same_run, tmp_path):
    with_workers = type(trainings)([*trainings.arguments, "--hardware.num_workers", "2"])
    process = with_workers.start(tmp_path / "run", pausing("optimiser", tmp_path / "here", 1.0))
    wait_for(tmp_path / "here", process)
    workers = children_of(process)
    assert len(workers) == 2
    for number in SIGNALS:
        os.killpg(process.pid, number)
    sleep(0.3)
    assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    process.join()
    assert process.exitcode == 75
    assert not psutil.wait_procs(workers, timeout=5)[1]
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_data_workers_do_not_outlive_a_training_that_is_killed(trainings, tmp_path):
    with_workers = type(trainings)([*trainings.arguments, "--hardware.num_workers", "2"])
    process = with_workers.start(tmp_path / "run", pausing("optimiser", tmp_path / "here", LONG))
    wait_for(tmp_path / "here", process)
    workers = children_of(process)
    process.kill()
    process.join()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=3)[1]


def test_a_step_that_takes_too_long_is_given_up_between_its_passes(
    trainings, undisturbed, assert_same_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(stop_signals, "PATIENCE_SECONDS", 0.1)
    process = trainings.start(tmp_path / "run", pausing("forward", tmp_path / "here", 0.3))
    wait_for(tmp_path / "here", process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["counts"]
    # The eighth pass is the third of the second epoch, and the first of a step.
    assert saved == {"epoch": 1, "iteration": 7, "optimizer_step": 4}
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_signal_that_ended_nothing_goes_to_who_listened_before():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with stop_signals_noted() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert request.came
            assert heard == []
        assert heard == [signal.SIGUSR1]
        with pytest.raises(StopNow), stop_signals_noted() as request, request.at_any_line():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_and_signals_that_are_ignored_are_left_as_they_are():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_signals_noted() as request:
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == request.note
    finally:
        signal.signal(signal.SIGUSR1, before)
    seen = []

    def listen() -> None:
        with stop_signals_noted() as request:
            seen.append((request.came, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_a_request_within_a_step_waits_for_it_and_not_for_ever():
    request = StopRequest()
    request.in_step = True
    request.check()
    request.deadline = monotonic()
    request.check()
    request.deadline = monotonic() - stop_signals.PATIENCE_SECONDS
    with pytest.raises(StopNow):
        request.check()


def test_the_window_of_a_validation_is_the_network_s_own(plan):
    watching = _Watching(UNet(plan.num_channels, plan.num_classes, plan.network, fused_head=True), StopRequest())
    assert hasattr(watching, "pending_logits")
    assert not hasattr(_Watching(torch.nn.Identity(), StopRequest()), "pending_logits")
    assert torch.equal(_Watching(torch.nn.Identity(), StopRequest())(Tensor([1])), Tensor([1]))
