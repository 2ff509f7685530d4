from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.datasets.dataset import read_dataset
from pipeline.datasets.integrity import find_problems
from pipeline.errors import InputError


@pytest.fixture
def raw(tmp_path: Path, save_pair: Callable[..., Any], write_json: Callable[..., Path]) -> Path:
    """Cases s_1 and s_2 with two channels each."""
    for seed, (case_id, channel) in enumerate([("s_1", 0), ("s_1", 1), ("s_2", 0), ("s_2", 1)]):
        image = tmp_path / f"imagesTr/{case_id}_{channel:04d}.nii.gz"
        save_pair(image, tmp_path / f"labelsTr/{case_id}.nii.gz", seed=seed)
    content = {
        "channel_names": {"1": "PET", "0": "CT"},
        "labels": {"background": 0, "x": 1, "y": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    write_json(tmp_path / "dataset.json", content)
    return tmp_path


def _change(raw: Path, **changes: Any) -> None:
    path = raw / "dataset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_channels_are_gathered_in_order_and_labels_paired(raw: Path) -> None:
    dataset = read_dataset(raw)
    assert dataset.channel_names == ("CT", "PET")
    assert dataset.cases[1].images == (raw / "imagesTr/s_2_0000.nii.gz", raw / "imagesTr/s_2_0001.nii.gz")
    assert dataset.cases[1].label == raw / "labelsTr/s_2.nii.gz"
    assert find_problems(dataset, num_workers=1) == ()


def test_the_old_key_modality_names_channels_too(raw: Path) -> None:
    _change(raw, channel_names=None, modality={"0": "T1", "1": "T2"})
    assert read_dataset(raw).channel_names == ("T1", "T2")


def test_the_ignore_label_is_no_class(raw: Path) -> None:
    _change(raw, labels={"background": 0, "x": 1, "ignore": 2})
    dataset = read_dataset(raw)
    assert (dataset.labels, dataset.ignore_value) == ({"background": 0, "x": 1}, 2)
    assert find_problems(dataset, num_workers=1) == ()


def test_a_label_with_nothing_but_ignored_voxels_is_empty(raw: Path, save: Callable[..., Path]) -> None:
    save(raw / "labelsTr/s_1.nii.gz", np.full((9, 7, 5), 2, np.uint8))
    _change(raw, labels={"background": 0, "x": 1, "ignore": 2})
    (problem,) = find_problems(read_dataset(raw), num_workers=1)
    assert (problem.case_id, problem.kind) == ("s_1", "empty_label")


def test_overlapping_regions_are_refused_clearly(raw: Path) -> None:
    _change(raw, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    with pytest.raises(InputError, match=r"labels\.whole: overlapping regions .* not supported yet"):
        read_dataset(raw)


def test_cases_may_be_listed_with_their_files(raw: Path) -> None:
    entry = {"images": ["imagesTr/s_1_0000.nii.gz", "imagesTr/s_1_0001.nii.gz"], "label": "labelsTr/s_1.nii.gz"}
    _change(raw, dataset={"mine": entry})
    dataset = read_dataset(raw)
    assert [case.case_id for case in dataset.cases] == ["mine"]
    assert {path.name for path in dataset.unlisted_files} == {"s_2_0000.nii.gz", "s_2_0001.nii.gz", "s_2.nii.gz"}


def test_missing_pairs_and_channels_are_all_found(raw: Path) -> None:
    (raw / "imagesTr/s_1_0001.nii.gz").rename(raw / "imagesTr/s_3_0000.nii.gz")
    (raw / "labelsTr/s_2.nii.gz").rename(raw / "labelsTr/s_4.nii.gz")
    found = {(problem.case_id, problem.kind) for problem in find_problems(read_dataset(raw), num_workers=1)}
    assert found == {
        ("s_1", "missing_image"),
        ("s_2", "missing_label"),
        ("s_3", "missing_image"),
        ("s_3", "missing_label"),
        ("s_4", "missing_image"),
    }


def test_test_images_are_cases_to_predict(raw: Path, save_pair: Callable[..., Any]) -> None:
    for channel in range(2):
        save_pair(raw / f"imagesTs/t_{channel:04d}.nii.gz", raw / "other/t.nii.gz", seed=channel)
    (case,) = read_dataset(raw).test_cases
    assert (case.case_id, len(case.images), case.label) == ("t", 2, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": ".png"}, r"\.png is no NIfTI"),
        ({"channel_names": None}, "channel_names: missing"),
        ({"labels": None}, "labels: missing"),
        ({"labels": {"background": 0, "x": 1, "y": 1}}, "same values twice: 1"),
        ({"file_ending": ".nii"}, "no training case"),
        ({"dataset": {"a": {"label": "x.nii.gz"}}}, r"dataset\.a\.images: missing"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_key(raw: Path, changes: dict[str, Any], message: str) -> None:
    _change(raw, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(raw)
    assert "dataset.json" in str(caught.value)
