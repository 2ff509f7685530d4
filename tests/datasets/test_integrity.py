from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.datasets import workers
from pipeline.datasets.case_checks import Findings, image_is_usable
from pipeline.datasets.dataset import read_dataset
from pipeline.datasets.integrity import Problem, find_problems
from pipeline.io.nifti import read_volume

Save = Callable[..., Path]
SHAPE = (9, 7, 5)


def _found(path: Path) -> list[tuple[str, str]]:
    return [(problem.case_id, problem.kind) for problem in find_problems(read_dataset(path), num_workers=1)]


def _messages(path: Path) -> str:
    return "\n".join(problem.message for problem in find_problems(read_dataset(path), num_workers=1))


def _label(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, SHAPE, dtype=np.uint8)


def test_good_cases_have_no_problems(msd: Path) -> None:
    assert _found(msd) == []


def test_every_bad_case_is_named_whatever_the_others_have(msd: Path, save: Save) -> None:
    (msd / "imagesTr/a.nii.gz").unlink()
    (msd / "labelsTr/b.nii.gz").write_bytes((msd / "labelsTr/b.nii.gz").read_bytes()[:-30])
    save(msd / "imagesTr/c.nii.gz", np.full(SHAPE, np.nan, np.float32))
    save(msd / "labelsTr/d.nii.gz", np.zeros(SHAPE, np.uint8))
    assert _found(msd) == [
        ("a", "missing_image"),
        ("b", "unreadable_label"),
        ("c", "non_finite_image"),
        ("d", "empty_label"),
    ]


def test_one_case_can_have_many_problems(msd: Path, save: Save) -> None:
    image, label = np.ones((*SHAPE, 2), np.float32), np.full((9, 7, 4), 7, np.uint8)
    image[2, 1, 3, 1] = np.inf
    save(msd / "imagesTr/a.nii.gz", image)
    save(msd / "labelsTr/a.nii.gz", label)
    assert _found(msd) == [
        ("a", kind)
        for kind in ("channel_count", "constant_channel", "non_finite_image", "undeclared_label", "shape_mismatch")
    ]
    text = _messages(msd)
    assert "has 2 channel(s), the dataset declares 1" in text
    assert "channel 0 is 1 everywhere" in text
    assert "channel 1 has 1 voxel(s) that are NaN or infinite" in text
    assert "7 (252 voxels)" in text
    assert "label has 9 x 7 x 4 voxels, the image 9 x 7 x 5" in text


@pytest.mark.parametrize("kept", [0, 3, 60, 200])
def test_a_truncated_file_is_unreadable_at_any_length(msd: Path, kept: int) -> None:
    path = msd / "imagesTr/a.nii.gz"
    path.write_bytes(path.read_bytes()[:kept])
    assert _found(msd) == [("a", "unreadable_image")]
    assert "a.nii.gz" in _messages(msd)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_label_with_fractions_is_named(msd: Path, save: Save, value: float) -> None:
    label = _label(9).astype(np.float32)
    label[1, 2, 3] = value
    save(msd / "labelsTr/a.nii.gz", label)
    assert _found(msd) == [("a", "unreadable_label")]
    assert "whole numbers" in _messages(msd)


def test_a_shifted_label_is_named_with_the_distance(msd: Path, save: Save, oblique: NDArray[np.float64]) -> None:
    shifted = oblique.copy()
    shifted[:3, 3] += [3, 0, 4]
    save(msd / "labelsTr/a.nii.gz", _label(9), shifted)
    assert _found(msd) == [("a", "affine_mismatch")]
    assert "up to 5 mm away" in _messages(msd)


def test_a_label_in_another_axis_order_is_no_problem(msd: Path) -> None:
    path = msd / "labelsTr/a.nii.gz"
    turned = nib.load(path).as_reoriented([[2, -1], [0, 1], [1, -1]])
    path.unlink()
    nib.save(turned, path)
    assert _found(msd) == []


def test_a_copied_label_is_named_for_both_cases(msd: Path) -> None:
    shutil.copy(msd / "labelsTr/c.nii.gz", msd / "labelsTr/a.nii.gz")
    assert _found(msd) == [("a", "duplicate_label"), ("c", "duplicate_label")]
    assert "same as that of c (byte for byte)" in _messages(msd)
    assert "same as that of a (byte for byte)" in _messages(msd)


def test_a_label_copied_into_another_file_type_and_axis_order_is_found(msd: Path) -> None:
    image = nib.load(msd / "labelsTr/c.nii.gz")
    other = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float64), image.affine)
    (msd / "labelsTr/a.nii.gz").unlink()
    nib.save(other.as_reoriented([[1, 1], [0, -1], [2, 1]]), msd / "labelsTr/a.nii.gz")
    assert _found(msd) == [("a", "duplicate_label"), ("c", "duplicate_label")]
    assert "voxel for voxel, in another file" in _messages(msd)


def test_empty_labels_are_not_called_copies_of_each_other(msd: Path, save: Save) -> None:
    for name in "ab":
        save(msd / f"labelsTr/{name}.nii.gz", np.zeros(SHAPE, np.uint8))
    assert _found(msd) == [("a", "empty_label"), ("b", "empty_label")]


