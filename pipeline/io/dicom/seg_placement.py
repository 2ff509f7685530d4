"""Where a frame of a segmentation lies on the grid of an image: by geometry alone, to a tenth of a voxel.

Legend: a frame is (rows, columns); u runs along a row of its pixels, v down a column. Voxels are (i, j, k) in the
image's file order. DICOM's LPS+ millimetres become RAS+ here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import AFFINE_TOLERANCE_VOXELS, LPS_TO_RAS, Grid
from pipeline.io.dicom.frames import Vector

# Cosines of the files are rounded to about six digits.
_COSINE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plane:
    """A frame in space.

    Attributes:
        position: Centre of the first pixel, LPS+ mm.
        row_direction, column_direction: Unit vectors along u and v, LPS+.
        row_spacing, column_spacing: Between rows (along v), and between columns (along u), in mm.
        rows, columns: Pixels along v and u.
    """

    position: Vector
    row_direction: Vector
    column_direction: Vector
    row_spacing: float
    column_spacing: float
    rows: int
    columns: int


@dataclass(frozen=True)
class Placement:
    """Voxels that a frame covers; they may reach out of the grid.

    Attributes:
        start: Voxel of the first pixel.
        u_axis, v_axis: Axes of the grid that u and v run along.
        u_sign, v_sign: 1 or -1, against the axis.
    """

    start: tuple[int, int, int]
    u_axis: int
    v_axis: int
    u_sign: int
    v_sign: int

    @property
    def normal_axis(self) -> int:
        """The axis that the frame does not extend along."""
        return 3 - self.u_axis - self.v_axis

    def box(self, plane: Plane) -> tuple[tuple[int, int], ...]:
        """First and last voxel along i, j and k, for telling frames at one place."""
        ends = list(self.start)
        ends[self.u_axis] += self.u_sign * (plane.columns - 1)
        ends[self.v_axis] += self.v_sign * (plane.rows - 1)
        return tuple((min(pair), max(pair)) for pair in zip(self.start, ends, strict=True))

    def window(self, array: NDArray[Any], frame: NDArray[Any], background: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A view of `array` (i, j, k) and the part of `frame` (rows, columns) that belongs there, of the same shape.

        Raises:
            InputError: The frame has pixels other than `background` outside of the grid.
        """
        columns = self.start[self.u_axis] + self.u_sign * np.arange(frame.shape[1])
        rows = self.start[self.v_axis] + self.v_sign * np.arange(frame.shape[0])
        outside_u = _outside(columns, array.shape[self.u_axis])
        outside_v = _outside(rows, array.shape[self.v_axis])
        normal = self.start[self.normal_axis]
        outside_n = int(_outside(np.array([normal]), array.shape[self.normal_axis])[0])
        if outside_n or outside_u.any() or outside_v.any():
            farthest = np.maximum(np.maximum(outside_v[:, None], outside_u[None, :]), outside_n)
            _check_nothing_outside(int((farthest * (frame != background)).max(initial=0)))
        index: list[Any] = [slice(0, 0)] * 3
        if outside_n:
            index[self.normal_axis] = 0
            return array[tuple(index)], np.empty((0, 0), frame.dtype)
        index[self.normal_axis] = normal
        index[self.u_axis], part_u = _overlap(columns, outside_u)
        index[self.v_axis], part_v = _overlap(rows, outside_v)
        part = frame[part_v, part_u]
        return array[tuple(index)], part.T if self.u_axis < self.v_axis else part


