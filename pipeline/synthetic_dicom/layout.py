"""Where the slices of a volume lie: from a RAS grid to DICOM's positions and directions in LPS+ millimetres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import LPS_TO_RAS, AxisOrder, Grid, spacing_of
from pipeline.io.volume import Volume

# Radiological convention: columns run to the left or the back, rows to the back or down, slices along the normal.
USUAL_ORDERS = {
    0: AxisOrder((2, 0, 1), (False, True, True)),
    1: AxisOrder((0, 2, 1), (True, True, True)),
    2: AxisOrder((0, 1, 2), (True, True, False)),
}
# Lengths and directions are rounded, so that the last digit of another machine's arithmetic does not show in a file.
DECIMALS, DIRECTION_DECIMALS = 9, 12


def decimal(value: float, decimals: int = DECIMALS) -> str:
    """A decimal string of at most 16 characters, DICOM's limit; more digits than that are rounded away."""
    text = f"{round(float(value), decimals) + 0.0:.{decimals}f}".rstrip("0").rstrip(".")
    if len(text) <= 16 and float(text) == round(float(value), decimals):
        return text
    for digits in range(16, 0, -1):
        text = f"{float(value):.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} is no decimal string")


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The slices of a volume in file order (columns, rows, slices).

    Attributes:
        order: From the file's axes to RAS.
        grid: Shape and RAS+ affine in file order; slices run along the normal.
    """

    order: AxisOrder
    grid: Grid

    @property
    def orientation(self) -> list[str]:
        """Six direction cosines: along a row, then down a column."""
        directions = [LPS_TO_RAS * self.grid.affine[:3, axis] / self.grid.spacing[axis] for axis in (0, 1)]
        return [decimal(value, DIRECTION_DECIMALS) for value in np.concatenate(directions)]

    @property
    def pixel_spacing(self) -> list[str]:
        """Distance between rows, then between columns, in mm."""
        return [decimal(self.grid.spacing[axis]) for axis in (1, 0)]

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the slices, RAS."""
        i, j = (self.grid.affine[:3, axis] / self.grid.spacing[axis] for axis in (0, 1))
        return np.asarray(np.cross(i, j))

    @property
    def slice_spacing(self) -> float:
        """Distance between the planes of two slices in mm; less than that of the voxels where the grid is sheared."""
        return float(self.normal @ self.grid.affine[:3, 2])

    def position(self, k: int) -> list[str]:
        """Centre of the first pixel of slice `k`, LPS+ mm."""
        return [decimal(value) for value in LPS_TO_RAS * (self.grid.affine[:3, 3] + k * self.grid.affine[:3, 2])]

    def slices(self, channel: NDArray[Any]) -> NDArray[Any]:
        """(I, J, K) in RAS order to a view (slices, rows, columns)."""
        view: NDArray[Any] = self.order.from_ras(channel).transpose(2, 1, 0)
        return view

    def from_slices(self, slices: NDArray[Any]) -> NDArray[Any]:
        """(slices, rows, columns) to a view (I, J, K) in RAS order."""
        return self.order.to_ras(slices.transpose(2, 1, 0))


def make_layout(volume: Volume, slice_axis: Literal[0, 1, 2] | None) -> Layout:
    """The slices of `volume` along a RAS axis, or by default as in its source.

    Raises:
        ValueError: Rows and columns would not be at right angles, which DICOM cannot say.
    """
    if slice_axis is None and volume.source is not None:
        order = volume.source.order
    else:
        order = USUAL_ORDERS[2 if slice_axis is None else slice_axis]
    grid = _file_grid(volume.grid, order)
    if np.linalg.det(grid.affine[:3, :3]) < 0:
        ras = order.source_axis.index(2)
        flipped = [flip != (axis == ras) for axis, flip in enumerate(order.flipped)]
        order = AxisOrder(order.source_axis, (flipped[0], flipped[1], flipped[2]))
        grid = _file_grid(volume.grid, order)
    i, j = (grid.affine[:3, axis] / spacing_of(grid.affine)[axis] for axis in (0, 1))
    if abs(i @ j) > 1e-6:
        raise ValueError("rows and columns are not at right angles; choose another slice axis")
    return Layout(order=order, grid=grid)


def _file_grid(ras: Grid, order: AxisOrder) -> Grid:
    shape = tuple(ras.shape[order.source_axis.index(axis)] for axis in range(3))
    lattice = Grid((shape[0], shape[1], shape[2]), np.eye(4))
    to_ras = np.rint(np.linalg.inv(order.grid_to_ras(lattice).affine))
    return Grid(lattice.shape, ras.affine @ to_ras)
