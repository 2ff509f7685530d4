"""Every DICOM series under a folder, however deep: read from headers, several processes at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

from pipeline.datasets.dataset import is_dataset_folder
from pipeline.datasets.folder_pair import find_folder_pair
from pipeline.datasets.listing import nifti_files
from pipeline.datasets.msd import DATASET_FILE
from pipeline.errors import InputError
from pipeline.io.dicom.headers import Header, claims_dicom, is_candidate_name, read_header
from pipeline.io.dicom.rtstruct_file import RT_STRUCTURE_SET
from pipeline.io.dicom.seg_header import SEGMENTATION_CLASSES
from pipeline.io.dicom.series import (
    Series,
    examine_series,
    group_by_series,
)
from pipeline.parallel import map_unordered

FILES_PER_TASK = 250
# So few headers are read before another process has imported what it needs.
FEW_FILES = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """What lies under a folder.

    Attributes:
        root: The folder.
        series: All series of images, readable or not, sorted by place.
        label_objects: Structure sets and segmentations, one header each.
        unreadable: Files that should be DICOM and cannot be read, with the reason.
        num_other_files: Files that are not DICOM.
    """

    root: Path
    series: tuple[Series, ...]
    label_objects: tuple[Header, ...]
    unreadable: tuple[tuple[Path, str], ...]
    num_other_files: int

    @property
    def identity(self) -> frozenset[str]:
        """Texts that tell who the patients are; never shown."""
        own = (header.identity for header in self.label_objects)
        return frozenset[str]().union(*(series.identity for series in self.series), *own)


@dataclass(frozen=True)
class _Batch:
    headers: list[Header]
    unreadable: list[tuple[Path, str]]
    num_other_files: int


def is_volume_dataset(path: Path) -> bool:
    """Whether a folder is a dataset of files of its own, and not a tree of DICOM with folders of the same names."""
    if not is_dataset_folder(path):
        return False
    pair = find_folder_pair(path)
    return (path / DATASET_FILE).is_file() or any(nifti_files(folder) for folder in pair or ())


def scan_folder(root: Path, *, num_workers: int, allow_tilt: bool = False) -> Scan:
    """Read the headers of all files under `root`.

    Args:
        root: A folder, or a single file.
        num_workers: Processes.
        allow_tilt: Take series whose slices are shifted evenly against each other.
    """
    unreadable: list[tuple[Path, str]] = []
    files = sorted(_files_under(root, unreadable)) if root.is_dir() else [root]
    tasks = [files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK)]
    workers = num_workers if len(files) > FEW_FILES else 1
    headers: list[Header] = []
    num_other_files = 0
    for outcome in map_unordered(_read_batch, tasks, num_workers=workers):
        if outcome.result is None:
            raise outcome.error or RuntimeError("a batch of headers came back empty")
        headers += outcome.result.headers
        unreadable += outcome.result.unreadable
        num_other_files += outcome.result.num_other_files
    return _as_scan(root, headers, sorted(unreadable), num_other_files, allow_tilt=allow_tilt)


def _files_under(root: Path, unreadable: list[tuple[Path, str]]) -> Iterable[Path]:
    """All files, through links to folders as well, each folder once; folders that cannot be listed are `unreadable`."""

    def note(error: OSError) -> None:
        unreadable.append((Path(error.filename), f"cannot be read ({error.strerror})"))

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=note, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in names if is_candidate_name(name))


def _read_batch(paths: Sequence[Path]) -> _Batch:
    batch = _Batch([], [], 0)
    others = 0
    for path in paths:
        try:
            # To open a pipe would wait for ever.
            if not S_ISREG(path.stat().st_mode) or not claims_dicom(path):
                others += 1
                continue
            batch.headers.append(read_header(path))
        except InputError as error:
            batch.unreadable.append((path, error.what))
        except OSError as error:
            batch.unreadable.append((path, f"cannot be read ({error.strerror})"))
    return replace(batch, num_other_files=others)


def _as_scan(
    root: Path, headers: list[Header], unreadable: list[tuple[Path, str]], num_other_files: int, *, allow_tilt: bool
) -> Scan:
    headers.sort(key=lambda header: header.path)
    is_label = {header.path: header.sop_class in (*SEGMENTATION_CLASSES, RT_STRUCTURE_SET) for header in headers}
    images = [header for header in headers if not is_label[header.path]]
    found = [
        _with_folder_problems(_examine(part, allow_tilt=allow_tilt), unreadable)
        for group in group_by_series(images)
        for part in _apart_or_together(group)
    ]
    found.sort(key=lambda series: series.first.path)
    return Scan(
        root=root,
        series=tuple(_with_unique_keys(found)),
        label_objects=tuple(header for header in headers if is_label[header.path]),
        unreadable=tuple(unreadable),
        num_other_files=num_other_files,
    )


def _examine(headers: tuple[Header, ...], *, allow_tilt: bool) -> Series:
    """A series, without what repeats a file of another of its folders."""
    folder_of: dict[object, Path] = {}
    kept = tuple(
        header
        for header in headers
        if not header.instance_uid or folder_of.setdefault(_identical(header), header.path.parent) == header.path.parent
    )
    series = examine_series(kept, allow_tilt=allow_tilt)
    if len(kept) == len(headers):
        return series
    note = f"{len(headers) - len(kept)} file(s) that lie in another of its folders as well are left aside"
    return replace(series, notes=(*series.notes, note))


def _identical(header: Header) -> object:
    """Equal for copies of a file."""
    return header.instance_uid, tuple((frame.index, frame.position, frame.phase) for frame in header.frames)


def _apart_or_together(headers: tuple[Header, ...]) -> list[tuple[Header, ...]]:
    """A series that lies in several folders: whole copies apart, anything else together, so that no part is missed."""
    by_folder: dict[Path, list[Header]] = {}
    for header in headers:
        by_folder.setdefault(header.path.parent, []).append(header)
    places = {
        frozenset((frame.position, frame.phase) for header in part for frame in header.frames)
        for part in by_folder.values()
    }
    if len(by_folder) == 1 or len(places) > 1:
        return [headers]
    return [tuple(part) for part in by_folder.values()]


def _with_folder_problems(series: Series, unreadable: Sequence[tuple[Path, str]]) -> Series:
    """A series is not whole when a file beside its own cannot be read: it may be its first or last slice."""
    folders = {header.path.parent for header in series.headers}
    beside = [path for path, _ in unreadable if path.parent in folders]
    if not beside or series.left_out:
        return series
    problem = f"{len(beside)} file(s) in its folder cannot be read, so that slices may be missing"
    return replace(series, problems=(*series.problems, problem), stack=None)


def _with_unique_keys(found: Sequence[Series]) -> Iterable[Series]:
    """Copies of a series in several folders get a number behind their key."""
    seen: dict[str, int] = {}
    for series in found:
        seen[series.key] = seen.get(series.key, 0) + 1
        yield series if seen[series.key] == 1 else replace(series, key=f"{series.key}_{seen[series.key]}")
