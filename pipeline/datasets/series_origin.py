"""Which DICOM series a case is of, for people: what they know it by, and nothing that tells the patient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.datasets.case import Case, SeriesOrigin
from pipeline.datasets.dicom_scan import Scan
from pipeline.errors import InputError
from pipeline.io.dicom.headers import Header, read_header
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.reader import dicom_files
from pipeline.io.dicom.references import read_series_file
from pipeline.io.dicom.series import Series, identity_of_all, name_of
from pipeline.io.image_file import is_series


def origins_in(scan: Scan, series: Sequence[Series]) -> tuple[SeriesOrigin, ...]:
    """Series of a tree, with their slices and the folder as seen from the tree's root.

    Args:
        scan: The tree, whose patients are all hidden.
        series: Of a case, one per channel.
    """
    return tuple(_origin_in(scan, one) for one in series)


def _origin_in(scan: Scan, series: Series) -> SeriesOrigin:
    stack, first, root = series.stack, series.first.path.parent, scan.root
    if first == root or not first.is_relative_to(root):
        folder = first.resolve().name
    else:
        folder = first.relative_to(root).as_posix()
    size = _count(stack.grid.shape[2], "slice") if stack else _count(len(series.headers), "file")
    others = len({header.path.parent for header in series.headers} - {first})
    more = f" and {_count(others, 'other folder')}" if others else ""
    name, folder = (hide(text, scan.identity) for text in (series.name, folder))
    return SeriesOrigin(name=name, place=f"{size} in {folder}{more}")


def with_origins(cases: Sequence[Case], among: Sequence[Case]) -> tuple[Case, ...]:
    """Cases that a dataset names with the DICOM series behind their images, the last name of the folder alone.

    One header is read for each image. Images that are no DICOM, or of which none can be read, have no origin.

    Args:
        cases: Whose origins are wanted.
        among: All cases of the dataset: whom any of them shows is hidden in all.
    """
    headers = {path: found for case in among for path in case.images if (found := _first_header(path))}
    identity = identity_of_all(header for header, _ in headers.values())
    origins = {path: _origin_of(header, number, identity) for path, (header, number) in headers.items()}
    return tuple(
        replace(case, origins=tuple(origins[path] for path in case.images if path in origins)) for case in cases
    )


def _first_header(path: Path) -> tuple[Header, int] | None:
    """A header of a series and the number of its files."""
    if not is_series(path):
        return None
    try:
        files = dicom_files(path) if path.is_dir() else read_series_file(path)[0]
        return (read_header(files[0]), len(files)) if files else None
    except (InputError, OSError):
        # The case says so when its turn comes.
        return None


def _origin_of(header: Header, num_files: int, identity: frozenset[str]) -> SeriesOrigin:
    name, folder = (hide(text, identity) for text in (name_of([header]), header.path.resolve().parent.name))
    return SeriesOrigin(name=name, place=f"{_count(num_files, 'file')} in {folder}")


def say_origin(text: str, origins: Collection[SeriesOrigin]) -> str:
    """A message about a case with its series: where it names one already, with what else is known of that."""
    for origin in origins:
        if origin.name in text:
            return text.replace(origin.name, str(origin), 1)
    return ": ".join([*([", ".join(map(str, origins))] if origins else []), text])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
