"""A volume in memory: channels of voxels on a RAS-ordered grid, and how they lay in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import AxisOrder, Grid, Spacing


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """How a volume lay in the file it came from, so that results can go back the same way.

    Attributes:
        path: The file, for messages.
        grid: Shape and affine in the file's own axis order.
        order: How the file's axes lie against RAS order.
        header: The reader's own header object (nibabel's for NIfTI, a `Stack` for DICOM); None for volumes made in
            memory.
        num_channels: Channels of the file.
    """

    path: Path
    grid: Grid
    order: AxisOrder
    header: Any = field(default=None, repr=False)
    num_channels: int = 1

    @classmethod
    def in_ras_order(cls, path: Path, grid: Grid) -> SourceGrid:
        """A source whose own axes are in RAS order, for volumes that have left the grid of their file."""
        return cls(path, grid, AxisOrder((0, 1, 2), (False, False, False)))


@dataclass(frozen=True, eq=False)
class Volume:
    """Channels of voxels in RAS order.

    Attributes:
        array: (C, I, J, K), any numeric dtype.
        grid: Shape (I, J, K) and RAS+ affine.
        source: The file's own grid, or None for a volume made in memory.
    """

    array: NDArray[Any]
    grid: Grid
    source: SourceGrid | None = None

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape:
            raise ValueError(f"array {self.array.shape} is not (C, {', '.join(map(str, self.grid.shape))})")

    @property
    def spacing(self) -> Spacing:
        """Voxel size along i, j, k in millimetres."""
        return self.grid.spacing

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return int(self.array.shape[0])

    @classmethod
    def from_array(cls, array: NDArray[Any], affine: NDArray[np.float64]) -> Volume:
        """A volume from (I, J, K) or (C, I, J, K) voxels already in RAS order."""
        channels = array if array.ndim == 4 else array[None]
        shape = (channels.shape[1], channels.shape[2], channels.shape[3])
        return cls(channels, Grid(shape, np.asarray(affine, float)))


def foreground_box(array: NDArray[Any]) -> tuple[slice, slice, slice]:
    """The smallest box (I, J, K) that holds every non-zero voxel of any channel; the whole array when all are zero.

    Args:
        array: (C, I, J, K).
    """
    mask = (array != 0).any(axis=0)
    if not mask.any():
        return slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2])
    spans = []
    for axis in range(3):
        hits = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        spans.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return spans[0], spans[1], spans[2]
