"""Several processes that train one network: they do what one would, share the work, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import psutil
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline.api import train
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.networks.blocks import DecoderStage
from pipeline.networks.precision import PrecisionChoice
from pipeline.networks.unet import UNet
from pipeline.plan import Rung
from pipeline.run_record import RunRecord
from pipeline.training import settings, trainer  # noqa: F401  (so that forked processes need not import it)
from pipeline.training.checkpoints import AtomicCheckpointIO
from pipeline.training.run_folder import RunFolder

# Two optimiser steps of an epoch, the second over a single iteration of each process.
OPTIONS = ("--effective_batch", "8", "--iterations_per_epoch", "6", "--max_epochs", "4")
STOPPED, INPUT = 75, 2


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def callback_states(run_dir: Path) -> dict[str, dict[str, float]]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]


def record(run_dir: Path) -> RunRecord:
    return read_artifact(RunFolder(run_dir).record, RunRecord)


def at_pass(rank: int, number: int, act: Callable[[], None], *, training: bool = True) -> Callable[[int], None]:
    """Do something in one rank before a pass (from 1) of its network, or before a window of its validation."""

    def prepare(own: int) -> None:
        passes = 0

        def before(module: nn.Module, _: object) -> None:
            nonlocal passes
            wanted = UNet if training else DecoderStage
            if own == rank and isinstance(module, wanted) and module.training == training:
                passes += 1
                if passes == number:
                    act()

        register_module_forward_pre_hook(before)

    return prepare


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def fail() -> None:
    raise ValueError("the cat is on the keyboard")


@pytest.fixture(scope="module")
def undisturbed_pair(ranked_trainings, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    ranked_trainings.finish(run_dir, 2, *OPTIONS)
    return run_dir


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_processes_train_as_one_does_with_twice_the_accumulation(ranked_trainings, tmp_path, rows_of, optimizer):
    options = ["--effective_batch", "4", "--iterations_per_epoch", "8", "--max_epochs", "5", "--optim.name", optimizer]
    for name, num_ranks in (("two", 2), ("one", 1)):
        ranked_trainings.finish(tmp_path / name, num_ranks, *options)
    two, one = record(tmp_path / "two"), record(tmp_path / "one")
    assert (two.num_ranks, two.accumulate_grad_batches, two.counts) == (2, 1, one.counts)
    assert (one.accumulate_grad_batches, one.counts.optimizer_step) == (2, 20)
    for name, expected in weights(tmp_path / "one").items():
        assert torch.allclose(weights(tmp_path / "two")[name], expected, rtol=0, atol=1e-5), name
    sums = [callback_states(tmp_path / name)["GradientNoise"] for name in ("two", "one")]
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)
    for found, expected in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3)


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if value}


def test_three_processes_end_with_the_validation_of_every_case(ranked_trainings, tmp_path):
    ranked_trainings.finish(tmp_path / "run", 3, "--effective_batch", "6", "--iterations_per_epoch", "3")
    found = record(tmp_path / "run")
    assert found.num_ranks == 3
    assert len(found.validation) == 2
    by_class = [[scores[name] for scores in found.validation.values()] for name in ("outer", "inner")]
    assert found.best_dice == pytest.approx(sum(sum(column) / 2 for column in by_class) / 2)
    ranked_trainings.finish(tmp_path / "one", 1, "--effective_batch", "6", "--iterations_per_epoch", "3")
    for case_id, scores in record(tmp_path / "one").validation.items():
        assert found.validation[case_id] == pytest.approx(scores, abs=0.02)


def test_only_the_first_process_writes(undisturbed_pair):
    names = {path.name for path in undisturbed_pair.iterdir()}
    assert names == {
        *("config.yaml", "plan.json", "splits.json", "run.json", "metrics.csv", "heartbeat.json", "log.txt"),
        *("checkpoints", "tensorboard", ".lock"),
    }
    lines = (undisturbed_pair / "log.txt").read_text().splitlines()
    assert sum("epoch 1 of" in line for line in lines) == 1
    assert len(list((undisturbed_pair / "tensorboard").glob("events*"))) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_to_the_same_end(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run, rank, number
):
    processes = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=at_pass(rank, number, kill))
    codes = ranked_trainings.end(processes)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] not in (0, STOPPED)
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [1, 4])
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run, capfd, rank, number
):
    processes = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=at_pass(rank, number, ask_to_stop))
    assert ranked_trainings.end(processes) == [STOPPED, STOPPED]
    assert capfd.readouterr().err.count("stopped: stopped on request") == 1
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


def test_a_signal_in_the_validation_of_one_process_stops_all(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run
):
    prepare = at_pass(1, 1, ask_to_stop, training=False)
    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare)) == [75, 75]
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "training"), [(1, True), (2, True), (5, True), (2, False)])
def test_memory_that_runs_out_on_one_process_takes_all_down_a_rung(
    ranked_trainings, plan, undisturbed_pair, tmp_path, assert_same_run, rank, number, training
):
    ladder = tmp_path / "plan.json"
    rungs = [Rung(patch_size=plan.patch_size, batch_size=2, recompute_stages=stages) for stages in (1, 2)]
    if not training:
        # Windows of a validation are the same with recomputation: only a smaller patch helps them.
        rungs = [replace(rungs[0], patch_size=(8, 8, 8), batch_size=2)]
    write_artifact(ladder, replace(plan, fallbacks=tuple(rungs)))
    prepare = at_pass(rank, number, run_out_of_memory, training=training)
    started = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, "--plan", str(ladder), prepare=prepare)
    assert ranked_trainings.end(started) == [0, 0]
    (step,) = record(tmp_path / "run").step_downs
    assert step.where == ("forward" if training else "validation")
    assert step.error.startswith("CUDA out of memory")
    if training:
        assert_same_run(tmp_path / "run", undisturbed_pair)


def in_rank(rank: int, place: str, number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Do something in one rank at a call (from 1) of a function or method, before that does its own work."""

    def prepare(own: int) -> None:
        if own != rank:
            return
        owner, _, name = place.rpartition(".")
        holder, calls = resolve_name(owner), 0
        real = getattr(holder, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return real(*arguments, **options)

        setattr(holder, name, call)

    return prepare


def fill_disk() -> None:
    raise InputError("cannot write (No space left on device)", where="run.json")


EXCHANGE = "pipeline.training.gradient_exchange.GradientExchange"


@pytest.mark.parametrize(
    ("rank", "place", "number"),
    [
        (0, "pipeline.training.attempt.write_artifact", 1),
        (0, "pipeline.training.attempt.write_artifact", 2),
        # When all is done.
        (0, "pipeline.training.attempt.write_artifact", 3),
        (0, "pipeline.training.checkpoints.AtomicCheckpointIO.save_checkpoint", 1),
        (0, "pipeline.training.checkpoints.AtomicCheckpointIO.save_checkpoint", 3),
        (1, "pipeline.training.assembly.StepStrategy", 1),
        (1, "pipeline.training.gradient_exchange._float_buffers", 3),
        (1, f"{EXCHANGE}._average", 1),
        (0, f"{EXCHANGE}._average", 2),
    ],
)
def test_a_failure_at_any_place_of_one_process_ends_all_at_once(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run, capfd, rank, place, number
):
    started = time.monotonic()
    prepare = in_rank(rank, place, number, fill_disk)
    codes = ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare))
    assert codes[rank] == INPUT
    assert codes[1 - rank] in (1, INPUT)
    # What hangs is found out by timeouts of many minutes.
    assert time.monotonic() - started < 45
    assert "No space left on device" in capfd.readouterr().err
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("pipeline.training.step_strategy.StepStrategy.model_to_device", 1),
        ("pipeline.training.gradient_noise.GradientNoise.mean_of_own", 2),
    ],
)
def test_memory_that_runs_out_between_passes_and_meetings_takes_all_down_a_rung(
    ranked_trainings, plan, undisturbed_pair, tmp_path, assert_same_run, place, number
):
    ladder = tmp_path / "plan.json"
    write_artifact(
        ladder, replace(plan, fallbacks=(Rung(patch_size=plan.patch_size, batch_size=2, recompute_stages=1),))
    )
    prepare = in_rank(1, place, number, run_out_of_memory)
    started = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, "--plan", str(ladder), prepare=prepare)
    assert ranked_trainings.end(started) == [0, 0]
    assert len(record(tmp_path / "run").step_downs) == 1
    assert_same_run(tmp_path / "run", undisturbed_pair)


