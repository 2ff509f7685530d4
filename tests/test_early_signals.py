"""Signals that come while a command starts: real processes, sent what SLURM sends at a moment that is known.

Where a signal has to come at one line of an import, the process sends it to itself there.
"""

from __future__ import annotations

import configparser
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

ROOT = Path(__file__).resolve().parent.parent
STATUS = ["status", "."]
STOPPED = "stopped; the same command continues the work\n"
# Sends a signal as soon as a module is looked for, in what is to go wrong with it there.
SEND = """
import importlib.abc, os, signal, sys
class Sender(importlib.abc.MetaPathFinder):
    sent = False
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and not Sender.sent:
            Sender.sent = True
            {how}
sys.meta_path.insert(0, Sender())
"""
RUN = """
from pipeline.__main__ import main
sys.exit(main())
"""
KILL = "os.kill(os.getpid(), signal.{name})"
DROPPED = """
            class Dropped:
                def __del__(self):
                    os.kill(os.getpid(), signal.{name})
            Dropped()
"""
TURNED = """
            try:
                os.kill(os.getpid(), signal.{name})
            except BaseException as error:
                raise ImportError("initialization failed") from error
"""


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**known, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run_code(code: str, *arguments: str, folder: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=120, check=False
    )


def sent_at(module: str, *arguments: str, how: str = KILL, name: str = "SIGTERM", **more: str):
    code = SEND.format(module=module, how=how.format(name=name)) + RUN
    return run_code(code, *arguments, **more)


@pytest.fixture(scope="module")
def run_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that imports torch, MONAI's losses and Lightning one after the other before it does anything else."""
    folder = tmp_path_factory.mktemp("planned")
    data = ROOT / "data_samples" / "msd_blobs"
    small = ["--vram", "1GiB", "--base_features", "4", "--max_features", "8", "--patch_size", "16", "16", "16"]
    plan, store = str(folder / "plan.json"), str(folder / "store")
    for command in (
        ["plan", "--dataset", str(data), "--out", plan, *small, "--num_workers", "1"],
        ["preprocess", "--dataset", str(data), "--plan", plan, "--store", store, "--num_workers", "1"],
    ):
        subprocess.run([sys.executable, "-m", "pipeline", *command], cwd=ROOT, env=environment(), check=True)
    return ["train", "--plan", plan, "--store", store, "--run_dir", str(folder / "run"), "--max_epochs", "1"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("module", ["pipeline.cli", "jsonargparse", "yaml", "pipeline.requeue", "pipeline.api"])
def test_a_signal_during_the_first_imports_ends_with_75(module: str, name: str) -> None:
    done = sent_at(module, *STATUS, name=name)
    assert (done.returncode, done.stderr, done.stdout) == (75, STOPPED, "")


@pytest.mark.parametrize(
    "module",
    ["pipeline.training.trainer", "torch", "torch._C", "torch.nn.modules.conv", "pytorch_lightning.trainer.trainer"],
)
def test_a_signal_while_a_large_library_is_imported_ends_with_75(module: str, run_arguments: list[str]) -> None:
    done = sent_at(module, *run_arguments)
    assert done.returncode == 75, done.stderr
    assert done.stderr.endswith(STOPPED)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["jsonargparse", "torch.nn.modules.conv", "pytorch_lightning.trainer.trainer"])
def test_a_stop_is_raised_between_imports_and_not_where_it_would_be_dropped(
    module: str, run_arguments: list[str]
) -> None:
    """As in callbacks of the garbage collector, whose exceptions Python prints and forgets, or in C++, which aborts."""
    done = sent_at(module, *run_arguments, how=DROPPED)
    assert "Exception ignored in" not in done.stderr
    assert (done.returncode, done.stderr.endswith(STOPPED)) == (75, True), done.stderr