def test_a_copied_image_is_named_for_all_its_cases(msd: Path) -> None:
    packed = (msd / "imagesTr/b.nii.gz").read_bytes()
    (msd / "imagesTr/c.nii.gz").write_bytes(packed)
    # The same volume, compressed anew: other bytes, the same voxels.
    (msd / "imagesTr/d.nii.gz").write_bytes(gzip.compress(gzip.decompress(packed), compresslevel=1))
    assert _found(msd) == [(name, "duplicate_image") for name in "bcd"]
    assert "same as that of c, d (voxel for voxel" in _messages(msd)


def test_files_that_no_case_uses_are_warnings(msd: Path, save: Save) -> None:
    save(msd / "labelsTr/lonely.nii.gz", _label(9))
    (problem,) = find_problems(read_dataset(msd), num_workers=1)
    assert (problem.case_id, problem.kind, problem.is_warning) == ("lonely", "unlisted_file", True)
    assert problem.message.endswith("labelsTr/lonely.nii.gz")
    assert not Problem(case_id="a", kind="missing_label", message="").is_warning


def test_processes_find_what_one_process_finds(msd: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(msd / "labelsTr/d.nii.gz", np.zeros(SHAPE, np.uint8))
    (msd / "imagesTr/a.nii.gz").write_bytes(b"torn")
    alone = find_problems(read_dataset(msd), num_workers=2)
    monkeypatch.setattr(workers, "FEW_BYTES", 0)
    assert find_problems(read_dataset(msd), num_workers=2) == alone
    assert len(alone) == 2


def test_memory_limits_the_workers(msd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for case in read_dataset(msd).cases for path in case.images]
    monkeypatch.setattr(workers, "FEW_BYTES", 0)
    assert workers.sensible_workers(files, 6) == 6
    monkeypatch.setattr(workers, "allotted_memory_bytes", lambda: 3 * workers.BYTES_PER_VOXEL * 9 * 7 * 5 / 0.8)
    assert workers.sensible_workers(files, 6) == 3
    monkeypatch.setattr(workers, "allotted_memory_bytes", lambda: 1)
    assert workers.sensible_workers(files, 6) == 1


class TestRealData:
    def test_clean_hippocampus_has_no_problems(self, shared_data: Path) -> None:
        assert find_problems(read_dataset(shared_data / "hippocampus"), num_workers=1) == ()

    def test_all_three_dirty_cases_are_named_among_clean_ones(self, shared_data: Path, tmp_path: Path) -> None:
        clean, dirty = shared_data / "hippocampus", shared_data / "hippocampus_dirty"
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir()
            for path in [*(clean / f"{folder}Tr").glob("*_01*"), *(dirty / folder).iterdir()]:
                (tmp_path / folder / path.name).symlink_to(path)
        assert _found(tmp_path) == [
            ("hippocampus_010", "missing_image"),
            ("hippocampus_010", "duplicate_label"),
            ("hippocampus_011", "duplicate_label"),
            ("hippocampus_118", "missing_label"),
            ("hippocampus_281", "missing_image"),
        ]

    def test_labels_of_others_are_named_when_they_have_an_image(self, shared_data: Path, tmp_path: Path) -> None:
        images = shared_data / "hippocampus/imagesTr"
        labels = shared_data / "hippocampus_dirty/labels"
        rows = [
            ("hippocampus_010", images / "hippocampus_003.nii.gz", labels / "hippocampus_010.nii.gz"),
            ("hippocampus_011", *_pair(shared_data, "hippocampus_011")),
            ("hippocampus_118", shared_data / "hippocampus_dirty/images/hippocampus_118.nii.gz", ""),
            ("hippocampus_281", images / "hippocampus_004.nii.gz", labels / "hippocampus_281.nii.gz"),
        ]
        table = tmp_path / "mixed.csv"
        table.write_text("case_id,image,label\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
        problems = find_problems(read_dataset(table), num_workers=1)
        assert [(problem.case_id[-3:], problem.kind) for problem in problems] == [
            ("010", "shape_mismatch"),
            ("010", "duplicate_label"),
            ("011", "duplicate_label"),
            ("118", "missing_label"),
            ("281", "shape_mismatch"),
        ]
        assert "512 x 512 x 94" in problems[-1].message


def _pair(shared_data: Path, case_id: str) -> tuple[Any, Any]:
    root = shared_data / "hippocampus"
    return root / f"imagesTr/{case_id}.nii.gz", root / f"labelsTr/{case_id}.nii.gz"


def test_a_channel_that_was_not_taken_is_a_warning_and_an_image_without_content_is_not(msd: Path, save: Save) -> None:
    channels = np.zeros((*SHAPE, 2), np.float32)
    channels[..., 0] = np.random.default_rng(0).normal(size=SHAPE)
    path = save(msd / "two.nii.gz", channels)
    findings = Findings("a")
    assert image_is_usable(read_volume(path), 2, findings)
    assert [(problem.kind, problem.is_warning) for problem in findings.problems] == [("constant_channel", True)]
    findings = Findings("b")
    image_is_usable(read_volume(save(msd / "one.nii.gz", np.zeros(SHAPE, np.float32))), 1, findings)
    assert [(problem.kind, problem.is_warning) for problem in findings.problems] == [("constant_image", False)]