def place(plane: Plane, grid: Grid) -> Placement:
    """Where `plane` lies on `grid` (file order, RAS+ affine).

    Raises:
        InputError: The plane's numbers are unusable, or a corner of it is more than a tenth of a voxel away from a
            voxel of the (extended) grid.
    """
    _check_usable(plane)
    inverse = np.linalg.inv(grid.affine)
    origin = inverse[:3, :3] @ (LPS_TO_RAS * plane.position) + inverse[:3, 3]
    u = inverse[:3, :3] @ (LPS_TO_RAS * plane.row_direction) * plane.column_spacing
    v = inverse[:3, :3] @ (LPS_TO_RAS * plane.column_direction) * plane.row_spacing
    u_axis = int(np.abs(u).argmax())
    v_axis = max((axis for axis in range(3) if axis != u_axis), key=lambda axis: abs(v[axis]))
    u_sign, v_sign = (1 if u[u_axis] > 0 else -1), (1 if v[v_axis] > 0 else -1)
    start = np.rint(origin)
    u_error, v_error = u - u_sign * np.eye(3)[u_axis], v - v_sign * np.eye(3)[v_axis]
    corners = [(c, r) for c in (0, plane.columns - 1) for r in (0, plane.rows - 1)]
    errors = np.array([origin - start + c * u_error + r * v_error for c, r in corners])
    _check_on_lattice(errors, grid)
    i, j, k = (int(index) for index in start)
    return Placement((i, j, k), u_axis, v_axis, u_sign, v_sign)


def _check_usable(plane: Plane) -> None:
    directions = np.array([plane.row_direction, plane.column_direction])
    is_orthonormal = np.allclose(directions @ directions.T, np.eye(2), atol=_COSINE_TOLERANCE)
    spacings = (plane.row_spacing, plane.column_spacing)
    if not (is_orthonormal and np.isfinite(plane.position).all() and np.isfinite(spacings).all()):
        raise InputError("a frame has a position, orientation or spacing that cannot be used")
    if min(spacings) <= 0:
        raise InputError("a frame has a pixel spacing that is not positive")


def _check_on_lattice(errors: NDArray[np.float64], grid: Grid) -> None:
    voxels = float(np.abs(errors).max())
    if voxels <= AFFINE_TOLERANCE_VOXELS:
        return
    distance = float(np.linalg.norm(errors @ grid.affine[:3, :3].T, axis=1).max())
    raise InputError(
        f"the segmentation does not lie on the image's voxels: off by up to {voxels:.3g} voxels ({distance:.3g} mm)",
        fix="Resample it to the image, or choose the series that it was drawn on",
    )


def check_slice_spacing(placements: Sequence[Placement], declared: float, grid: Grid) -> None:
    """Refuse slices that are a multiple of the image's apart: voxels thicker than the image's, not gaps in a structure.

    Positions alone cannot tell the two apart, so the declared spacing has to say so as well, and every gap has to be a
    multiple of it.

    Args:
        placements: Of all frames.
        declared: SpacingBetweenSlices in mm.
        grid: The image's.

    Raises:
        InputError: The segmentation's slices are thicker than the image's.
    """
    axis = placements[0].normal_axis
    ratio = round(declared / grid.spacing[axis])
    layers = np.unique([placement.start[axis] for placement in placements])
    if ratio > 1 and len(layers) > 2 and not (np.diff(layers) % ratio).any() and (np.diff(layers) == ratio).any():
        raise InputError(
            f"the segmentation's slices are {declared:.4g} mm apart, the image's {grid.spacing[axis]:.4g} mm",
            fix="Resample it to the image, or choose the series that it was drawn on",
        )


def _check_nothing_outside(farthest: int) -> None:
    if farthest:
        raise InputError(
            f"the segmentation reaches out of the image by {farthest} voxel{'s' if farthest > 1 else ''}",
            fix="Choose the series that it was drawn on",
        )


def _outside(voxels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """How many voxels each index lies outside of [0, size); 0 inside."""
    outside: NDArray[np.int64] = np.maximum(np.maximum(-voxels, voxels - (size - 1)), 0)
    return outside


def _overlap(voxels: NDArray[np.int64], outside: NDArray[np.int64]) -> tuple[slice, slice]:
    """The inner voxels of a run as a rising slice of the grid, and the pixels that belong there in that order."""
    inner = np.flatnonzero(outside == 0)
    if not inner.size:
        return slice(0, 0), slice(0, 0)
    first, last = int(inner[0]), int(inner[-1])
    if voxels[first] <= voxels[last]:
        return slice(int(voxels[first]), int(voxels[last]) + 1), slice(first, last + 1)
    return slice(int(voxels[last]), int(voxels[first]) + 1), slice(last, first - 1 if first else None, -1)
