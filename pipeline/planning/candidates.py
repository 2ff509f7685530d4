"""Which patches come into question: from the whole median case downwards, and below a chosen one for its network."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from pipeline.geometry import Shape3, Spacing
from pipeline.planning.topology import make_topology, round_up_patch

# An axis is not cut below this many voxels: patches without context do not train.
SMALLEST_EDGE = 16
# Each patch that a training may fall back to has about this share of the voxels of the one before, down to the least.
FALLBACK_SHARE = 0.75
LEAST_FALLBACK_SHARE = 0.2


def patch_candidates(median_shape: Shape3, spacing: Spacing) -> tuple[Shape3, ...]:
    """Patches from the whole median case downwards, each within the one before.

    The axis that is largest against the median case gives way, by one stride of the network, so that the aspect stays
    near the median's. This is the order in which nnU-Net's planner shrinks its patch.
    """
    patch = round_up_patch(median_shape, spacing)
    candidates = [patch]
    while smaller := _next_smaller(patch, median_shape, spacing):
        candidates.append(smaller)
        patch = smaller
    return tuple(candidates)


def _next_smaller(patch: Shape3, median_shape: Shape3, spacing: Spacing) -> Shape3 | None:
    strides = make_topology(patch, spacing).total_stride
    for axis in _axes_by_share(patch, median_shape):
        edges = list(patch)
        edges[axis] -= max(strides[axis], 2)
        if edges[axis] < SMALLEST_EDGE:
            continue
        smaller = round_up_patch((edges[0], edges[1], edges[2]), spacing)
        if smaller != patch and all(a <= b for a, b in zip(smaller, patch, strict=True)):
            return smaller
    return None


def _axes_by_share(patch: Shape3, whole: Shape3) -> list[int]:
    """Axes in the order in which they give way: the one that is largest against the whole first."""
    return sorted(range(3), key=lambda axis: (-patch[axis] / whole[axis], -patch[axis]))


def fallback_patches(patch_size: Shape3, stride: Shape3) -> Iterator[Shape3]:
    """Ever smaller patches of about the same aspect that a network of total stride `stride` can train on.

    An axis that is short already stays as it is, and so does one of which the lowest stage would see a single voxel.
    """
    patch, last = patch_size, prod(patch_size)
    while True:
        patch = _without_a_stride(patch, patch_size, stride)
        if prod(patch) < LEAST_FALLBACK_SHARE * prod(patch_size) or patch == (0, 0, 0):
            return
        if prod(patch) <= FALLBACK_SHARE * last:
            last = prod(patch)
            yield patch


def _without_a_stride(patch: Shape3, whole: Shape3, stride: Shape3) -> Shape3:
    """The patch with one axis shorter by a stride, or (0, 0, 0) where none may be."""
    for axis in _axes_by_share(patch, whole):
        edges = list(patch)
        edges[axis] -= stride[axis]
        if edges[axis] >= max(SMALLEST_EDGE, 2 * stride[axis]):
            return edges[0], edges[1], edges[2]
    return 0, 0, 0
