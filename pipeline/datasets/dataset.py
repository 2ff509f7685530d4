"""Read a dataset in any of the layouts we know: the front door of this package."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.case_reader import read_case_image, read_case_label
from pipeline.datasets.folder_pair import find_folder_pair, read_folder_pair
from pipeline.datasets.msd import DATASET_FILE, read_msd
from pipeline.datasets.nnunet_raw import read_nnunet_raw
from pipeline.datasets.table import read_table
from pipeline.errors import InputError

__all__ = ["Case", "Dataset", "read_case_image", "read_case_label", "read_dataset"]

TABLE_SUFFIXES = (".csv", ".tsv")
LOOKED_FOR = (
    "A dataset is a folder with dataset.json (MSD or nnU-Net raw), with imagesTr and labelsTr or with images and "
    "labels, or a .json, .csv or .tsv list of cases"
)


def read_dataset(path: str | Path) -> Dataset:
    """Read a dataset whose layout is found from what lies at `path`.

    Args:
        path: A folder in MSD or nnU-Net raw layout (or its dataset.json), a folder with images and labels in
            two sub-folders, or a CSV or JSON list.

    Raises:
        InputError: Nothing is there, it is no dataset (the message says what was looked for), or its file is wrong.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise InputError("no such file or folder", where=path, fix=LOOKED_FOR)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return read_table(path)
    if suffix == ".json":
        return _read_json(path)
    raise InputError("is no dataset", where=path, fix=LOOKED_FOR)


def is_dataset_folder(path: Path) -> bool:
    """Whether `read_dataset` knows the layout of a folder; its files may still be wrong."""
    return path.is_dir() and ((path / DATASET_FILE).is_file() or find_folder_pair(path) is not None)


def _read_folder(path: Path) -> Dataset:
    if (path / DATASET_FILE).is_file():
        return _read_json(path / DATASET_FILE)
    pair = find_folder_pair(path)
    if pair is None:
        raise InputError("is no dataset", where=path, fix=LOOKED_FOR)
    return read_folder_pair(path, *pair)


def _read_json(path: Path) -> Dataset:
    """MSD where the cases are listed under `training`, nnU-Net raw where they are found by name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot be read as JSON ({error})", where=path) from error
    if isinstance(content, list):
        return read_msd(path, is_list=True)
    keys = set(content) if isinstance(content, dict) else set()
    if "training" in keys and "file_ending" not in keys:
        return read_msd(path)
    if keys & {"channel_names", "modality", "file_ending", "dataset"}:
        return read_nnunet_raw(path)
    raise InputError("has neither `training` (MSD) nor `channel_names` (nnU-Net raw)", where=path, fix=LOOKED_FOR)
