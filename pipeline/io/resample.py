"""Volumes onto another grid, by both affines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Affine, Grid, Shape3
from pipeline.io.volume import Volume

# Headers hold float32 affines, so a point on the border of the volume may come out this far beyond it.
BORDER_SLACK_VOXELS = 1e-4


def resample_volume(volume: Volume, grid: Grid, *, order: int = 1) -> Volume:
    """Bring a volume onto `grid`, one channel at a time.

    Points in the outer half of a border voxel take its value (or, above order 0, the nearest edge's); points outside
    the volume are zero.

    Args:
        volume: (C, I, J, K) on its own grid.
        grid: The grid to land on.
        order: Spline order of `scipy.ndimage.affine_transform`: 0 for labels, 1 (linear) for images.

    Returns:
        (C, I, J, K) on `grid`, without a source. The dtype stays, but integers become float32 above order 0.
    """
    from scipy.ndimage import affine_transform

    to_voxels = np.linalg.inv(volume.grid.affine) @ grid.affine
    outside = _outside(to_voxels, volume.grid.shape, grid.shape)
    matrix, offset = to_voxels[:3, :3], to_voxels[:3, 3]
    keep = order == 0 or volume.array.dtype.kind == "f"
    array = np.empty((volume.num_channels, *grid.shape), volume.array.dtype if keep else np.float32)
    for channel, result in zip(volume.array, array, strict=True):
        affine_transform(channel, matrix, offset, grid.shape, result, order, mode="nearest")
        result[outside] = 0
    return Volume(array, grid)


def _outside(to_voxels: Affine, source_shape: Shape3, target_shape: Shape3) -> NDArray[np.bool_]:
    """(I, J, K) whether the centre of each target voxel lies outside the box that the source voxels fill."""
    outside = np.zeros(target_shape, bool)
    j, k = np.ogrid[: target_shape[1], : target_shape[2]]
    for (a, b, c, offset), size in zip(to_voxels[:3], source_shape, strict=True):
        plane = b * j + c * k + offset
        for i in range(target_shape[0]):
            position = plane + a * i
            outside[i] |= (position < -0.5 - BORDER_SLACK_VOXELS) | (position > size - 0.5 + BORDER_SLACK_VOXELS)
    return outside
