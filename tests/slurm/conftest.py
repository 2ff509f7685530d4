"""The environment in which jobs find this checkout's `voxfit`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """As in an activated environment on a login node; SLURM hands it on to the jobs."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**known, **paths, "OMP_NUM_THREADS": "1"}
