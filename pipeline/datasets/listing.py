"""Files, case ids and channels: what all layouts have in common."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.datasets.case import Case
from pipeline.errors import InputError, name_some
from pipeline.io.image_file import is_image_path, read_layout, strip_suffix
from pipeline.io.nifti import is_nifti_name

MAX_ID_LENGTH = 128
_UNSAFE = re.compile(r'[\x00-\x1f/\\:*?"<>|]')
_CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, sorted, without hidden ones such as macOS leaves (`._name`)."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_nifti_name(path.name))


def unlisted_files(folders: Iterable[Path], cases: Iterable[Case]) -> tuple[Path, ...]:
    """NIfTI files in `folders` that no case uses."""
    used = {_plain(path) for case in cases for path in (*case.images, *([case.label] if case.label else []))}
    return tuple(path for folder in folders for path in nifti_files(folder) if _plain(path) not in used)


def _plain(path: Path) -> str:
    # Not Path.resolve: a link to a file that another case uses is still a file of its own.
    return os.path.abspath(path)  # noqa: PTH100


def stem_of(path: Path) -> str:
    """The file's name without the suffix of its format."""
    return strip_suffix(path.name)


def check_names(names: Iterable[str], where: Path) -> None:
    """Raise `InputError` when a file listed in `where` is of a kind that is not read."""
    foreign = [name for name in names if not is_image_path(where.parent / name)]
    if foreign:
        fix = "Convert it to .nii.gz, or give the folder of a DICOM series"
        raise InputError(f"{name_some(foreign)} is no NIfTI file", where=where, fix=fix)


def split_channel(stem: str) -> tuple[str, int] | None:
    """`liver_12_0001` as ("liver_12", 1), nnU-Net's way to name channels; None for other names."""
    found = _CHANNEL_SUFFIX.match(stem)
    return (found["case"], int(found["channel"])) if found else None


def check_cases(cases: Sequence[Case], where: Path) -> tuple[Case, ...]:
    """The cases sorted by id, after a check that ids are unique and safe as file names.

    Raises:
        InputError: An id is used twice or cannot be a file name.
    """
    counts = Counter(case.case_id for case in cases)
    twice = sorted(case_id for case_id, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"case ids are used twice: {name_some(twice)}", where=where, fix="Make them unique")
    unsafe = sorted(case_id for case_id in counts if not _is_safe_id(case_id))
    if unsafe:
        raise InputError(
            f"case ids cannot be file names: {name_some([repr(case_id) for case_id in unsafe])}",
            where=where,
            fix="Use letters, digits, '.', '_' and '-'",
        )
    return tuple(sorted(cases, key=lambda case: case.case_id))


def _is_safe_id(case_id: str) -> bool:
    edges_fine = case_id == case_id.strip() and not case_id.startswith((".", "-")) and not case_id.endswith(".")
    return 0 < len(case_id) <= MAX_ID_LENGTH and edges_fine and not _UNSAFE.search(case_id)


def declared_channels(declared: Mapping[str, str] | Sequence[str] | str, where: Path) -> tuple[str, ...]:
    """Channel names in order, from `{"0": "CT", "1": "PET"}`, a list, or one name.

    Raises:
        InputError: The keys of the mapping are not 0, 1, 2, ... or there is no channel.
    """
    if isinstance(declared, str):
        return (declared,)
    if isinstance(declared, Mapping):
        names = [declared.get(str(index)) for index in range(len(declared))]
        if None in names:
            raise InputError(f"channels must be numbered from 0, got {', '.join(declared)}", where=where)
        declared = [name for name in names if name is not None]
    if not declared:
        raise InputError("declares no channel", where=where, fix="Name at least one")
    return tuple(declared)


def counted_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """`channel_0`, `channel_1`, ... for lists that name none, as many as the first readable case has."""
    for case in cases:
        if len(case.images) > 1:
            return _numbered(len(case.images))
        try:
            return _numbered(read_layout(case.images[0]).num_channels)
        except (InputError, OSError, EOFError, IndexError):
            continue
    return _numbered(1)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"channel_{index}" for index in range(count))
