"""Surfaces of masks as small elements of known area, and distances between them.

A surface element sits where eight voxels meet and some, but not all, of them are inside. Its area is that of the
marching-cubes triangles through that point (Lorensen and Cline 1987), as in `surface-distance` (Nikolov et al. 2018);
that package is no dependency because its last release uses names that NumPy 2 removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from pipeline.geometry import Spacing
from pipeline.io.volume import foreground_box

Floats = NDArray[np.float64]

# Columns of the table of patches: half a voxel face across i, j, k; a bevel along an edge in i, j, k; a cut corner.
FACE, BEVEL, CORNER = 0, 3, 6


@dataclass(frozen=True, eq=False)
class Surface:
    """The surface of a mask.

    Attributes:
        points: (N, 3) positions of the elements along i, j, k in millimetres from the first voxel's corner.
        areas: (N,) in square millimetres.
    """

    points: Floats
    areas: Floats

    @property
    def is_empty(self) -> bool:
        """Whether the mask had no voxel."""
        return len(self.areas) == 0


def find_surface(mask: NDArray[np.bool_], spacing: Spacing) -> Surface:
    """Every surface element of a mask; what lies beyond the array counts as outside.

    Args:
        mask: (I, J, K).
        spacing: Voxel size along i, j, k in millimetres.
    """
    if not mask.any():
        return Surface(np.zeros((0, 3)), np.zeros(0))
    box = foreground_box(mask[None])
    codes = _neighbour_codes(mask[box])
    at_surface = (codes != 0) & (codes != 255)
    points = (np.argwhere(at_surface) + [span.start for span in box]) * np.asarray(spacing)
    return Surface(points, element_areas(spacing)[codes[at_surface]])


def directed_distances(start: Surface, end: Surface) -> Floats:
    """(N,) distance in millimetres from each element of `start` to the nearest one of `end`; neither is empty.

    A k-d tree over surface points is exact like a distance transform, and its cost does not grow with the volume.
    """
    distances, _ = cKDTree(end.points).query(start.points)
    return np.asarray(distances, float)


def element_areas(spacing: Spacing) -> Floats:
    """(256,) area in square millimetres of the surface within each neighbourhood of eight voxels, by its code.

    Bit 4a + 2b + c of a code tells whether the voxel at (a, b, c) of the 2 x 2 x 2 neighbourhood is inside.
    """
    a, b, c = spacing
    faces = np.array([b * c, a * c, a * b])
    bevels = [np.linalg.norm(np.delete(faces, axis)) / 4 for axis in range(3)]
    patches = np.array([*(faces / 2), *bevels, np.linalg.norm(faces) / 8])
    return np.asarray(_patch_counts() @ patches, float)


def _neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Code of the eight voxels around every voxel corner: one more along each axis than `mask` has voxels."""
    padded = np.pad(mask, 1).astype(np.uint8)
    shape = [n + 1 for n in mask.shape]
    codes = np.zeros(shape, np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        view = padded[tuple(slice(start, start + n) for start, n in zip(corner, shape, strict=True))]
        codes |= view << bit
    return codes


@cache
def _patch_counts() -> Floats:
    """(256, 7) how many patches of each kind make the surface within a neighbourhood, by its code.

    Each connected group of inside voxels (by faces) has its own sheet, and at most four voxels need be looked at,
    because inside and outside have the same surface. Marching cubes' fifteen cases come down to six kinds of group.
    """
    counts = np.zeros((256, 7))
    for code in range(256):
        inside = np.array([code >> bit & 1 for bit in range(8)], bool).reshape(2, 2, 2)
        groups, num_groups = ndimage.label(inside if inside.sum() <= 4 else ~inside)
        for group in range(1, num_groups + 1):
            counts[code] += _patches_of_group(np.argwhere(groups == group))
    return counts


def _patches_of_group(voxels: NDArray[np.intp]) -> Floats:
    """(7,) patches around one connected group of one to four voxels, given as (N, 3) positions of 0 and 1."""
    counts = np.zeros(7)
    steps = voxels[:, None] != voxels[None]
    neighbours = steps.sum(axis=2) == 1
    degrees = neighbours.sum(axis=1)
    flat = np.flatnonzero(np.ptp(voxels, axis=0) == 0)
    if len(voxels) == 1:
        counts[CORNER] = 1
    elif degrees.max() == 3:
        counts[CORNER] = 6
    elif len(voxels) == 4 and len(flat) == 1:
        counts[FACE + flat[0]] = 2
    elif len(voxels) == 3:
        counts[FACE + flat[0]], counts[CORNER] = 1, 3
    else:
        # A pair, or a chain of four that turns twice: each end is bevelled along its step.
        counts[CORNER] = 4 if len(voxels) == 4 else 0
        for end in np.flatnonzero(degrees == 1):
            counts[BEVEL + np.flatnonzero(steps[end, neighbours[end].argmax()])[0]] += 1
    return counts
