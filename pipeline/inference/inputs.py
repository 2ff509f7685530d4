"""What may stand behind `--input`: a NIfTI file, a folder of them, or a dataset."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from pipeline.datasets.dataset import TABLE_SUFFIXES, Case, is_dataset_folder, read_dataset
from pipeline.datasets.table import read_case_list
from pipeline.errors import InputError
from pipeline.io.nifti import is_nifti_name, strip_nifti_suffix

CHANNEL_SUFFIX = re.compile(r"(?P<case_id>.+)_(?P<channel>\d{4})")


def find_inputs(path: Path) -> tuple[Case, ...]:
    """The cases that may be segmented, sorted by id; `choose_cases` takes the wanted of them.

    Channels of a case are told by the suffixes `_0000`, `_0001`, ... as in nnU-Net. A name without such a suffix is a
    case of its own, in one channel or with the channels as fourth axis; so is `scan_0012` where no `scan_0000` lies
    beside it. Of a dataset, training and test cases are taken.

    Args:
        path: A NIfTI file (with the suffix `_0000` its other channels are found beside it), a folder of NIfTI files,
            or anything that `read_dataset` reads.

    Raises:
        InputError: Nothing is there, or its channels are not complete.
    """
    return choose_cases(_find(path), None, where=path)


def choose_cases(
    cases: Iterable[Case], case_ids: Collection[str] | None, *, where: Path | str, fix: str = ""
) -> tuple[Case, ...]:
    """The wanted of the cases, sorted by id.

    Args:
        cases: That were found.
        case_ids: Only these; None takes all.
        where: They were found, for the message.
        fix: What to do where a wanted case is not among them.

    Raises:
        InputError: A wanted case is not among them.
    """
    found = {case.case_id: case for case in cases}
    missing = sorted(set(case_ids or ()) - set(found))
    if missing:
        raise InputError(f"has no case {', '.join(missing)}", where=where, fix=fix)
    return tuple(found[case_id] for case_id in sorted(found) if case_ids is None or case_id in case_ids)


def _find(path: Path) -> Iterable[Case]:
    if path.is_file() and is_nifti_name(path.name):
        return [case for case in group_channels(_volumes(path.parent)) if path in case.images]
    if path.is_dir() and not is_dataset_folder(path) and (volumes := _volumes(path)):
        return group_channels(volumes)
    if not path.exists():
        raise InputError("does not exist", where=path, fix="Give a NIfTI file, a folder of them, or a dataset")
    if path.suffix.lower() in TABLE_SUFFIXES:
        return read_case_list(path)
    dataset = read_dataset(path)
    return [case for case in (*dataset.test_cases, *dataset.cases) if case.images]


def _volumes(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if is_nifti_name(item.name))


def group_channels(files: Iterable[Path]) -> list[Case]:
    """Cases of files in one folder, their channels in order.

    Raises:
        InputError: Two files stand for one case and channel, or channels between the first and the last are missing.
    """
    names: dict[str, Path] = {}
    for item in files:
        other = names.setdefault(strip_nifti_suffix(item.name), item)
        if other != item:
            raise InputError(f"{other.name} and {item.name} are the same case", where=item.parent, fix="Remove one")
    channels: dict[str, dict[int, Path]] = {}
    for name, item in names.items():
        match = CHANNEL_SUFFIX.fullmatch(name)
        if match and f"{match['case_id']}_0000" in names:
            channels.setdefault(match["case_id"], {})[int(match["channel"])] = item
        else:
            channels.setdefault(name, {})[0] = item
    for case_id, by_number in channels.items():
        gaps = sorted(set(range(max(by_number))) - set(by_number))
        if gaps:
            raise InputError(f"case {case_id} lacks channel {gaps[0]:04d}", where=by_number[0].parent)
    return [
        Case(case_id=case_id, images=tuple(by_number[number] for number in sorted(by_number)), label=None)
        for case_id, by_number in channels.items()
    ]
