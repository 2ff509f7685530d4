"""Small JSON files that stand for DICOM in a dataset: the files of a series, and the structures that label it.

They let a series be named by one path that tells nobody's identity, whatever the folders of the archive are called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
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
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    files: tuple[str, ...]
    allow_tilt: bool = False


@dataclass(frozen=True, kw_only=True)
class StructuresFile(Record):
    """Structure sets and segmentations that make up the label of a series.

    Attributes:
        schema_version: Version of this file's format.
        series: The `.series.json` of the image, relative to the folder of this file.
        objects: RTSTRUCT and SEG files, relative to the folder of this file.
        classes: Which structures make which class; where classes overlap, the later one wins.
        threshold: Fraction from which on a voxel of a fractional segmentation is inside.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    series: str
    objects: tuple[str, ...]
    classes: tuple[LabelClass, ...]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold: must be above 0 and at most 1, got {self.threshold}")


def write_series_file(path: Path, files: Sequence[Path], *, allow_tilt: bool = False) -> None:
    """Write which files make up a series."""
    write_artifact(path, SeriesFile(files=_relative(files, path), allow_tilt=allow_tilt))


def read_series_file(path: Path) -> tuple[tuple[Path, ...], bool]:
    """The files of a series, and whether it may be tilted.

    Raises:
        InputError: The file is wrong, or lists nothing.
    """
    content = read_artifact(path, SeriesFile)
    if not content.files:
        raise InputError("lists no files", where=path)
    return tuple(path.parent / name for name in content.files), content.allow_tilt


def write_structures_file(
    path: Path, series_file: Path, objects: Sequence[Path], classes: Sequence[LabelClass], *, threshold: float
) -> None:
    """Write which structures label a series."""
    content = StructuresFile(
        series=_relative([series_file], path)[0],
        objects=_relative(objects, path),
        classes=tuple(classes),
        threshold=threshold,
    )
    write_artifact(path, content)


def files_behind(path: Path) -> tuple[Path, ...]:
    """All files that a reference stands for, itself among them; a path that is no reference stands for itself.

    Raises:
        InputError: A reference is wrong.
    """
    if path.name.endswith(SERIES_SUFFIX):
        return path, *read_series_file(path)[0]
    if path.name.endswith(STRUCTURES_SUFFIX):
        content = read_artifact(path, StructuresFile)
        return path, *(path.parent / name for name in (content.series, *content.objects))
    return (path,)


def _relative(files: Sequence[Path], path: Path) -> tuple[str, ...]:
    folder = path.absolute().parent
    return tuple(Path(os.path.relpath(file.absolute(), folder)).as_posix() for file in files)
