"""How much overlapping windows disagree: where they do, the result depends on where the windows happen to lie.

Statistics of a group norm are taken over a window, and a network sees no further than its border; both make the same
voxel come out differently in two windows. The blend hides it, this counts it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.inference.running_mean import shift_planes
from pipeline.inference.window_outputs import ScoreHead
from pipeline.inference.windows import Box

CLASSES_AT_A_TIME = 8


class SeamCounts(NamedTuple):
    """Voxels of the prepared grid that more than one window covers and at least one of them gives a class beside 0.

    A window's class of a voxel is that of the highest of its own scores, averaged over mirrored passes where there are
    any, and the lowest of several. Background on which all agree is most of a volume and would hide everything, so it
    is not counted.

    Attributes:
        compared: Such voxels.
        disagreeing: Those of them that two windows give different classes.
    """

    compared: int
    disagreeing: int


class SeamCounter:
    """Compares windows over a box of a volume that moves along one axis.

    Args:
        box: Of the volume; what windows have beyond it is left out.
        num_classes: K.
        num_passes: Mirrored passes of each window, whose scores are averaged.
        device: Where windows are compared.
    """

    def __init__(self, box: Box, num_classes: int, num_passes: int, *, device: torch.device) -> None:
        shape = [side.stop - side.start for side in box]
        self.box, self._num_classes, self._num_passes = box, num_classes, num_passes
        # Class of the first window that covers a voxel, -1 where none does yet.
        self._first = torch.full(shape, -1, dtype=torch.int16, device=device)
        self._several, self._differ, self._foreground = (
            torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(3)
        )
        # Of windows by where they begin what is added up of their passes, and how many rows of all passes that holds.
        self._sums: dict[tuple[int, int, int], tuple[Tensor, int]] = {}

    def add(self, place: Box, rows: slice, values: Tensor, head: ScoreHead | None) -> None:
        """Add rows of a pass of a window.

        Args:
            place: Where the whole window lies in the volume.
            rows: Of the window.
            values: (K, n, j, k) scores of the rows, or features with a head.
            head: What makes scores of features.
        """
        if self._num_passes == 1:
            here = (slice(place[0].start + rows.start, place[0].start + rows.stop), *place[1:])
            self._compare(here, highest_class(values, head, self._num_classes).to(self._first))
            return
        shape = [side.stop - side.start for side in place]
        key = (place[0].start, place[1].start, place[2].start)
        if key not in self._sums:
            self._sums[key] = torch.zeros((len(values), *shape), device=self._first.device), 0
        sums, num_added = self._sums[key]
        sums[:, rows] += values.to(sums)
        self._sums[key] = sums, num_added + rows.stop - rows.start
        if self._sums[key][1] == self._num_passes * shape[0]:
            # The head is affine: scores of a mean are the mean of scores, and features are fewer.
            self._compare(place, highest_class(sums.div_(self._num_passes), head, self._num_classes).to(self._first))
            del self._sums[key]

    def _compare(self, place: Box, classes: Tensor) -> None:
        here, there = [], []
        for side, ours in zip(place, self.box, strict=True):
            begin, end = max(side.start, ours.start), min(side.stop, ours.stop)
            if begin >= end:
                return
            here.append(slice(begin - ours.start, end - ours.start))
            there.append(slice(begin - side.start, end - side.start))
        place_here, classes = tuple(here), classes[tuple(there)]
        first = self._first[place_here]
        seen = first >= 0
        self._several[place_here] |= seen
        self._differ[place_here] |= seen & (first != classes)
        self._foreground[place_here] |= classes > 0
        first.copy_(torch.where(seen, first, classes))

    def count(self, axis: int, planes: slice, own: Box) -> SeamCounts:
        """Of finished planes, within the box `own` of the volume."""
        region = [
            slice(max(side.start, part.start) - side.start, max(side.start, min(side.stop, part.stop)) - side.start)
            for side, part in zip(self.box, (planes if n == axis else own[n] for n in range(3)), strict=True)
        ]
        compared = self._several[tuple(region)] & self._foreground[tuple(region)]
        return SeamCounts(int(compared.sum()), int((compared & self._differ[tuple(region)]).sum()))

    def move_to(self, axis: int, start: int) -> None:
        """Let the box begin at plane `start` of the volume, which it holds."""
        side = self.box[axis]
        step = start - side.start
        for tensor, empty in ((self._first, -1), (self._several, 0), (self._differ, 0), (self._foreground, 0)):
            shift_planes(tensor, axis, step, empty)
        moved = slice(start, start + side.stop - side.start)
        i, j, k = (moved if other == axis else self.box[other] for other in range(3))
        self.box = (i, j, k)


def highest_class(values: Tensor, head: ScoreHead | None, num_classes: int) -> Tensor:
    """The class (i, j, k) of the highest score, the lowest of several; some classes of a head at a time.

    Args:
        values: (K, i, j, k) scores, or (F, i, j, k) features with a head.
        head: What makes scores of features.
        num_classes: K.
    """
    if head is None:
        return values.argmax(0)
    features, best, classes = values.float(), None, None
    for first in range(0, num_classes, CLASSES_AT_A_TIME):
        chunk, index = head.scores(features, slice(first, min(first + CLASSES_AT_A_TIME, num_classes))).max(0)
        if best is None or classes is None:
            best, classes = chunk, index
        else:
            classes = torch.where(chunk > best, index + first, classes)
            best = torch.maximum(best, chunk)
    assert classes is not None
    return classes
