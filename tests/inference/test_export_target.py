from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.inference.export_target import check_target


def bundle(folder: Path, **metadata: object) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_what_is_not_there_or_is_an_empty_folder_may_be_written(tmp_path: Path) -> None:
    check_target(tmp_path / "model.onnx", is_folder=False, overwrite=False)
    check_target(tmp_path / "bundle", is_folder=True, overwrite=False)
    check_target(tmp_path, is_folder=True, overwrite=False)


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("x")
    folder = bundle(tmp_path / "bundle", voxfit={})
    for path in (file, folder):
        with pytest.raises(InputError, match=r"is there already\. Use --overwrite"):
            check_target(path, is_folder=path.is_dir(), overwrite=False)
        check_target(path, is_folder=path.is_dir(), overwrite=True)


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    theirs = bundle(tmp_path / "theirs", monai_version="1.5")
    results = tmp_path / "results"
    results.mkdir()
    (results / "thesis.tex").write_text("years")
    broken = bundle(tmp_path / "broken")
    (broken / "configs" / "metadata.json").write_text("{")
    for folder in (theirs, results, broken):
        with pytest.raises(InputError, match="is no bundle that voxfit wrote"):
            check_target(folder, is_folder=True, overwrite=True)


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "file", is_folder=True, overwrite=True)
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path / "folder", is_folder=False, overwrite=True)
