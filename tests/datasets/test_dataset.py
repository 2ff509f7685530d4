from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.dataset import Dataset, read_dataset
from pipeline.errors import InputError
from pipeline.synthetic import (
    make_synthetic_case,
    write_msd_dataset,
    write_nnunet_raw_dataset,
    write_table_dataset,
)


def test_all_layouts_of_the_same_cases_read_alike(tmp_path: Path) -> None:
    cases = {f"case_{seed}": make_synthetic_case(seed, num_channels=2, oblique_degrees=8) for seed in range(2)}
    read = [
        read_dataset(write_msd_dataset(tmp_path / "msd", cases)),
        read_dataset(write_nnunet_raw_dataset(tmp_path / "raw", cases)),
        read_dataset(write_table_dataset(tmp_path / "table", cases)),
    ]
    assert {tuple(case.case_id for case in one.cases) for one in read} == {("case_0", "case_1")}
    assert {one.channel_names for one in read} == {("T1", "T2")}
    assert {tuple(one.labels.values()) for one in read} == {(0, 1, 2)}
    assert [tuple(one.labels) for one in read[:2]] == [("background", "organ_1", "organ_2")] * 2


def test_a_folder_and_its_dataset_json_are_the_same_dataset(msd: Path) -> None:
    assert read_dataset(msd) == read_dataset(msd / "dataset.json") == read_dataset(str(msd))


@pytest.mark.parametrize("name", ["empty", "nothing_here", "image.nii.gz"])
def test_what_is_no_dataset_is_refused_and_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.nii.gz").touch()
    with pytest.raises(InputError, match=r"dataset\.json .*imagesTr and labelsTr.*\.csv"):
        read_dataset(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "7", '{"a": 1}', "", '"training"'])
def test_json_that_is_no_dataset_is_one_line_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json: ") as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def test_sets_of_the_real_world_are_read(shared_data: Path) -> None:
    hippocampus = read_dataset(shared_data / "hippocampus")
    assert len(hippocampus.cases) == 195
    assert hippocampus.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert hippocampus.channel_names == ("MRI",)
    assert not hippocampus.unlisted_files
    dirty = read_dataset(shared_data / "hippocampus_dirty")
    assert [case.case_id[-3:] for case in dirty.cases] == ["010", "118", "281"]


def _ids(dataset: Dataset) -> list[str]:
    return [case.case_id for case in dataset.cases]


class TestFolderPair:
    def test_images_and_labels_are_paired_by_name_and_lonely_ones_kept(
        self, tmp_path: Path, save_pair: Callable[..., Any]
    ) -> None:
        for seed, name in enumerate("abc"):
            save_pair(tmp_path / f"images/{name}.nii.gz", tmp_path / f"labels/{name}.nii.gz", seed=seed)
        (tmp_path / "images/a.nii.gz").unlink()
        (tmp_path / "labels/b.nii.gz").unlink()
        (tmp_path / "images/._c.nii.gz").touch()
        dataset = read_dataset(tmp_path)
        assert _ids(dataset) == ["a", "b", "c"]
        assert dataset.cases[0].images == ()
        assert dataset.cases[1].label is None
        assert dataset.labels == {"background": 0, "class_1": 1, "class_2": 2}

    def test_four_digits_are_a_channel_only_when_the_label_has_none(
        self, tmp_path: Path, save_pair: Callable[..., Any]
    ) -> None:
        for seed in range(2):
            label = tmp_path / "one/labelsTr/liver_0001.nii.gz"
            save_pair(tmp_path / f"one/imagesTr/liver_0001_{seed:04d}.nii.gz", label, seed=seed)
            numbered = f"liver_{seed:04d}.nii.gz"
            save_pair(tmp_path / f"two/imagesTr/{numbered}", tmp_path / f"two/labelsTr/{numbered}", seed=seed)
        channels, cases = read_dataset(tmp_path / "one"), read_dataset(tmp_path / "two")
        assert (_ids(channels), channels.channel_names) == (["liver_0001"], ("channel_0", "channel_1"))
        assert (_ids(cases), cases.channel_names) == (["liver_0000", "liver_0001"], ("channel_0",))

    def test_two_files_of_one_name_do_not_vanish(self, tmp_path: Path, save_pair: Callable[..., Any]) -> None:
        save_pair(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", seed=0)
        save_pair(tmp_path / "images/a.nii", tmp_path / "labels/a.nii.gz", seed=1)
        dataset = read_dataset(tmp_path)
        assert len(dataset.unlisted_files) == 1

    def test_class_names_come_from_labels_json(
        self, tmp_path: Path, save_pair: Callable[..., Any], write_json: Callable[..., Path]
    ) -> None:
        save_pair(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", seed=0)
        write_json(tmp_path / "labels.json", {"background": 0, "liver": 1, "ignore": 2})
        dataset = read_dataset(tmp_path)
        assert dataset.labels == {"background": 0, "liver": 1}
        assert dataset.ignore_value == 2

    def test_empty_folders_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "labels").mkdir()
        with pytest.raises(InputError, match="no NIfTI files"):
            read_dataset(tmp_path)
