from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.dataset import read_dataset
from pipeline.errors import InputError


@pytest.fixture
def files(tmp_path: Path, save_pair: Callable[..., Any]) -> Path:
    for seed, name in enumerate("ab"):
        save_pair(tmp_path / f"{name}_ct.nii.gz", tmp_path / f"{name}_seg.nii.gz", seed=seed)
        save_pair(tmp_path / f"{name}_pet.nii.gz", tmp_path / f"{name}_seg.nii.gz", seed=seed + 2)
    return tmp_path


def _table(folder: Path, *lines: str, name: str = "list.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def test_columns_become_channels_patients_and_test_cases(files: Path) -> None:
    path = _table(
        files,
        "case_id,image_CT,image_PET,label,patient,split,age",
        "b,b_ct.nii.gz,b_pet.nii.gz,b_seg.nii.gz,P2,train,71",
        "a,a_ct.nii.gz,a_pet.nii.gz,,P1,test,64",
    )
    dataset = read_dataset(path)
    assert (dataset.name, dataset.channel_names) == ("list", ("CT", "PET"))
    assert dataset.cases[0].images == (files / "b_ct.nii.gz", files / "b_pet.nii.gz")
    assert dataset.cases[0].patient == "P2"
    assert dataset.test_cases[0].case_id == "a"
    assert dataset.labels == {"background": 0, "class_1": 1, "class_2": 2}


@pytest.mark.parametrize("name", ["labels.json", "list.labels.json"])
def test_class_names_come_from_the_json_beside_it(files: Path, write_json: Callable[..., Path], name: str) -> None:
    write_json(files / "labels.json", {"0": "other"} if name != "labels.json" else {"1": "bone", "2": "fat"})
    write_json(files / name, {"labels": {"bone": 1, "fat": 2}})
    dataset = read_dataset(_table(files, "case_id,image,label", "a,a_ct.nii.gz,a_seg.nii.gz"))
    assert dataset.labels == {"background": 0, "bone": 1, "fat": 2}


def test_spreadsheet_habits_are_read(files: Path) -> None:
    text = '\ufeffCase_ID; IMAGE ;Label\n;;\na;"a_ct.nii.gz";a_seg.nii.gz\n\n'
    (files / "list.csv").write_text(text, encoding="utf-8")
    (case,) = read_dataset(files / "list.csv").cases
    assert (case.case_id, case.images) == ("a", (files / "a_ct.nii.gz",))


def test_an_empty_cell_keeps_the_case(files: Path) -> None:
    path = _table(files, "case_id,image,label", "a,a_ct.nii.gz,a_seg.nii.gz", "b,b_ct.nii.gz", "c,,b_seg.nii.gz")
    a, b, c = read_dataset(path).cases
    assert (a.label is None, b.label, c.images) == (False, None, ())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["case_id,label", "a,a_seg.nii.gz"], "columns are missing: image or image_<channel>"),
        (["id,image", "a,a_ct.nii.gz"], r"missing: case_id, label \(found id, image\)"),
        (["case_id,image,image_CT,label", "a,b,c,d"], "both"),
        (["case_id,image,label"], "holds no case"),
        ([""], "holds no case"),
        (["case_id,image,label", "a,a_ct.nii.gz,a_seg.nii.gz,x"], "row of 'a' has 4 cells"),
        (["case_id,image,label", ",a_ct.nii.gz,a_seg.nii.gz"], "case_id is empty.*a_ct"),
        (["case_id,image,label", *["a,a_ct.nii.gz,a_seg.nii.gz"] * 2], "used twice: a"),
        (["case_id,image,label", "a/b,a_ct.nii.gz,a_seg.nii.gz"], "cannot be file names: 'a/b'"),
        (["case_id,image,label,split", "a,a_ct.nii.gz,a_seg.nii.gz,val"], "case a: split is 'val'"),
        (["case_id,image,label,split", "a,a_ct.nii.gz,,test"], "no training case"),
        (["case_id,image,label", "a,a_ct.mha,a_seg.nii.gz"], r"a_ct\.mha is no NIfTI"),
        (["case_id,image,label,label", "a,a_ct.nii.gz,x,y"], "two columns of one name"),
    ],
)
def test_what_is_wrong_in_the_table_is_said_in_one_line(files: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(_table(files, *lines))
    assert "list.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_without_any_class_cannot_be_discovered(files: Path) -> None:
    path = _table(files, "case_id,image,label", "a,a_ct.nii.gz,missing.nii.gz")
    with pytest.raises(InputError, match=r"no label file holds a class.*labels\.json"):
        read_dataset(path)
