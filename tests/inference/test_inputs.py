from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.inference.inputs import choose_cases, find_inputs
from pipeline.synthetic import make_synthetic_case, write_msd_dataset


@pytest.fixture
def fill(tmp_path: Path) -> Path:
    """A folder whose files are named in the test; their content does not matter for finding them."""
    return tmp_path / "images"


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def found(path: Path) -> dict[str, list[str]]:
    return {case.case_id: [image.name for image in case.images] for case in find_inputs(path)}


def test_channels_are_grouped_by_their_suffix_in_order(fill: Path) -> None:
    touch(fill, "b_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz", "a_0001.nii", "notes.txt", ".hidden_0000.nii.gz")
    assert found(fill) == {"a": ["a_0000.nii.gz", "a_0001.nii"], "b": ["b_0000.nii.gz", "b_0001.nii.gz"]}


def test_files_without_a_suffix_are_cases_of_one_file(fill: Path) -> None:
    touch(fill, "x.nii.gz", "y_001.nii", "scan_0012.nii.gz", "scan_0013.nii.gz")
    assert found(fill) == {
        "scan_0012": ["scan_0012.nii.gz"],
        "scan_0013": ["scan_0013.nii.gz"],
        "x": ["x.nii.gz"],
        "y_001": ["y_001.nii"],
    }


def test_a_single_file_brings_its_other_channels(fill: Path) -> None:
    touch(fill, "a_0000.nii.gz", "a_0001.nii.gz", "b.nii.gz")
    assert found(fill / "a_0000.nii.gz") == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}
    assert found(fill / "b.nii.gz") == {"b": ["b.nii.gz"]}


def test_a_dataset_gives_training_and_test_cases(tmp_path: Path) -> None:
    cases = {f"c{seed}": make_synthetic_case(seed, shape=(20, 16, 14), num_classes=2) for seed in range(3)}
    root = write_msd_dataset(tmp_path / "set", {"c0": cases["c0"], "c1": cases["c1"]}, test_cases={"c2": cases["c2"]})
    assert list(found(root)) == ["c0", "c1", "c2"]


def test_the_wanted_cases_are_chosen_and_the_missing_named(fill: Path) -> None:
    touch(fill, "c0.nii.gz", "c1.nii.gz", "c2.nii.gz")
    cases = find_inputs(fill)
    assert choose_cases(cases, None, where=fill) == cases
    assert [case.case_id for case in choose_cases(cases, ["c2", "c0"], where=fill)] == ["c0", "c2"]
    with pytest.raises(InputError, match="has no case c8, c9"):
        choose_cases(cases, ["c9", "c1", "c8"], where=fill)


def test_a_missing_channel_is_named_with_its_case(fill: Path) -> None:
    touch(fill, "a_0000.nii.gz", "a_0002.nii.gz")
    with pytest.raises(InputError, match="case a lacks channel 0001"):
        find_inputs(fill)


def test_two_files_of_one_case_and_channel_are_refused(fill: Path) -> None:
    touch(fill, "a.nii.gz", "a.nii")
    with pytest.raises(InputError, match=r"a\.nii and a\.nii\.gz are the same case"):
        find_inputs(fill)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.nii.gz"])
def test_what_does_not_exist_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_inputs(tmp_path / name)


def test_a_folder_that_is_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no images")
    with pytest.raises(InputError):
        find_inputs(tmp_path)


def test_a_table_without_labels_is_enough_to_predict(tmp_path: Path) -> None:
    path = tmp_path / "scans.csv"
    path.write_text("case_id,image_T1,image_T2\nb,b1.nii.gz,b2.nii.gz\na,a1.nii.gz,a2.nii.gz\n")
    cases = find_inputs(path)
    assert [case.case_id for case in cases] == ["a", "b"]
    assert cases[1].images == (tmp_path / "b1.nii.gz", tmp_path / "b2.nii.gz")


def test_a_volume_lying_about_does_not_hide_the_dataset_around_it(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        volume = np.ones((3, 4, 5), np.uint8)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name / "case.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "atlas.nii.gz")
    assert [case.case_id for case in find_inputs(tmp_path)] == ["case"]
