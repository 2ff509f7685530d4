"""Faults in a written series, as archives and networks make them; each function changes files and says what it did."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import UID

from pipeline.synthetic_dicom.layout import decimal
from pipeline.synthetic_dicom.options import make_uid


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done.

    Attributes:
        kind: Name of the function.
        paths: Files that were changed, made or removed.
        detail: What exactly, in words.
    """

    kind: str
    paths: tuple[Path, ...]
    detail: str


def drop_slice(path: Path) -> Fault:
    """Remove a file."""
    path.unlink()
    return Fault(kind="drop_slice", paths=(path,), detail="removed")


def duplicate_slice(path: Path, *, changes_pixels: bool = False) -> Fault:
    """Write the slice once more at the same place under a new SOP instance UID, by wish with other pixels.

    Args:
        path: A classic file.
        changes_pixels: Flip the lowest bit of the first pixel; for files without compression.
    """

    def change(dataset: FileDataset) -> None:
        uid = UID(make_uid("duplicate", dataset.SOPInstanceUID))
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        if changes_pixels:
            dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]

    copy = path.with_name(f"{path.stem}_duplicate{path.suffix}")
    shutil.copyfile(path, copy)
    _change([copy], change)
    return Fault(kind="duplicate_slice", paths=(copy,), detail="same position, new SOP instance UID")


def copy_file(path: Path, name: str) -> Fault:
    """Copy a file byte by byte to `name`, relative to its folder."""
    copy = path.parent / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)
    return Fault(kind="copy_file", paths=(copy,), detail=f"the same bytes as {path.name}")


def shift_in_plane(path: Path, millimetres: float) -> Fault:
    """Move a slice along its rows."""

    def change(dataset: FileDataset) -> None:
        row = np.asarray(dataset.ImageOrientationPatient[:3], float)
        _move(dataset, row * millimetres)

    _change([path], change)
    return Fault(kind="shift_in_plane", paths=(path,), detail=f"by {millimetres} mm along the rows")


def jitter_spacing(paths: Sequence[Path], millimetres: float, *, seed: int = 0) -> Fault:
    """Move every slice along the normal by at most `millimetres` either way; the first and the last stay."""
    shifts = (np.random.Generator(np.random.PCG64(seed)).random(len(paths)) * 2 - 1) * millimetres
    for path, shift in list(zip(paths, shifts, strict=True))[1:-1]:
        _change([path], partial(_move_across, by=float(shift)))
    return Fault(kind="jitter_spacing", paths=tuple(paths[1:-1]), detail=f"at most {millimetres} mm, seed {seed}")


def mix_orientations(paths: Iterable[Path], degrees: float = 90.0) -> Fault:
    """Turn slices about the direction of their rows, the first pixel staying where it is."""
    angle, turned = np.radians(degrees), tuple(paths)

    def change(dataset: FileDataset) -> None:
        orientation = np.asarray(dataset.ImageOrientationPatient, float)
        column = np.cos(angle) * orientation[3:] + np.sin(angle) * _normal(dataset)
        dataset.ImageOrientationPatient = [decimal(value, 12) for value in [*orientation[:3], *column]]

    _change(turned, change)
    return Fault(kind="mix_orientations", paths=turned, detail=f"turned by {degrees} degrees")


def truncate_file(path: Path, fraction: float) -> Fault:
    """Cut a file after `fraction` of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return Fault(kind="truncate_file", paths=(path,), detail=f"cut to {fraction:.0%} of {len(data)} bytes")


def delete_attribute(paths: Iterable[Path], keyword: str) -> Fault:
    """Take an attribute, named by its DICOM keyword, out of the files; `SOPClassUID` stays in the meta information."""
    changed = tuple(paths)
    _change(changed, lambda dataset: delattr(dataset, keyword))
    return Fault(kind="delete_attribute", paths=changed, detail=keyword)


def set_attribute(paths: Iterable[Path], keyword: str, value: Any) -> Fault:
    """Give an attribute another value."""
    changed = tuple(paths)
    _change(changed, lambda dataset: setattr(dataset, keyword, value))
    return Fault(kind="set_attribute", paths=changed, detail=f"{keyword} = {value}")


def flip_bit(path: Path, bit: int) -> Fault:
    """Flip a bit, counted from the first of the file; from the end where negative."""
    data = bytearray(path.read_bytes())
    place = bit % (8 * len(data))
    data[place // 8] ^= 1 << (place % 8)
    path.write_bytes(bytes(data))
    return Fault(kind="flip_bit", paths=(path,), detail=f"bit {place} of {8 * len(data)}")


def _change(paths: Iterable[Path], change: Callable[[FileDataset], None]) -> None:
    for path in paths:
        dataset = dcmread(path)
        change(dataset)
        dataset.save_as(path, enforce_file_format=True)


def _normal(dataset: FileDataset) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    orientation = np.asarray(dataset.ImageOrientationPatient, float)
    return np.cross(orientation[:3], orientation[3:])


def _move_across(dataset: FileDataset, by: float) -> None:
    _move(dataset, _normal(dataset) * by)


def _move(dataset: FileDataset, by: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    dataset.ImagePositionPatient = [decimal(p + d) for p, d in zip(dataset.ImagePositionPatient, by, strict=True)]
