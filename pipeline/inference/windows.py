"""Where the windows lie over a volume, in which order they come, and what each counts for in the blend.

Boxes are three slices, along i, j, k, in voxels of the image. Windows of an image that is smaller than the window reach
beyond it on both sides, so their slices may start below 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.inference.window_threads import WindowThreads

Box = tuple[slice, slice, slice]

SIGMA_SHARE = 1 / 8
SMALLEST_WEIGHT = 1e-3


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """How a volume is swept, whatever its size.

    Attributes:
        window: Size of the windows in voxels.
        num_classes: Number of scores per voxel that the network gives.
        overlap: Least share of a window that its neighbour covers as well; windows are spread evenly, so it may be
            more.
        tta_axes: Spatial axes (0, 1, 2) to mirror. Scores are averaged over all combinations: 2 ** len(tta_axes)
            passes.
        window_batch: Windows that are in the network at once.
        device: Where the network is; None for where the image is.
        mirrored: Axes that are mirrored in every pass, to be mirrored back: one of the passes of `tta_axes` by itself.
        threads: Compute these windows, each for itself, instead of one batch of them; for networks on a CPU that may be
            called in several threads.
        skip_air: Take windows of nothing but air for background, see `AirFinder`.
        count_seams: Compare windows where they overlap, see `SeamCounts`.

    Raises:
        InputError: `overlap` or `tta_axes` are out of range.
    """

    window: Shape3
    num_classes: int
    overlap: float = 0.5
    tta_axes: Sequence[int] = ()
    window_batch: int = 1
    device: torch.device | str | None = None
    mirrored: tuple[int, ...] = ()
    threads: WindowThreads | None = None
    skip_air: bool = False
    count_seams: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError(f"must be from 0 to below 1, got {self.overlap}", where="overlap")
        if not set(self.tta_axes) <= {0, 1, 2}:
            what = f"only the axes 0, 1 and 2 can be mirrored, got {list(self.tta_axes)}"
            raise InputError(what, where="tta_axes")

    def for_network(self, window: Shape3, tta_axes: Sequence[int]) -> SlidingWindow:
        """The same with another network's window and mirrored axes."""
        return replace(self, window=window, tta_axes=tta_axes)

    @property
    def passes(self) -> list[SlidingWindow]:
        """Every mirrored pass as a sweep of its own, the plain one first."""
        axes = sorted(set(self.tta_axes))
        flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]
        return [replace(self, tta_axes=(), mirrored=flip) for flip in flips]

    def starts(self, axis: int, size: int) -> list[int]:
        """First voxels of the windows along an axis of `size` voxels; below 0 where the window is larger."""
        length = self.window[axis]
        before = max(0, length - size) // 2
        return [start - before for start in window_starts(max(size, length), length, overlap=self.overlap)]

    def starts_within(self, axis: int, size: int, side: slice) -> list[int]:
        """Those of the windows that have voxels in `side` of the axis."""
        length = self.window[axis]
        return [start for start in self.starts(axis, size) if start < side.stop and start + length > side.start]

    def sweep(self, shape: Shape3, axis: int, region: Box) -> Iterator[tuple[list[Box], int]]:
        """The windows that have voxels in a region, start by start along `axis`.

        Args:
            shape: (I, J, K) of the image.
            axis: Along which the sweep goes; the region's own side there does not matter.
            region: What is wanted of the image.

        Yields:
            The windows of one start, the last of the other axes fastest, and the plane up to which everything is
            final once they are added.
        """
        starts = self.starts(axis, shape[axis])
        for start, following in zip(starts, [*starts[1:], shape[axis]], strict=True):
            firsts = [
                [start] if other == axis else self.starts_within(other, shape[other], region[other])
                for other in range(3)
            ]
            yield [self._box(i, j, k) for i, j, k in product(*firsts)], following

    def _box(self, *starts: int) -> Box:
        i, j, k = (slice(start, start + length) for start, length in zip(starts, self.window, strict=True))
        return i, j, k


def longest_axis(shape: Sequence[int]) -> int:
    """The axis with the most voxels, the first of several: a sweep along it has the smallest planes."""
    return max(range(3), key=lambda axis: shape[axis])


def window_starts(size: int, window: int, *, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, the first at 0, the last ending at the border.

    Args:
        size: Voxels along the axis, at least `window`.
        window: Voxels of a window.
        overlap: Least share of a window that its neighbour covers as well.
    """
    step = max(1, int(window * (1 - overlap) + 1e-6))
    span = size - window
    gaps = -(-span // step)
    return [span * index // gaps for index in range(gaps + 1)] if gaps else [0]


def gaussian_weights(window: Shape3) -> Tensor:
    """Importance of the voxels of a window: 1 about the centre, a Gaussian of 1/8 of each axis, never below 0.001.

    The same weighting as in nnU-Net and MONAI (`mode="gaussian"`). The floor keeps apart what is far from every centre.

    Returns:
        `window`-shaped float32.
    """
    weights = torch.ones(1)
    for length in window:
        offset = torch.arange(length) - (length - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (offset / (SIGMA_SHARE * length)) ** 2)
    return weights[0].clamp_min(SMALLEST_WEIGHT)


def read_window(image: Tensor, place: Box) -> Tensor:
    """The voxels (C, i, j, k) of a window, zeros where it reaches beyond the image (C, I, J, K)."""
    inside, borders = [], []
    for side, size in zip(place, image.shape[1:], strict=True):
        inside.append(slice(max(0, side.start), min(size, side.stop)))
        borders = [inside[-1].start - side.start, side.stop - inside[-1].stop, *borders]
    voxels = image[(slice(None), *inside)]
    return functional.pad(voxels, borders) if any(borders) else voxels