def test_memory_that_runs_out_within_an_exchange_ends_all_and_the_same_command_goes_on(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run
):
    prepare = in_rank(1, f"{EXCHANGE}._average", 2, run_out_of_memory)
    codes = ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare))
    assert codes == [1, 1]
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


@pytest.mark.parametrize(
    ("place", "number"),
    [("pipeline.training.trainer.resolve_settings", 1), ("pipeline.training.attempt.finished_record", 1)],
)
def test_a_signal_to_one_process_at_the_start_or_the_end_stops_all_and_the_run_goes_on(
    ranked_trainings, undisturbed_pair, tmp_path, assert_same_run, place, number
):
    prepare = in_rank(1, place, number, ask_to_stop)
    codes = ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare))
    assert codes == [STOPPED, STOPPED] or (0 in codes and set(codes) <= {0, STOPPED})
    ranked_trainings.finish(tmp_path / "run", 2, *OPTIONS)
    assert_same_run(tmp_path / "run", undisturbed_pair)


def test_processes_on_machines_of_different_kinds_are_refused(ranked_trainings, tmp_path, capfd):
    def prepare(rank: int) -> None:
        if rank == 1:
            settings.choose_precision = lambda *_, **__: PrecisionChoice("bf16-mixed", "this machine has it")

    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare)) == [2, 2]
    message = "error: hardware: the processes of this training differ in precision: 32-true, bf16-mixed"
    assert capfd.readouterr().err.count(message) == 1