def test_a_stop_in_a_module_that_imports_nothing_more_is_raised_once_that_is_imported(tmp_path: Path) -> None:
    code = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "last_one.py").write_text(
        f"{code}for _ in range(20):\n    time.sleep(0.01)\nprint('whole', flush=True)\n"
    )
    code = "import time\nfrom pipeline.stop_signals import stop_signals_raised\nwith stop_signals_raised():\n"
    code += "    import last_one\n    print('imported', flush=True)\n    time.sleep(60)\n"
    done = run_code(code, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert "StopSignal: 15" in done.stderr
    assert done.stdout.startswith("whole\n")
    # What caught it may import again, and no alarm is left.
    code = "import signal, sys\n" + code.replace("with stop", "try:\n  with stop").replace("\n    ", "\n      ")
    code += "except KeyboardInterrupt:\n    import json.tool\n    print(signal.getitimer(signal.ITIMER_REAL))\n"
    done = run_code(code, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "(0.0, 0.0)"), done.stderr


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.api", "torch.nn.modules.conv"])
def test_a_stop_that_becomes_another_error_is_a_stop(module: str, run_arguments: list[str]) -> None:
    """As in modules that are written in C++, which fail with an ImportError of their own."""
    done = sent_at(module, *run_arguments, how=TURNED)
    assert (done.returncode, done.stderr) == (75, STOPPED)


def test_a_stop_that_was_dropped_in_the_last_import_ends_a_training_at_its_first_step(
    run_arguments: list[str], tmp_path: Path
) -> None:
    drop = "\nimport pipeline.training.trainer as trainer\nreal = trainer.fit_fold\ndef fit_fold(*given, **named):\n"
    drop += "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n    except KeyboardInterrupt:\n        pass\n"
    code = f"import os, signal, sys{drop}    return real(*given, **named)\ntrainer.fit_fold = fit_fold\n{RUN}"
    arguments = [str(tmp_path / "run") if word.endswith("/run") else word for word in run_arguments]
    done = run_code(code, *arguments)
    assert done.returncode == 75, done.stderr
    assert "stopped on request" in done.stderr
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_ctrl_c_during_the_first_imports_ends_with_75_and_asks_slurm_for_nothing(tmp_path: Path) -> None:
    done = sent_at("jsonargparse", *STATUS, name="SIGINT", **fake_slurm(tmp_path))
    assert (done.returncode, done.stderr) == (75, STOPPED)
    assert not (tmp_path / "asked").exists()


def test_a_job_that_is_stopped_while_it_starts_is_queued_again(tmp_path: Path) -> None:
    done = sent_at("jsonargparse", *STATUS, **fake_slurm(tmp_path))
    assert done.returncode == 75
    assert (tmp_path / "asked").read_text().splitlines() == ["show job --oneliner 7", "requeue 7"]


def fake_slurm(folder: Path) -> dict[str, str]:
    """What makes a process a SLURM job whose `scontrol` notes what it is asked."""
    script = folder / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n[ "$1" = requeue ] || echo "JobState=RUNNING Requeue=1"\n'
    )
    script.chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_nothing_that_takes_time_is_imported_before_signals_are_listened_to() -> None:
    code = (
        "import signal, sys\nbefore, real = set(sys.modules), signal.signal\n"
        "def watched(number, handler):\n"
        "    if number == signal.SIGTERM:\n        print(*sorted(set(sys.modules) - before)); sys.exit()\n"
        "    return real(number, handler)\n"
        "signal.signal = watched\n" + RUN
    )
    imported = set(run_code(code, *STATUS).stdout.split())
    ours = {name for name in imported if name.startswith("pipeline")}
    assert ours == {"pipeline", "pipeline.__main__", "pipeline.stop_signals"}
    assert {name.split(".")[0] for name in imported - ours} <= sys.stdlib_module_names
    assert not imported & {"importlib.metadata", "dataclasses", "inspect", "json", "logging", "subprocess"}


def test_the_installed_command_and_the_module_begin_at_the_same_place() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "voxfit = pipeline.__main__:main"


def listens(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler of its own for a signal, as the kernel knows it."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here to see who listens to what")
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3, 1.0])
def test_a_signal_at_any_time_after_the_start_ends_with_75(pause: float, run_arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline", *run_arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not listens(process, signal.SIGTERM):
        assert process.poll() is None, process.stderr.read()
    sleep(pause)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
