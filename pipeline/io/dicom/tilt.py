"""Stacks of a tilted gantry, whose slices are shifted against each other, on a rectangular grid and back."""

from __future__ import annotations

import numpy as np

from pipeline.geometry import Grid
from pipeline.io.dicom.stacks import LARGEST_LEAN_DEGREES
from pipeline.io.resample import resample_volume
from pipeline.io.volume import SourceGrid, Volume


def is_sheared(source: SourceGrid) -> bool:
    """Whether the steps of a stack lean against the normal of its slices by more than rounding does."""
    axes = source.grid.affine[:3, :3] / np.linalg.norm(source.grid.affine[:3, :3], axis=0)
    lean = np.sqrt((axes[:, 0] @ axes[:, 2]) ** 2 + (axes[:, 1] @ axes[:, 2]) ** 2)
    return bool(lean > np.sin(np.radians(LARGEST_LEAN_DEGREES)))


def upright_grid(source: SourceGrid) -> Grid:
    """The RAS-ordered grid that a stack is read on: its own, or a rectangular one that holds all of a sheared one.

    The rectangular one keeps the axes of the slices and takes their normal as the third, with the distance of the
    slices along it.
    """
    ras = source.order.grid_to_ras(source.grid)
    if not is_sheared(source):
        return ras
    through = source.order.source_axis.index(2)
    affine = ras.affine.copy()
    first, second = (affine[:3, axis] for axis in range(3) if axis != through)
    normal = np.cross(first, second) / np.linalg.norm(np.cross(first, second))
    affine[:3, through] = normal * (normal @ affine[:3, through])
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in ras.shape], indexing="ij")).reshape(3, -1)
    world = ras.affine[:3, :3] @ corners + ras.affine[:3, 3:]
    inside = np.linalg.inv(affine[:3, :3]) @ (world - affine[:3, 3:])
    low, high = np.floor(inside.min(axis=1) + 1e-6), np.ceil(inside.max(axis=1) - 1e-6)
    affine[:3, 3] += affine[:3, :3] @ low
    shape = (high - low + 1).astype(int)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def upright(volume: Volume, *, order: int = 1) -> Volume:
    """A volume as read from its files on the grid that it is used on; the same one unless it is sheared.

    Args:
        volume: (C, I, J, K) on its source's grid; its values may be changed.
        order: 1 (linear) for intensities, 0 for labels.

    Returns:
        Voxels that no slice covers have the lowest value of their channel; those of a label are 0.
    """
    if volume.source is None or not is_sheared(volume.source):
        return volume
    lowest = volume.array.min(axis=(1, 2, 3), keepdims=True) if order else np.zeros((), volume.array.dtype)
    volume.array[...] -= lowest
    resampled = resample_volume(volume, upright_grid(volume.source), order=order)
    return Volume(resampled.array + lowest, resampled.grid, volume.source)


def back_to_slices(label: Volume) -> Volume:
    """A label on the grid of its source, where every plane is one of the source's slices; nearest neighbour."""
    if label.source is None or not is_sheared(label.source):
        return label
    native = resample_volume(label, label.source.order.grid_to_ras(label.source.grid), order=0)
    return Volume(native.array, native.grid, label.source)