def test_processes_that_read_different_checkpoints_are_refused(ranked_trainings, tmp_path, capfd):
    options = (*OPTIONS, "--optim.name", "adamw")
    stop = at_pass(0, 6, ask_to_stop)
    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *options, prepare=stop)) == [75, 75]

    def prepare(rank: int) -> None:
        real = AtomicCheckpointIO.load_checkpoint

        def load(*arguments: object, **given: object) -> dict:
            checkpoint = real(*arguments, **given)
            checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] += 1e-6
            return checkpoint

        if rank == 1:
            AtomicCheckpointIO.load_checkpoint = load

    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *options, prepare=prepare)) == [2, 2]
    assert "the processes read different checkpoints" in capfd.readouterr().err


def test_what_one_process_cannot_read_is_told_to_all_at_once(ranked_trainings, tmp_path, capfd):
    prepare = in_rank(1, "pipeline.api.read_artifact", 1, fill_disk)
    started = time.monotonic()
    codes = ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare))
    assert codes == [INPUT, INPUT]
    assert time.monotonic() - started < 45
    assert "No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize("options", [("--max_epochs", "auto", "--max_time", "20s"), ("--stage_to",)])
def test_processes_agree_on_the_number_of_epochs_and_share_a_staged_store(ranked_trainings, tmp_path, options):
    given = (*options, str(tmp_path / "disk")) if options == ("--stage_to",) else options
    started = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, *given)
    codes = ranked_trainings.end(started)
    assert codes in ([0, 0], [STOPPED, STOPPED])
    found = record(tmp_path / "run")
    assert found.max_epochs is not None
    assert found.max_epochs >= 1


def test_an_error_of_one_process_ends_all_and_is_told_by_the_first(ranked_trainings, tmp_path, capfd):
    started = ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=at_pass(1, 3, fail))
    assert ranked_trainings.end(started) == [1, 1]
    assert re.search(r"error: rank 1 on \S+ failed: ValueError: the cat is on the keyboard", capfd.readouterr().err)


def test_an_error_at_the_start_of_one_process_ends_all(ranked_trainings, tmp_path, capfd):
    def prepare(rank: int) -> None:
        if rank == 1:
            torch.get_num_threads = fail

    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare)) == [1, 1]
    assert "the cat is on the keyboard" in capfd.readouterr().err


def test_a_changed_option_is_said_once(ranked_trainings, undisturbed_pair, capfd):
    started = ranked_trainings.start(undisturbed_pair, 2, *OPTIONS, "--seed", "3")
    assert ranked_trainings.end(started) == [INPUT, INPUT]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "holds a run with other options: seed (was 0, now 3)" in errors[0]


def test_what_cannot_be_shared_out_is_refused_once_with_what_can(ranked_trainings, tmp_path, capfd):
    for options, message in (
        (
            ("--iterations_per_epoch", "7"),
            "iterations_per_epoch: 7 cannot be shared out evenly over 2 processes. Use 8",
        ),
        (("--effective_batch", "6"), "effective_batch: 6 is not a multiple of 2 processes x batch_size 2. Use 8"),
        (("--hardware.devices", "3"), "hardware.devices: 3 are asked for, and 2 process(es) were started"),
    ):
        assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, *options)) == [INPUT, INPUT]
        assert capfd.readouterr().err.count(f"error: {message}") == 1


