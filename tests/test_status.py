"""`voxfit status`: what is said of a training from the files that it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from pipeline.artifacts import write_artifact
from pipeline.cli import main
from pipeline.config import StatusConfig
from pipeline.errors import InputError
from pipeline.status import Heartbeat, read_status


def beat(folder: Path, *, age: float = 0.0, **facts) -> Path:
    """A heartbeat of this process, unless said otherwise."""
    said = datetime.now(timezone.utc) - timedelta(seconds=age)
    counts = {"epoch": 3, "max_epochs": 10, "iteration": 31, "optimizer_step": 15, "total_steps": 50}
    defaults = {"phase": "forward", "seconds_per_step": 2.0, "eta_seconds": 70.0, "time": said.isoformat()}
    write_artifact(folder / "heartbeat.json", Heartbeat(**{**counts, **defaults, **facts}))
    return folder


def state_of(folder: Path) -> str:
    (run,) = read_status(StatusConfig(path=str(folder))).runs
    return run.state


def test_a_training_that_spoke_of_late_is_alive_here_and_elsewhere(tmp_path):
    assert state_of(beat(tmp_path)) == "alive"
    assert state_of(beat(tmp_path, host="elsewhere", pid=1, age=60)) == "alive"


def test_one_that_is_silent_for_long_is_stale_but_not_within_a_long_step(tmp_path):
    assert state_of(beat(tmp_path, host="elsewhere", age=600)) == "stale"
    assert state_of(beat(tmp_path, host="elsewhere", age=600, seconds_per_step=200.0)) == "alive"


def test_one_whose_process_is_gone_from_this_machine_was_killed_also_when_another_has_its_number(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert state_of(beat(tmp_path, pid=process.pid, age=-1)) == "alive"
        assert state_of(beat(tmp_path, pid=process.pid, age=3600)) == "killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert state_of(beat(tmp_path, pid=process.pid, age=-1)) == "killed"


@pytest.mark.parametrize("word", ["stopped", "failed"])
def test_last_words_are_believed(tmp_path, word):
    assert state_of(beat(tmp_path, phase=word, age=10**6)) == word


def test_a_work_folder_with_several_folds_is_shown_with_a_line_for_each(tmp_path, capsys, record_of):
    for fold, facts in enumerate(({}, {"phase": "stopped"}, {"phase": "finished"})):
        beat(tmp_path / f"fold_{fold}", **facts)
    for fold, status in ((2, "finished"), (3, "running")):
        write_artifact(tmp_path / f"fold_{fold}" / "run.json", record_of(status=status))
    (tmp_path / "store").mkdir()
    assert main(["status", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "fold_" in line]
    words = ("alive", "stopped", "finished", "not started")
    assert all(
        f"fold_{fold}" in line and word in line for fold, (line, word) in enumerate(zip(lines, words, strict=True))
    )
    assert "3 of 10" in lines[0]
    assert "1m10s" in lines[0]
    assert str(os.getpid()) in lines[0]
    assert main(["status", str(tmp_path), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in runs] == list(words)
    assert runs[0]["heartbeat"]["optimizer_step"] == 15


def test_a_damaged_record_does_not_hide_what_the_heartbeat_says(tmp_path):
    (beat(tmp_path, phase="stopped") / "run.json").write_text('{"status": "fini')
    assert state_of(tmp_path) == "stopped"


def test_a_folder_without_a_training_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no training"):
        read_status(StatusConfig(path=str(tmp_path / "nowhere")))


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path, capsys):
    (tmp_path / "lr [red]").mkdir()
    beat(tmp_path / "lr [red]", phase="finished")
    assert main(["status", str(tmp_path)]) == 0
    assert "[red]" in capsys.readouterr().out
