"""Signals to whole commands: each stage of `voxfit run` ends with 75 and is gone on with by the same command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_samples" / "msd_blobs"
RUN = [
    *("--dataset", str(SAMPLE), "--vram", "2GiB", "--max_epochs", "2", "--num_workers", "2"),
    *("--train.iterations_per_epoch", "2", "--train.num_folds", "3", "--train.hardware.accelerator", "cpu"),
    *("--train.hardware.num_workers", "1", "--plan.base_features", "4", "--plan.max_features", "8"),
    *("--plan.patch_size", "16", "16", "16"),
]


def start(work_dir: Path) -> subprocess.Popen[str]:
    """The command as a process group of its own, as a job is."""
    command = [sys.executable, "-m", "pipeline", "run", *RUN, "--work_dir", str(work_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def is_ready(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a signal has a handler: before that, while Python itself starts, nothing can be done about one."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def stop(process: subprocess.Popen[str], seen: Path, number: int) -> tuple[int, str, float]:
    """Exit code, errors and seconds until the end after a signal to the group once a file is there."""
    # A file may be there from the start before.
    while not (list(seen.parent.glob(seen.name)) and is_ready(process, number)):
        assert process.poll() is None, process.stderr.read()
        sleep(0.01)
    asked = monotonic()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, monotonic() - asked


@pytest.mark.timeout(240)
def test_a_run_is_stopped_in_every_stage_and_ends_well(tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    # While it starts, when the plan is there, when the store is filled, while it trains, when it predicts.
    stages = ("config.yaml", "plan.json", "store/*", "fold_0/metrics.csv", "fold_0/validation")
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
    for stage, number in zip(stages, signals, strict=True):
        code, errors, seconds = stop(start(work_dir), work_dir / stage, number)
        assert code == 75, (stage, errors)
        assert "Traceback" not in errors
        assert seconds < 20
    process = start(work_dir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (work_dir / "fold_0" / "report.html").is_file()
