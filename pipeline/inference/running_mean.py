"""The weighted mean of windows over a box of a volume that moves along one axis."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.inference.windows import Box


class RunningMean:
    """Weighted means (C, i, j, k) in float32 of all windows added so far, for the voxels of a box.

    The mean is kept as a running one (West 1979), one `lerp` per window, instead of two sums and a division: windows
    that agree give back their common value bit by bit, and nothing is divided by a vanishing weight.

    Args:
        num_channels: C.
        box: Of the volume; what windows have beyond it is left out.
        device: Where the means are kept.
    """

    def __init__(self, num_channels: int, box: Box, *, device: torch.device) -> None:
        shape = [side.stop - side.start for side in box]
        self.box = box
        self._means = torch.zeros((num_channels, *shape), dtype=torch.float32, device=device)
        self._weights = torch.zeros((1, *shape), dtype=torch.float32, device=device)

    def add(self, place: Box, values: Tensor, weights: Tensor) -> None:
        """Add a window, or a part of one.

        Args:
            place: Where it lies in the volume.
            values: (C, *place) of any floating type, on any device.
            weights: (1, *place) float32 on the device of the means.
        """
        here, there = [slice(None)], [slice(None)]
        for side, ours in zip(place, self.box, strict=True):
            first, last = max(side.start, ours.start), min(side.stop, ours.stop)
            if first >= last:
                return
            here.append(slice(first - ours.start, last - ours.start))
            there.append(slice(first - side.start, last - side.start))
        share = weights[tuple(there)]
        seen = self._weights[tuple(here)].add_(share)
        means = self._means[tuple(here)]
        means.lerp_(values[tuple(there)].to(means), share / seen)

    def read(self, axis: int, start: int, stop: int) -> Tensor:
        """The means of planes of the volume along `axis`: a view, of use until the box moves."""
        first = start - self.box[axis].start
        return self._means.narrow(axis + 1, first, stop - start)

    def unseen(self, axis: int, start: int, stop: int) -> Tensor:
        """The voxels (1, i, j, k) of planes that no window was added to."""
        return self._weights.narrow(axis + 1, start - self.box[axis].start, stop - start) == 0

    def move_to(self, axis: int, start: int) -> None:
        """Let the box begin at plane `start` of the volume, which it holds; planes that are new to it are empty."""
        side = self.box[axis]
        step, num_planes = start - side.start, side.stop - side.start
        for tensor in (self._means, self._weights):
            shift_planes(tensor, axis + 1, step)
        moved = slice(start, start + num_planes)
        i, j, k = (moved if other == axis else self.box[other] for other in range(3))
        self.box = (i, j, k)


def shift_planes(tensor: Tensor, dim: int, step: int, empty: float = 0) -> None:
    """Move what a tensor holds `step` planes towards the beginning of `dim`; the last planes become `empty`.

    Piece by piece, so that no piece overlaps its source and nothing is copied twice.
    """
    num_planes = tensor.shape[dim]
    if step == 0:
        return
    for first in range(0, num_planes - step, step):
        count = min(step, num_planes - step - first)
        tensor.narrow(dim, first, count).copy_(tensor.narrow(dim, first + step, count))
    tensor.narrow(dim, num_planes - step, step).fill_(empty)
