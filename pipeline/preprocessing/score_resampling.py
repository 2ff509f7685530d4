"""Scores from the prepared grid to the native grid, box by box: the very values of the whole, for any box of it.

Linear interpolation is separable and reaches two voxels, so a box of the result needs hardly more than the same box of
the source. Every value is made of the same products in the same order, whatever the box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Shape3
from pipeline.preprocessing.resample import apply_matrix, axis_orders, changing_axes, interpolation_matrix

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class ScoreResampling:
    """Linear resampling between two grids over the same box of space, as `resample_scores` does it.

    Attributes:
        source_shape: (I, J, K) that scores come in.
        shape: (I, J, K) that they are brought to.
        anisotropic_axis: Axis along which the nearest plane is taken instead; None treats all alike.
    """

    source_shape: Shape3
    shape: Shape3
    anisotropic_axis: int | None = None

    @cached_property
    def _matrices(self) -> dict[int, Any]:
        orders = axis_orders(1, self.anisotropic_axis)
        axes = changing_axes(self.source_shape, self.shape)
        return {axis: interpolation_matrix(self.source_shape[axis], self.shape[axis], orders[axis]) for axis in axes}

    @cached_property
    def _reach(self) -> dict[int, tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """First and last source voxel of every voxel, by axis."""
        reach = {}
        for axis, matrix in self._matrices.items():
            ends = matrix.indptr
            reach[axis] = (
                np.minimum.reduceat(matrix.indices, ends[:-1]),
                np.maximum.reduceat(matrix.indices, ends[:-1]),
            )
        return reach

    def is_identity(self, axis: int) -> bool:
        """Whether nothing changes along an axis."""
        return self.source_shape[axis] == self.shape[axis]

    def source_side(self, axis: int, side: slice) -> slice:
        """The source voxels along an axis that voxels of the result are made from."""
        if self.is_identity(axis):
            return side
        first, last = self._reach[axis]
        return slice(int(first[side.start]), int(last[side.stop - 1]) + 1)

    def source_box(self, box: Box) -> Box:
        """The box of the source that a box of the result is made from."""
        i, j, k = (self.source_side(axis, side) for axis, side in enumerate(box))
        return i, j, k

    def num_ready(self, axis: int, num_source: int) -> int:
        """How many planes of the result the first `num_source` planes of the source are enough for."""
        if self.is_identity(axis):
            return num_source
        return int(np.searchsorted(self._reach[axis][1], num_source))

    def apply(self, scores: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
        """A box of the result.

        Args:
            scores: (n, i, j, k) of `source_box(box)`.
            box: Of the result.

        Returns:
            (n, *box), the scores themselves where nothing changes.
        """
        for axis in changing_axes(self.source_shape, self.shape):
            side = self.source_side(axis, box[axis])
            matrix = self._matrices[axis][box[axis], side.start : side.stop]
            scores = apply_matrix(matrix, scores, axis + 1)
        return scores
