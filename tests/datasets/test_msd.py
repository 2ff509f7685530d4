from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.datasets.dataset import read_case_image, read_dataset
from pipeline.errors import InputError

LABELS = {"0": "background", "1": "organ"}


def test_entries_are_read_with_paths_relative_to_the_file(msd: Path) -> None:
    dataset = read_dataset(msd)
    assert dataset.name == "Toy"
    assert [case.case_id for case in dataset.cases] == ["a", "b", "c", "d"]
    assert dataset.cases[0].images == (msd / "imagesTr/a.nii.gz",)
    assert dataset.cases[0].label == msd / "labelsTr/a.nii.gz"
    assert dataset.test_cases[0].images == (msd / "imagesTs/t.nii.gz",)
    assert dataset.test_cases[0].label is None


def test_a_4d_image_holds_its_channels(
    tmp_path: Path, save: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    voxels = np.random.default_rng(0).normal(size=(6, 5, 4, 2)).astype(np.float32)
    save(tmp_path / "imagesTr/p.nii.gz", voxels)
    save(tmp_path / "labelsTr/p.nii.gz", np.ones((6, 5, 4), np.uint8))
    content = {"labels": LABELS, "modality": {"0": "T2", "1": "ADC"}, "training": [_entry("p")]}
    write_json(tmp_path / "dataset.json", content)
    dataset = read_dataset(tmp_path)
    assert dataset.channel_names == ("T2", "ADC")
    np.testing.assert_array_equal(read_case_image(dataset.cases[0]).array, np.moveaxis(voxels, -1, 0))


def test_channels_without_names_are_counted_in_the_file(
    tmp_path: Path, save: Callable[..., Path], write_json: Callable[..., Path]
) -> None:
    save(tmp_path / "imagesTr/p.nii.gz", np.ones((6, 5, 4, 3), np.float32))
    write_json(tmp_path / "dataset.json", {"labels": LABELS, "training": [_entry("p")]})
    assert read_dataset(tmp_path).channel_names == ("channel_0", "channel_1", "channel_2")


def test_nnunet_v1_lists_the_name_without_the_channel(msd: Path, write_json: Callable[..., Path]) -> None:
    (msd / "imagesTr/a.nii.gz").rename(msd / "imagesTr/a_0000.nii.gz")
    (msd / "imagesTr/b.nii.gz").rename(msd / "imagesTr/a_0001.nii.gz")
    modality = {"0": "T1", "1": "T2"}
    write_json(msd / "dataset.json", {"labels": LABELS, "modality": modality, "training": [_entry("a")]})
    (case,) = read_dataset(msd).cases
    assert case.case_id == "a"
    assert [path.name for path in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


def test_a_list_of_files_is_one_file_per_channel(msd: Path, write_json: Callable[..., Path]) -> None:
    entry = {"image": ["imagesTr/a.nii.gz", "imagesTr/b.nii.gz"], "label": "labelsTr/a.nii.gz", "fold": 3}
    path = write_json(msd / "mine.json", {"labels": LABELS, "training": [entry | {"patient": "P1"}]})
    dataset = read_dataset(path)
    assert (dataset.name, dataset.cases[0].patient, len(dataset.cases[0].images)) == ("mine", "P1", 2)
    assert dataset.channel_names == ("channel_0", "channel_1")


def test_a_bare_list_is_a_dataset_whose_classes_are_discovered(msd: Path, write_json: Callable[..., Path]) -> None:
    dataset = read_dataset(write_json(msd / "list.json", [_entry("a"), _entry("c")]))
    assert [case.case_id for case in dataset.cases] == ["a", "c"]
    assert dataset.labels == {"background": 0, "class_1": 1, "class_2": 2}
    assert dataset.unlisted_files == ()


def test_names_that_repeat_in_folders_become_ids_with_the_folder(
    tmp_path: Path, write_json: Callable[..., Any]
) -> None:
    entries = [{"image": f"p{n}/t1.nii.gz", "label": f"p{n}/seg.nii.gz"} for n in (1, 2)]
    dataset = read_dataset(write_json(tmp_path / "list.json", {"labels": LABELS, "training": entries}))
    assert [case.case_id for case in dataset.cases] == ["p1_t1", "p2_t1"]


def test_a_case_given_twice_is_refused_by_name(msd: Path, write_json: Callable[..., Path]) -> None:
    write_json(msd / "dataset.json", {"labels": LABELS, "training": [_entry("a"), _entry("b"), _entry("a")]})
    with pytest.raises(InputError, match=r"used twice: imagesTr_a\b"):
        read_dataset(msd)


def test_a_missing_label_keeps_the_case(msd: Path, write_json: Callable[..., Path]) -> None:
    write_json(msd / "dataset.json", {"labels": LABELS, "training": [{"image": "imagesTr/a.nii.gz"}]})
    assert read_dataset(msd).cases[0].label is None


def test_files_left_by_macos_are_no_cases(msd: Path, write_json: Callable[..., Path]) -> None:
    (msd / "imagesTr/._a.nii.gz").touch()
    write_json(msd / "dataset.json", {"labels": LABELS, "training": [_entry(name) for name in ("a", "._a")]})
    dataset = read_dataset(msd)
    assert [case.case_id for case in dataset.cases] == ["a"]
    assert not [path for path in dataset.unlisted_files if path.name.startswith(".")]


def test_files_beside_the_list_are_named(msd: Path, write_json: Callable[..., Path]) -> None:
    write_json(msd / "dataset.json", {"labels": LABELS, "training": [_entry("a")]})
    names = [str(path.relative_to(msd)) for path in read_dataset(msd).unlisted_files]
    assert names == [f"{folder}/{name}.nii.gz" for folder in ("imagesTr", "labelsTr") for name in "bcd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": "imagesTr"}, "training: input should be a valid array"),
        ({"training": [{"label": "x.nii.gz"}]}, r"training\.0\.image: missing"),
        ({"training": []}, "lists no case"),
        ({"labels": ["background", "organ"]}, "labels: "),
        ({"labels": {"0": "background", "1": ["a"]}}, r"labels\.1: overlapping regions"),
        ({"labels": {"0": "background", "1": "organ", "2": "organ"}}, "same names twice: organ"),
        ({"labels": {"0": "background"}}, "no class beside the background"),
        ({"labels": {"0": "background", "organ": 1.5}}, r"labels\.organ: .*1\.5"),
        ({"labels": {"0": "background", "organ": -1}}, r"labels\.organ: .*-1"),
        ({"modality": {"1": "CT", "2": "PET"}}, "numbered from 0"),
        ({"training": [{"image": "a.mha", "label": "a.nii.gz"}]}, r"a\.mha is no NIfTI"),
        ({"training": [{"image": "a.nii.gz", "case_id": "../a"}]}, r"cannot be file names: '\.\./a'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_key(
    msd: Path, write_json: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    write_json(msd / "dataset.json", {"labels": LABELS, "training": [_entry("a")]} | change)
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(msd)
    assert "dataset.json" in str(caught.value)


def _entry(name: str) -> dict[str, str]:
    return {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
