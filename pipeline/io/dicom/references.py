"""Small JSON files that stand for DICOM in a dataset: the files of a series, and the structures that label it.

They let a series be named by one path that tells nobody's identity, whatever the folders of the archive are called.
What they hold are the places of files: where folders or files are named after patients, so are these lines, and such
references belong where the files themselves do. No message quotes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.io.dicom.headers import read_header
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.structures import LabelClass
from pipeline.plan import Record

SERIES_SUFFIX = ".series.json"
STRUCTURES_SUFFIX = ".structures.json"


@dataclass(frozen=True, kw_only=True)
class SeriesFile(Record):
    """The files of one series.

    Attributes:
        schema_version: Version of this file's format.
        files: Relative to the folder of this file.
        allow_tilt: Resample slices that are shifted evenly against each other.
        problem: Why it is not to be read; "" where nothing stands against it. Files alone do not show everything: a
            slice that cannot be read at all is not among them.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    files: tuple[str, ...]
    allow_tilt: bool = False
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class StructuresFile(Record):
    """Structure sets and segmentations that make up the label of a series.

    Attributes:
        schema_version: Version of this file's format.
        series: The `.series.json` of the image, relative to the folder of this file.
        objects: RTSTRUCT and SEG files, relative to the folder of this file.
        classes: Which structures make which class.
        overlap: Who wins where classes overlap: the later class, or in each case the smaller one.
        threshold: Fraction from which on a voxel of a fractional segmentation is inside.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    series: str
    objects: tuple[str, ...]
    classes: tuple[LabelClass, ...]
    overlap: Literal["later", "smaller"] = "later"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold: must be above 0 and at most 1, got {self.threshold}")


def write_series_file(path: Path, files: Sequence[Path], *, allow_tilt: bool = False, problem: str = "") -> None:
    """Write which files make up a series; with a problem, reading ends with it."""
    write_artifact(path, SeriesFile(files=_relative(files, path), allow_tilt=allow_tilt, problem=problem))


def read_series_file(path: Path) -> tuple[tuple[Path, ...], bool]:
    """The files of a series, and whether it may be tilted.

    Raises:
        InputError: The file is wrong, lists nothing, or says what stands against reading the series.
    """
    content = read_artifact(path, SeriesFile)
    if content.problem:
        raise InputError(content.problem, fix="Look at it with `voxfit inspect`")
    if not content.files:
        raise InputError("lists no files", where=path.name, fix="Write the dataset anew with `voxfit inspect`")
    return tuple(path.parent / name for name in content.files), content.allow_tilt


def write_structures_file(
    path: Path,
    series_file: Path,
    objects: Sequence[Path],
    classes: Sequence[LabelClass],
    *,
    overlap: Literal["later", "smaller"] = "later",
    threshold: float = 0.5,
) -> None:
    """Write which structures label a series."""
    content = StructuresFile(
        series=_relative([series_file], path)[0],
        objects=_relative(objects, path),
        classes=tuple(classes),
        overlap=overlap,
        threshold=threshold,
    )
    write_artifact(path, content)


def files_behind(path: Path) -> tuple[Path, ...]:
    """All files that a reference stands for, itself among them; a path that is no reference stands for itself.

    Raises:
        InputError: A reference is wrong, or a file that it lists is not there.
    """
    if path.name.endswith(SERIES_SUFFIX):
        files = read_series_file(path)[0]
    elif path.name.endswith(STRUCTURES_SUFFIX):
        content = read_artifact(path, StructuresFile)
        files = tuple(path.parent / name for name in (content.series, *content.objects))
    else:
        return (path,)
    missing = [number for number, file in enumerate(files, start=1) if not file.is_file()]
    if missing:
        text = (
            f"{len(missing)} of the {len(files)} files that it lists are not there (the first is number {missing[0]})"
        )
        raise InputError(text, where=path.name, fix="Put them back, or write the dataset anew with `voxfit inspect`")
    return (path, *files)


@contextmanager
def anonymous_errors(files: Sequence[Path]) -> Iterator[None]:
    """Within, errors do not tell whom `files` show: their names, and those of structures, may hold a patient's."""
    try:
        yield
    except InputError as error:
        identity = identity_behind(files)
        where, what = hide(error.where, identity), hide(error.what, identity)
        if error.where in {file.name for file in files}:
            # Whoever shows this names the reference: which of its files it is belongs to what is wrong.
            where, what = "", f"{where}: {what}"
        raise InputError(what, where=where, fix=error.fix) from None


def identity_behind(files: Sequence[Path]) -> frozenset[str]:
    """What tells the patient in the headers of files; where none can be read, what their names hold."""
    found: frozenset[str] = frozenset()
    for file in files:
        with suppress(InputError):
            found |= read_header(file).identity
    return found or frozenset(file.stem for file in files)


def _relative(files: Sequence[Path], path: Path) -> tuple[str, ...]:
    """Places of files as seen from the folder of `path`; through links, `..` leads to where they point."""
    folder = path.parent.resolve()
    parents = {parent: os.path.relpath(parent.resolve(), folder) for parent in {file.parent for file in files}}
    return tuple((Path(parents[file.parent]) / file.name).as_posix() for file in files)
