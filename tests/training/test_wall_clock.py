"""What a training took in all: every start of it counts, however it ended."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import StoppedError
from pipeline.status import Heartbeat
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold
from pipeline.training.wall_clock import read_wall_seconds


def ask_for_a_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stopped(plan, store, splits, make_config, one_layer) -> RunFolder:
    """A run that was stopped in its first epoch."""
    config = make_config()
    with pytest.raises(StoppedError):
        fit_fold(plan, store, splits, config, network=one_layer(at=2, do=ask_for_a_stop))
    return RunFolder(Path(config.run_dir))


def seconds_of(folder: RunFolder) -> float | None:
    return read_wall_seconds(folder, folder.read_record())


def edit_heartbeat(folder: RunFolder, seconds: float | None) -> None:
    write_artifact(folder.heartbeat, replace(read_artifact(folder.heartbeat, Heartbeat), wall_seconds=seconds))


def test_a_training_takes_its_epochs_and_what_lies_between_them_and_no_more_than_the_call(
    plan, store, splits, make_config
):
    began = monotonic()
    result = fit_fold(plan, store, splits, make_config())
    took, record = monotonic() - began, RunFolder(result.run_dir).read_record()
    assert record.train_seconds + record.validation_seconds < record.wall_seconds <= took + 0.001


def test_a_start_that_goes_on_adds_to_what_the_stopped_one_took(stopped, plan, store, splits, make_config, one_layer):
    before = seconds_of(stopped)
    assert before > 0
    sleep(0.2)
    edit_heartbeat(stopped, 1000 + before)
    began = monotonic()
    fit_fold(plan, store, splits, make_config(), network=one_layer())
    # The time between the two does not count.
    assert 1000 + before < seconds_of(stopped) <= 1000 + before + monotonic() - began + 0.001
    assert read_artifact(stopped.heartbeat, Heartbeat).wall_seconds >= seconds_of(stopped)


def test_a_start_that_was_killed_counts_up_to_its_last_heartbeat(trainings, tmp_path):
    folder = RunFolder(tmp_path / "run")
    process = trainings.start(folder.path)
    while process.is_alive() and not (folder.metrics.is_file() and folder.heartbeat.is_file()):
        sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    said = read_artifact(folder.heartbeat, Heartbeat).wall_seconds
    assert folder.read_record().status == "running"
    assert 0 < said == seconds_of(folder)
    edit_heartbeat(folder, 1000 + said)
    trainings.finish(folder.path)
    assert seconds_of(folder) == folder.read_record().wall_seconds > 1000 + said


def test_what_an_earlier_version_did_not_count_stays_unknown(stopped, plan, store, splits, make_config, one_layer):
    edit_heartbeat(stopped, None)
    fit_fold(plan, store, splits, make_config(), network=one_layer())
    assert stopped.read_record().wall_seconds is None


def test_a_damaged_heartbeat_costs_the_newest_start_alone(stopped, plan, store, splits, make_config, one_layer):
    write_artifact(stopped.record, replace(stopped.read_record(), wall_seconds=1000.0))
    stopped.heartbeat.write_text("{")
    fit_fold(plan, store, splits, make_config(), network=one_layer())
    assert seconds_of(stopped) > 1000
