"""What is asked of SLURM when a job was stopped before it was done; `scontrol` here notes what it is asked."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import StoppedError
from pipeline.requeue import requeue_after

SCONTROL = """#!/bin/sh
echo "$@" >> {asked}
case "$1" in
  show) echo "JobId=7 JobState={state} Reason=None Requeue={allowed} Restarts=0";;
  requeue) {requeue};;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch, caplog):
    """Makes this a SLURM job; gives what SLURM is asked for."""
    caplog.set_level(logging.INFO, "voxfit")
    asked = tmp_path / "asked"
    asked.write_text("")

    def make(*, state: str = "RUNNING", allowed: int = 1, requeue: str = "true", **environment: str):
        script = tmp_path / "scontrol"
        script.write_text(SCONTROL.format(asked=asked, state=state, allowed=allowed, requeue=requeue))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID", "PROCID"):
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        return lambda: [line for line in asked.read_text().splitlines() if line.startswith("requeue")]

    return make


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_its_scheduler_stopped_is_queued_again(slurm, number, caplog):
    asked = slurm(JOB_ID="7")
    assert requeue_after(number)
    assert asked() == ["requeue 7"]
    assert "job 7: queued again" in caplog.text


def test_signals_are_listened_to_again_once_slurm_was_asked(slurm):
    slurm(JOB_ID="7")
    before = signal.getsignal(signal.SIGTERM)
    assert before is not signal.SIG_IGN
    assert requeue_after(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_task_of_an_array_is_named_as_such(slurm):
    asked = slurm(JOB_ID="9", ARRAY_JOB_ID="7", ARRAY_TASK_ID="2")
    assert requeue_after(signal.SIGTERM)
    assert asked() == ["requeue 7_2"]


@pytest.mark.parametrize(
    ("number", "environment", "facts"),
    [
        (signal.SIGINT, {"JOB_ID": "7"}, {}),
        (0, {"JOB_ID": "7"}, {}),
        (signal.SIGTERM, {}, {}),
        (signal.SIGTERM, {"JOB_ID": "7", "PROCID": "1"}, {}),
        (signal.SIGTERM, {"JOB_ID": "7"}, {"state": "CANCELLED"}),
        (signal.SIGTERM, {"JOB_ID": "7"}, {"allowed": 0}),
        (signal.SIGTERM, {"JOB_ID": "7; rm -r"}, {}),
    ],
)
def test_nobody_asks_for_a_job_that_a_person_ended_or_that_may_not_come_again(slurm, number, environment, facts):
    asked = slurm(**facts, **environment)
    assert not requeue_after(number)
    assert asked() == []


def test_what_slurm_says_against_it_is_said(slurm, caplog):
    slurm(JOB_ID="7", requeue="echo Access/permission denied >&2; exit 1")
    assert not requeue_after(signal.SIGTERM)
    assert "job 7: could not be queued again (Access/permission denied)" in caplog.text


def test_without_scontrol_it_is_said_too(slurm, caplog, tmp_path, monkeypatch):
    slurm(JOB_ID="7")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert not requeue_after(signal.SIGUSR1)
    assert "could not be queued again" in caplog.text


def test_the_command_asks_once_after_a_training_that_a_signal_stopped(slurm, monkeypatch, tmp_path: Path, capsys):
    def stopped(*_):
        raise StoppedError("stopped on request in epoch 2 (SIGUSR1)", signal=signal.SIGUSR1)

    asked = slurm(JOB_ID="7")
    monkeypatch.setattr("pipeline.api.status", stopped)
    assert main(["status", str(tmp_path)]) == 75
    assert asked() == ["requeue 7"]
    assert "stopped: stopped on request in epoch 2" in capsys.readouterr().err
