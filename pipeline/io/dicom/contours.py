"""Closed contours to voxels: even-odd filling by scan lines, all slices of a structure at once.

Legend: points are in voxels of the grid in file order, (i, j) within a slice and k across; a voxel's centre is at whole
numbers. j is the scan line, and a crossing is where a contour's edge passes from one side of a scan line to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Shape3

# Contours often run exactly through voxel centres. Rounding takes the noise of the affine (about 1e-12) away, so that
# the rule below decides on such a centre, and not the last bit of a product.
DECIMALS = 6


@dataclass(frozen=True, eq=False)
class Contours:
    """The closed contours of one structure; each joins its last point to its first.

    Attributes:
        points: (P, 2) i and j of all contours, one after the other, in voxels.
        lengths: (n,) number of points of each contour, none 0.
        slices: (n,) k of each contour, within the grid.
    """

    points: NDArray[np.float64]
    lengths: NDArray[np.intp]
    slices: NDArray[np.intp]


def fill_contours(contours: Contours, shape: Shape3) -> NDArray[np.bool_]:
    """Voxels whose centre lies inside an odd number of contours of their slice.

    So a contour within another is a hole, a contour that overlaps another excludes what they share, and a keyhole's
    channel of no width leaves no trace; direction does not matter. A centre on an edge is inside where the interior
    follows in the direction of i (or, along i, of j): shapes that share an edge share no voxel and miss none.
    What lies outside of the grid in its plane is cut.

    Args:
        contours: In voxels of a grid of `shape`.
        shape: (i, j, k).

    Returns:
        (i, j, k) bool, C-contiguous. Untouched memory stays untouched, so a small structure costs little.
    """
    mask = np.zeros(shape, np.uint8)
    i, j, k = _crossings(contours, shape[1])
    if j.size:
        right = i < shape[0]
        # Counts wrap at 256, which keeps what is asked of them: odd or even.
        np.add.at(mask.reshape(-1), np.ravel_multi_index((i[right], j[right], k[right]), shape), np.uint8(1))
        box = mask[i.min() : i.max() + 1, j.min() : j.max() + 1, k.min() : k.max() + 1]
        _accumulate_parity(box)
    return mask.view(np.bool_)


def _accumulate_parity(box: NDArray[np.uint8]) -> None:
    """Along i, in place: the number of crossings at or before each voxel, modulo 2."""
    box &= 1
    for before, plane in pairwise(box):
        plane ^= before


def _crossings(contours: Contours, num_rows: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """(i, j, k) of every first voxel at or behind a crossing on a scan line of the grid; i is 0 or more."""
    low, high = _edges(contours)
    # An edge owns the scan lines from its lower end, inclusive, to its upper end, exclusive: a vertex counts once.
    first, stop = (np.clip(np.ceil(end[:, 1]), 0, num_rows).astype(np.intp) for end in (low, high))
    count = stop - first
    edge = np.repeat(np.arange(count.size), count)
    j = first[edge] + np.arange(edge.size) - np.repeat(np.cumsum(count) - count, count)
    start, run = low[edge], (high - low)[edge]
    i = start[:, 0] + (j - start[:, 1]) * (run[:, 0] / run[:, 1])
    k = np.repeat(contours.slices, contours.lengths)[edge]
    return np.maximum(np.ceil(np.round(i, DECIMALS)), 0).astype(np.intp), j, k


def _edges(contours: Contours) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends (P, 2) of all edges, that of lower j first: an edge walked both ways gives the same crossings to the bit."""
    points = np.round(contours.points, DECIMALS)
    following = np.arange(1, len(points) + 1)
    ends = np.cumsum(contours.lengths)
    following[ends - 1] = ends - contours.lengths
    other = points[following]
    upwards = (points[:, 1] <= other[:, 1])[:, None]
    return np.where(upwards, points, other), np.where(upwards, other, points)
