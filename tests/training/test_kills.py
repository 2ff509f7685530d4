"""SIGKILL at random moments: what goes on ends bit by bit like a training that nothing happened to."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from time import perf_counter, sleep

import pytest


@pytest.fixture(scope="module")
def train_seconds(trainings, tmp_path_factory) -> float:
    """How long such a training takes once it has begun."""
    run_dir = tmp_path_factory.mktemp("timed") / "run"
    process = trainings.start(run_dir)
    await_beat(run_dir, process, before=0)
    started = perf_counter()
    process.join()
    return perf_counter() - started


def beat_time(run_dir: Path) -> int:
    path = run_dir / "heartbeat.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def await_beat(run_dir: Path, process, *, before: int) -> None:
    while process.exitcode is None and beat_time(run_dir) == before:
        sleep(0.002)


@pytest.mark.parametrize("num_kills", [24, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_training_killed_at_random_moments_gets_to_the_same_end(
    trainings, undisturbed, assert_same_run, tmp_path, train_seconds, num_kills, request
):
    """One in five is killed while it is set up; a run that ends in between is compared, and another one begun.

    Every other run reads a copy of its store, which it makes first.
    """
    num_kills = request.config.getoption("--kills") or num_kills
    # Saved at every optimiser step, so that kills come while saving, and a training gets on however often.
    saving = type(trainings)([*trainings.arguments, "--save_every_minutes", "1e-9"])
    staging = type(trainings)([*saving.arguments, "--stage_to", str(tmp_path / "disk")])
    moments = random.Random(num_kills + 1000 * request.config.getoption("--kill_seed"))
    runs, kills = [tmp_path / "run_0"], 0
    while kills < num_kills:
        run_dir = runs[-1]
        before, process = beat_time(run_dir), (saving, staging)[len(runs) % 2].start(run_dir)
        if moments.random() > 0.2:
            await_beat(run_dir, process, before=before)
        sleep(moments.uniform(0, train_seconds / 16))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        if process.exitcode == 0:
            runs.append(tmp_path / f"run_{len(runs)}")
            # Copied anew, so that runs are killed in that as well.
            shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    saving.finish(runs[-1])
    for run_dir in runs:
        assert_same_run(run_dir, undisturbed)
        assert not list(run_dir.rglob("*.partial.*"))
