"""DICOM RT structure sets to masks on the grid of the image they were drawn on.

Legend: contours are in DICOM's LPS+ millimetres, grids in RAS+; masks are in file order (i, j, k) = (columns, rows,
slices). Messages name structures, slices and places, and nothing else of the file: it holds the patient's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import LPS_TO_RAS, Grid, check_affine
from pipeline.io.dicom.contours import Contours, fill_contours
from pipeline.io.dicom.rtstruct_file import EXPORT_AGAIN, Roi, read_rois
from pipeline.io.dicom.structures import Structure
from pipeline.log import get_logger

# A contour belongs to a slice when all its points lie this close to it. Real files are off by up to 0.012 slices, where
# they were drawn on a CT and copied to a PET; half a slice would be as wrong as can be.
SLICE_TOLERANCE = 0.1
ROUNDING_MM = 0.01
FARTHEST_MM = 1e6
CLOSED_TYPES = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
OPEN_TYPES = ("POINT", "OPEN_PLANAR", "OPEN_NONPLANAR")
_OTHER_SERIES = "Give the series that the structures were drawn on, all of it, or leave this one out"

logger = get_logger("rtstruct")


def iter_structures(path: Path, grid: Grid, *, wanted: Callable[[str], bool]) -> Iterator[Structure]:
    """Masks of the wanted structures, one at a time, in the order of the file.

    A voxel is inside where its centre is; contours on one slice combine by exclusive or, so a contour within another is
    a hole. The grid may be oblique or sheared. Contours that reach beyond the image within their slice are cut, and
    slices without a contour between others stay empty; both are logged, and so is what is not drawn: open contours and
    points, contours of less than three points, and structures that have nothing else, which yield no mask.

    Args:
        path: The RT structure set; read, and its header checked, before this returns.
        grid: Of the image in file order, RAS+ affine.
        wanted: Whether to draw the structure of that name.

    Raises:
        InputError: No file, not an RT structure set, or truncated or malformed. On iteration: contour data that cannot
            be used, or a contour off the image's slices (more than a tenth of a slice plus 0.01 mm), beyond its first
            or last slice, or, with all others of its structure, beside it: such a structure was drawn on another
            series or a longer one, and part of it would be lost.
    """
    check_affine(grid.affine, "the image's grid")
    return chain.from_iterable(_draw(roi, grid) for roi in read_rois(path, wanted))


def _draw(roi: Roi, grid: Grid) -> Iterator[Structure]:
    """One structure, or none. As an iterator it lets go of the mask before the next one is made."""
    contours = [_points(raw, roi) for raw in _closed_contours(roi)]
    drawable = [points for points in contours if len(points) >= 3]
    if len(drawable) < len(contours):
        logger.warning("%s: %d contour(s) of less than 3 points left out", roi.place, len(contours) - len(drawable))
    if not drawable:
        logger.warning("%s: no closed contours, left out", roi.place)
        return
    placed = _on_slices(drawable, grid, roi)
    _check_in_plane(placed, grid, roi)
    _report_gaps(placed, roi)
    mask = fill_contours(placed, grid.shape)
    if not mask.any():
        logger.warning("%s: too small to hold the centre of a voxel, its mask is empty", roi.place)
    yield Structure(roi.name, roi.number, mask)


def _closed_contours(roi: Roi) -> list[bytes]:
    """Data of the closed contours, each once; what is left out is logged."""
    closed = [data for kind, data in roi.contours if kind in CLOSED_TYPES]
    others = [kind if kind in OPEN_TYPES else "unknown type" for kind, _ in roi.contours if kind not in CLOSED_TYPES]
    for kind in sorted(set(others)):
        logger.warning("%s: %d contour(s) left out, not closed: %s", roi.place, others.count(kind), kind)
    # By exclusive or, a contour that was exported twice would erase itself.
    once = list(dict.fromkeys(closed))
    if len(once) < len(closed):
        logger.warning("%s: %d contour(s) are there twice, taken once", roi.place, len(closed) - len(once))
    return once


def _points(data: bytes, roi: Roi) -> NDArray[np.float64]:
    """(n, 3) LPS+ mm of one contour."""
    try:
        values = np.array([float(text) for text in data.rstrip(b" \0").split(b"\\")] if data.strip(b" \0") else [])
    except ValueError:
        raise InputError("contour data that are not numbers", where=roi.place, fix=EXPORT_AGAIN) from None
    if values.size % 3:
        text = f"a contour of {values.size} values, which is not a multiple of 3"
        raise InputError(text, where=roi.place, fix=EXPORT_AGAIN)
    if not np.all(np.abs(values) < FARTHEST_MM):
        raise InputError("a contour with a point at no finite place", where=roi.place, fix=EXPORT_AGAIN)
    return values.reshape(-1, 3)


def _on_slices(contours: list[NDArray[np.float64]], grid: Grid, roi: Roi) -> Contours:
    """The contours in voxels, checked to lie on slices of the grid."""
    lengths = np.array([len(points) for points in contours], np.intp)
    places = np.concatenate(contours)
    voxels, slices_per_mm = _to_voxels(places, grid)
    k = voxels[:, 2]
    slices = np.rint(np.add.reduceat(k, np.cumsum(lengths) - lengths) / lengths)
    off = np.abs(k - np.repeat(slices, lengths))
    worst = int(np.argmax(off))
    if off[worst] > SLICE_TOLERANCE + ROUNDING_MM * slices_per_mm:
        text = f"a contour lies {off[worst] / slices_per_mm:.2f} mm off the nearest slice at {_format(places[worst])}"
        raise InputError(text, where=roi.place, fix=_OTHER_SERIES)
    outside = (slices < 0) | (slices >= grid.shape[2])
    if outside.any():
        text = f"{outside.sum()} of {len(contours)} contours lie before the first slice or behind the last"
        first = contours[int(np.argmax(outside))][0]
        raise InputError(f"{text}, such as at {_format(first)}", where=roi.place, fix=_OTHER_SERIES)
    return Contours(np.ascontiguousarray(voxels[:, :2]), lengths, slices.astype(np.intp))


def _to_voxels(places: NDArray[np.float64], grid: Grid) -> tuple[NDArray[np.float64], float]:
    """LPS+ mm (n, 3) to voxels (n, 3), and slices per millimetre along their normal.

    By columns and not by a matrix product, which may round rows differently: equal points must stay equal to the bit.
    """
    inverse = np.linalg.inv(grid.affine)
    x, y, z = (places * LPS_TO_RAS).T
    voxels = np.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in inverse[:3]], axis=1)
    return voxels, float(np.linalg.norm(inverse[2, :3]))


def _check_in_plane(contours: Contours, grid: Grid, roi: Roi) -> None:
    """Raise where all contours lie beside the image; log where some reach beyond it."""
    size = np.asarray(grid.shape[:2]) - 0.5
    starts = np.cumsum(contours.lengths) - contours.lengths
    low, high = np.minimum.reduceat(contours.points, starts), np.maximum.reduceat(contours.points, starts)
    if not np.any(np.all((high > -0.5) & (low < size), axis=1)):
        raise InputError("all contours lie beside the image", where=roi.place, fix=_OTHER_SERIES)
    beyond = np.any((low < -0.5) | (high > size), axis=1)
    if beyond.any():
        logger.warning("%s: %d contour(s) reach beyond the image and are cut at its border", roi.place, beyond.sum())


def _report_gaps(contours: Contours, roi: Roi) -> None:
    used = np.unique(contours.slices)
    missing = int(used[-1] - used[0] + 1 - used.size)
    if missing:
        text = "%s: %d slice(s) without a contour between its first and last stay empty, nothing is interpolated"
        logger.warning(text, roi.place, missing)


def _format(place: NDArray[np.float64]) -> str:
    return "x, y, z = " + ", ".join(f"{value:.2f}" for value in place) + " mm (LPS)"