def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way_round(ranked_trainings, undisturbed_pair, tmp_path):
    for first, second in ((2, 1), (1, 2)):
        run_dir = tmp_path / f"run_{first}"
        prepare = at_pass(0, 4, ask_to_stop)
        codes = ranked_trainings.end(ranked_trainings.start(run_dir, first, *OPTIONS, prepare=prepare))
        assert codes == [STOPPED] * first
        ranked_trainings.finish(run_dir, second, *OPTIONS)
        for name, expected in weights(undisturbed_pair).items():
            assert torch.allclose(weights(run_dir)[name], expected, rtol=0, atol=1e-5), name


def test_a_number_of_processes_that_changes_the_effective_batch_is_refused(ranked_trainings, tmp_path, capfd):
    options = ("--iterations_per_epoch", "6", "--max_epochs", "1", "--effective_batch", "auto")
    stopped = ranked_trainings.start(tmp_path / "run", 1, *options, prepare=at_pass(0, 2, ask_to_stop))
    assert ranked_trainings.end(stopped) == [STOPPED]
    assert ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *options)) == [INPUT, INPUT]
    message = "effective_batch: an optimiser step would see 4 patches on 2 process(es), and saw 2"
    assert capfd.readouterr().err.count(f"error: {message}") == 1


def command(trainings, run_dir: Path) -> list[str]:
    """`voxfit train` for two devices, as a user types it, without the program."""
    return ["train", *trainings.arguments, *OPTIONS, "--hardware.devices", "2", "--run_dir", str(run_dir)]


@pytest.mark.parametrize(
    "program",
    [
        ("-m", "pipeline"),
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline"),
    ],
    ids=["voxfit", "torchrun"],
)
def test_a_command_for_two_devices_trains_like_two_processes(
    trainings, undisturbed_pair, tmp_path, assert_same_run, program
):
    words = [sys.executable, *program, *command(trainings, tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed_pair)


AT_THE_END = """
import atexit, pathlib
threads = pathlib.Path("/proc/self/task")
atexit.register(lambda: print(*(each.read_text().strip() for each in threads.glob("*/comm"))))
from pipeline.training.ranks import open_ranks
with open_ranks() as ranks:
    ranks.meet()
    ranks.kept_by = ranks
"""


def test_no_thread_of_the_connection_outlives_a_process(tmp_path):
    """One that frees a tensor while the interpreter ends would abort the process, after all it did."""
    program = tmp_path / "program.py"
    program.write_text(AT_THE_END)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.count("python") >= 2
    assert "gloo" not in done.stdout


def test_a_command_for_two_devices_hands_signals_on_and_tells_of_a_killed_process(trainings, tmp_path):
    run_dir = tmp_path / "run"
    words = [sys.executable, "-m", "pipeline", *command(trainings, run_dir), "--max_epochs", "5000"]
    steps = []
    for end, code, sign in ((ask_parent, STOPPED, "metrics.csv"), (kill_child, 1, "heartbeat.json")):
        (run_dir / sign).unlink(missing_ok=True)
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        wait_for((run_dir / sign).is_file)
        # What only waits takes neither the time nor the memory of PyTorch.
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        end(psutil.Process(process.pid))
        _, output = process.communicate(timeout=100)
        assert process.returncode == code, output
        steps.append(torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["counts"]["optimizer_step"])
    assert "error: process 1 of this training was killed by SIGKILL" in output
    assert 0 < steps[0] <= steps[1]


def ask_parent(process: psutil.Process) -> None:
    process.send_signal(signal.SIGTERM)


def kill_child(process: psutil.Process) -> None:
    process.children()[1].kill()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_network_of_ones_own_is_not_handed_to_other_processes(plan, store, config_in, tmp_path):
    write_artifact(tmp_path / "plan.json", plan)
    config = config_in(tmp_path / "run", plan=str(tmp_path / "plan.json"), hardware={"devices": 2})
    with pytest.raises(InputError, match="Start your program with torchrun"):
        train(config, network=nn.Identity())


def test_a_process_that_never_starts_is_told_of(ranked_trainings, tmp_path, monkeypatch, capfd):
    def prepare(rank: int) -> None:
        if rank == 1:
            kill()

    from datetime import timedelta

    from pipeline.training import ranks

    monkeypatch.setattr(ranks, "START_TIMEOUT", timedelta(seconds=3))
    started = time.monotonic()
    codes = ranked_trainings.end(ranked_trainings.start(tmp_path / "run", 2, *OPTIONS, prepare=prepare))
    assert codes == [INPUT, -signal.SIGKILL]
    assert time.monotonic() - started < 60
    assert "the 2 processes of this training cannot reach each other" in capfd.readouterr().err
