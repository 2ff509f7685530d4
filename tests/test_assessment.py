"""One choice of post-processing for the runs of a cross-validation, from their held-out cases together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline import api
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.cli import main
from pipeline.config import PostprocessConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError
from pipeline.inference.postprocess import Postprocessing
from pipeline.plan import Plan
from pipeline.run_files import RunFiles

AFFINE = np.array([[1.0, 0.1, 0.0, 4.0], [-0.1, 1.19, 0.1, -3.0], [0.0, -0.1, 1.497, 8.0], [0, 0, 0, 1]])
CASES = [f"case_{number}" for number in range(6)]


def write_label(path: Path, *, speck: int = 0) -> None:
    label = np.zeros((20, 18, 16), np.uint8)
    label[2:9, 3:11, 4:12] = 1
    label[14 : 14 + bool(speck), 13:15, 3 : 3 + speck] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, AFFINE), path)


@pytest.fixture
def runs(plan_of: Callable[..., Plan], tmp_path: Path) -> list[Path]:
    """Three folds of two cases each, whose predictions lie in one folder and in each run folder."""
    parts = [CASES[:2], CASES[2:4], CASES[4:]]
    folds = tuple(
        Fold(train=tuple(case for case in CASES if case not in part), validation=tuple(part)) for part in parts
    )
    run_dirs = [tmp_path / f"fold_{fold}" for fold in range(3)]
    for number, (run_dir, part) in enumerate(zip(run_dirs, parts, strict=True)):
        run_dir.mkdir()
        write_artifact(run_dir / "plan.json", plan_of(labels={"background": 0, "organ": 1}))
        write_artifact(run_dir / "splits.json", Splits(folds=folds, seed=0))
        (run_dir / "config.yaml").write_text(f"fold: {number}\n")
        for case_id in part:
            speck = 2 + CASES.index(case_id) % 3
            write_label(tmp_path / "labels" / f"{case_id}.nii.gz")
            write_label(tmp_path / "predictions" / f"{case_id}.nii.gz", speck=speck)
            write_label(run_dir / "validation" / f"{case_id}.nii.gz", speck=speck)
    return run_dirs


def options(run_dirs: Sequence[Path], **changes: str) -> PostprocessConfig:
    labels = str(run_dirs[0].parent / "labels")
    return PostprocessConfig(run_dir=tuple(map(str, run_dirs)), labels=labels, num_workers=1, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("joint", [True, False])
def test_one_choice_by_the_held_out_cases_of_all_folds_goes_into_every_run(runs: list[Path], joint: bool) -> None:
    folder = str(runs[0].parent / "predictions") if joint else ""
    chosen = api.postprocess(options(runs, predictions=folder))
    assert chosen.case_ids == tuple(CASES)
    assert [step.kind for step in chosen.steps] == ["keep_largest"]
    assert {read_artifact(RunFiles(run_dir).postprocessing, Postprocessing) for run_dir in runs} == {chosen}


def test_the_command_takes_several_folders(runs: list[Path], tmp_path: Path) -> None:
    words = ["--run_dir", *map(str, runs[:2]), "--labels", str(tmp_path / "labels"), "--num_workers", "1"]
    assert main(["postprocess", *words, "--predictions", str(tmp_path / "predictions")]) == 0
    assert read_artifact(RunFiles(runs[1]).postprocessing, Postprocessing).case_ids == tuple(CASES[:4])
    assert not RunFiles(runs[2]).postprocessing.exists()


def test_too_few_cases_of_one_fold_are_enough_of_all(runs: list[Path]) -> None:
    with pytest.raises(InputError, match="at least 4 held-out cases, got 2"):
        api.postprocess(options(runs[:1]))
    assert len(api.postprocess(options(runs)).case_ids) == 6


def test_runs_of_other_classes_or_with_the_same_case_twice_are_refused(
    runs: list[Path], plan_of: Callable[..., Plan]
) -> None:
    write_label(runs[2] / "validation" / "case_0.nii.gz")
    with pytest.raises(InputError, match=r"fold_2/validation: case_0 is predicted in .*fold_0/validation as well"):
        api.postprocess(options(runs))
    write_artifact(runs[1] / "plan.json", plan_of(labels={"background": 0, "tumour": 1}))
    with pytest.raises(InputError, match=r"fold_1: has other classes than .*fold_0"):
        api.postprocess(options(runs))
    assert not any(RunFiles(run_dir).postprocessing.exists() for run_dir in runs)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_where_one_folder_cannot_be_written_none_is(runs: list[Path]) -> None:
    runs[2].chmod(0o555)
    with pytest.raises(InputError, match="fold_2: cannot be written to"):
        api.postprocess(options(runs))
    assert not any(RunFiles(run_dir).postprocessing.exists() for run_dir in runs)
