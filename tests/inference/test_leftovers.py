"""What a killed prediction left half-written is removed by the next one, and what others are writing is not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from torch import Tensor, nn

from pipeline.artifacts import atomic_path
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.leftovers import STALE_SECONDS, TEMPORARY, remove_leftovers
from pipeline.inference.predictor import Predictor
from pipeline.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.artifacts import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1, 1)


def age(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_what_a_kill_left_is_gone_after_the_next_start(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((9, 11, 7), np.float32), np.eye(4)), tmp_path / "in" / "a.nii.gz")
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("a.nii.gz", "records/a.json"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(out / name)], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
    left = [path for path in out.rglob(".*") if path.is_file()]
    assert len(left) == 2
    predictor = Predictor(Constant(), make_plan())
    predict_files(predictor, find_inputs(tmp_path / "in"), out)
    # They are young: somebody may still be writing them.
    assert all(path.is_file() for path in left)
    for path in left:
        age(path, STALE_SECONDS + 60)
    predict_files(predictor, find_inputs(tmp_path / "in"), out)
    assert not any(path.exists() for path in left)
    assert (out / "a.nii.gz").is_file()


@pytest.mark.parametrize(
    "name",
    [
        ".0123abcd.partial.b.nii.gz",  # of another share
        ".0123abcd.partial.a.nii",
        ".0123abcd.old.a.nii.gz",
        "0123abcd.partial.a.nii.gz",
        ".0123ABCD.partial.a.nii.gz",
        ".hidden.nii.gz",
        "a.nii.gz",
    ],
)
def test_files_that_are_not_this_job_s_stay_however_old(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.write_text("of others")
    age(other, 10 * STALE_SECONDS)
    ours = age(_written(tmp_path / ".0123abcd.partial.a.nii.gz"), 10 * STALE_SECONDS)
    remove_leftovers([tmp_path / "a.nii.gz", tmp_path / "folder that is missing" / "a.json"])
    assert other.read_text() == "of others"
    assert not ours.exists()


def _written(path: Path) -> Path:
    path.write_text("half")
    return path


def test_the_pattern_is_that_of_atomic_files(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        found = TEMPORARY.fullmatch(temporary.name)
        temporary.write_text("whole")
    assert found is not None
    assert found["name"] == "a.nii.gz"
    assert re.fullmatch(r"\.[0-9a-f]{8}\.partial\.a\.nii\.gz", temporary.name)
