"""Grids, affines and orientations: the one place that knows how voxels lie in space.

Legend: arrays are (C, I, J, K); an affine is 4x4 and takes voxel indices (i, j, k) to RAS+ millimetres.
"RAS order" means that i, j and k run closest to right, anterior and superior; oblique angles stay in the affine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

Affine = NDArray[np.float64]
Shape3 = tuple[int, int, int]
Spacing = tuple[float, float, float]

# Signs of x, y and z that take DICOM's LPS+ places and directions to RAS+, and back.
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
SMALLEST_VOXEL_MM = 1e-4
AFFINE_TOLERANCE_MM = 1e-2
AFFINE_TOLERANCE_VOXELS = 0.1


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxels in space.

    Attributes:
        shape: Number of voxels along i, j, k.
        affine: 4x4, voxel indices to RAS+ millimetres.
    """

    shape: Shape3
    affine: Affine

    @property
    def spacing(self) -> Spacing:
        """Distance between neighbouring voxel centres along i, j, k in millimetres."""
        return spacing_of(self.affine)

    def is_close(self, other: Grid) -> bool:
        """Whether both grids have the same shape, and corners that lie as close as rounded headers leave them.

        That is a tenth of the smallest voxel, or a hundredth of a millimetre where that is more.
        """
        tolerance_mm = max(AFFINE_TOLERANCE_MM, AFFINE_TOLERANCE_VOXELS * min(self.spacing))
        return self.shape == other.shape and self.distance_mm(other) <= tolerance_mm

    def distance_mm(self, other: Grid) -> float:
        """The largest distance between the corners of this grid under both affines, in millimetres."""
        corners = np.array(np.meshgrid(*[[0, n - 1] for n in self.shape], indexing="ij")).reshape(3, -1)
        homogeneous = np.vstack([corners, np.ones(corners.shape[1])])
        return float(np.linalg.norm(((self.affine - other.affine) @ homogeneous)[:3], axis=0).max())


def spacing_of(affine: Affine) -> Spacing:
    """Voxel sizes along i, j, k in millimetres: the column norms of the affine."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def axis_codes(affine: Affine) -> str:
    """Where i, j and k run to, closest: `RAS`, `LPS`, ... (nibabel decides)."""
    from nibabel.orientations import aff2axcodes

    return "".join(code or "?" for code in aff2axcodes(affine))  # type: ignore[no-untyped-call]


def check_affine(affine: Affine, where: str) -> None:
    """Raise `InputError` when `affine` cannot place voxels in space (not finite, or singular)."""
    if not np.all(np.isfinite(affine)):
        raise InputError("the affine is not finite", where=where, fix="Repair the header (sform/qform)")
    spacing = spacing_of(affine)
    volume = abs(np.linalg.det(affine[:3, :3]))
    if min(spacing) < SMALLEST_VOXEL_MM or volume < 1e-6 * np.prod(spacing):
        raise InputError(
            f"the affine is singular (voxel size {format_spacing(spacing)} mm, determinant {volume:.2g})",
            where=where,
            fix="Repair the header (sform/qform)",
        )


def format_spacing(spacing: Sequence[float]) -> str:
    """`1 x 0.5 x 3`, for messages."""
    return " x ".join(f"{value:.4g}" for value in spacing)


def format_shape(shape: Sequence[int]) -> str:
    """`35 x 50 x 36`, for messages."""
    return " x ".join(str(n) for n in shape)


@dataclass(frozen=True)
class AxisOrder:
    """How the axes of a file lie against RAS order.

    Attributes:
        source_axis: For each RAS-ordered axis, the axis of the file that it comes from.
        flipped: For each RAS-ordered axis, whether it runs against that file axis.
    """

    source_axis: Shape3
    flipped: tuple[bool, bool, bool]

    @classmethod
    def of(cls, affine: Affine) -> AxisOrder:
        """The order that brings `affine` closest to RAS+ (nibabel's `io_orientation` decides)."""
        from nibabel.orientations import io_orientation

        ornt = io_orientation(affine)  # type: ignore[no-untyped-call]
        if np.isnan(ornt).any():
            raise InputError("two axes of the affine point the same way", fix="Repair the header (sform/qform)")
        source = [int(np.flatnonzero(ornt[:, 0] == ras)[0]) for ras in range(3)]
        return cls((source[0], source[1], source[2]), tuple(bool(ornt[s, 1] < 0) for s in source))  # type: ignore[arg-type]

    def to_ras(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of `array` (..., 3 file axes) in RAS order."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + axis for axis in self.source_axis))
        return self._flip(moved)

    def from_ras(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of `array` (..., I, J, K) in the file's own axis order; inverse of `to_ras`."""
        lead = array.ndim - 3
        back = np.argsort(self.source_axis)
        view: NDArray[Any] = self._flip(array).transpose(*range(lead), *(lead + int(axis) for axis in back))
        return view

    def grid_to_ras(self, grid: Grid) -> Grid:
        """The same lattice with its axes in RAS order."""
        shape = tuple(grid.shape[axis] for axis in self.source_axis)
        to_file = np.zeros((4, 4))
        to_file[3, 3] = 1.0
        for ras, (axis, flip) in enumerate(zip(self.source_axis, self.flipped, strict=True)):
            to_file[axis, ras] = -1.0 if flip else 1.0
            to_file[axis, 3] = grid.shape[axis] - 1 if flip else 0.0
        return Grid((shape[0], shape[1], shape[2]), grid.affine @ to_file)

    def _flip(self, array: NDArray[Any]) -> NDArray[Any]:
        i, j, k = (slice(None, None, -1) if flip else slice(None) for flip in self.flipped)
        view: NDArray[Any] = array[..., i, j, k]
        return view


def boxes_touch(one: Grid, other: Grid) -> bool:
    """Whether the boxes along the axes of space that hold the voxel centres of both grids have a point in common."""
    boxes = [_box(grid) for grid in (one, other)]
    return bool((boxes[0][0] <= boxes[1][1]).all() and (boxes[1][0] <= boxes[0][1]).all())


def _box(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in grid.shape], indexing="ij")).reshape(3, -1)
    world = grid.affine[:3, :3] @ corners + grid.affine[:3, 3:]
    return world.min(axis=1), world.max(axis=1)


def cropped_grid(grid: Grid, start: Sequence[int], shape: Shape3) -> Grid:
    """The part of `grid` that begins at voxel `start` and has `shape`."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.affine[:3, :3] @ np.asarray(start, float) + grid.affine[:3, 3]
    return Grid(shape, affine)


def respaced_grid(grid: Grid, spacing: Spacing) -> Grid:
    """The grid of about `spacing` that covers the same box as `grid`, voxel borders aligned.

    The shape is rounded, and the affine follows the true ratio of the shapes, so that resampling there and back
    returns to exactly the same place.
    """
    old = np.asarray(grid.shape, float)
    new = np.maximum(1, np.round(old * np.asarray(grid.spacing) / np.asarray(spacing))).astype(int)
    ratio = old / new
    affine = grid.affine.copy()
    affine[:3, :3] = grid.affine[:3, :3] * ratio
    affine[:3, 3] = grid.affine[:3, :3] @ (ratio / 2 - 0.5) + grid.affine[:3, 3]
    return Grid((int(new[0]), int(new[1]), int(new[2])), affine)
