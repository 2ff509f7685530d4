"""Job scripts of an example as text, and the environment in which jobs find this checkout's `voxfit`."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.config import SlurmConfig
from pipeline.job_scripts.writing import render_scripts

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts" / "slurm"
JOBS = ("preprocess", "verify", "train", "predict", "evaluate")


def load_examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_examples", EXAMPLES / "make_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_examples()
PLAN, SIZES = MAKER.example_plan(), MAKER.SIZES


def scripts(**options: object) -> dict[str, str]:
    config = SlurmConfig(**{"dataset": "data", "plan": "work/plan.json", "work_dir": "work", **options})  # type: ignore[arg-type]
    return render_scripts(config, PLAN, SIZES, num_folds=5 if config.num_folds == "auto" else config.num_folds)


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def command(script: str, task: str = "1") -> list[str]:
    """The words of the command that a script ends with, as the shell makes them for an array task."""
    last = script.split("\nexec ", 1)[1]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {last}"],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": task},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip("\0").split("\0")


def gib(memory: str) -> int:
    return int(memory.removesuffix("G"))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """As in an activated environment on a login node; SLURM hands it on to the jobs."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**known, **paths, "OMP_NUM_THREADS": "1"}
