"""Planes of a volume that are finished: what a sweep hands on, and what everything behind it takes.

Whoever combines several networks gives an object of the same kind whose scores are, say, the mean of their
probabilities; everything behind it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Protocol

import torch
from torch import Tensor

from pipeline.inference.window_outputs import ScoreHead

# What the background has where nothing was computed, and the other classes 0: as a logit, all but certain.
BACKGROUND_SCORE = 10.0


class NotFiniteError(ArithmeticError):
    """A network gave values that are not finite, as one does whose values overflow in 16 bits."""


class Scores(Protocol):
    """Class scores of consecutive planes of a volume.

    Attributes:
        axis: Along which the planes follow each other.
        start, stop: The planes.
        num_classes: K.
    """

    @property
    def axis(self) -> int:
        """Along which the planes follow each other."""

    @property
    def start(self) -> int:
        """First plane."""

    @property
    def stop(self) -> int:
        """Behind the last plane."""

    @property
    def num_classes(self) -> int:
        """K."""

    def narrow(self, start: int, stop: int) -> Scores:
        """Some of the planes."""

    def take(self, classes: slice) -> Tensor:
        """Scores (n, i, j, k) of some classes in float32; not to be written to."""


@dataclass(frozen=True, eq=False)
class Planes:
    """Planes of one network; of use until the next are asked for, since their memory is taken again.

    Attributes:
        axis, start, stop, num_classes: As in `Scores`.
        means: (K, i, j, k) scores or, with a head, (F, i, j, k) features.
        head: What makes scores of features.
        unseen: Voxels (1, i, j, k) that no window was computed for, which are background; None where there are none.
    """

    axis: int
    start: int
    stop: int
    num_classes: int
    means: Tensor
    head: ScoreHead | None = None
    unseen: Tensor | None = None

    def narrow(self, start: int, stop: int) -> Planes:
        """Some of the planes."""
        means = self.means.narrow(self.axis + 1, start - self.start, stop - start)
        # A matrix product needs the voxels of a feature in one piece; taken class by class, they are copied only once.
        means = means.contiguous() if self.head else means
        unseen = self.unseen
        if unseen is not None:
            unseen = unseen.narrow(self.axis + 1, start - self.start, stop - start)
        return Planes(self.axis, start, stop, self.num_classes, means, self.head, unseen)

    @torch.inference_mode()
    def take(self, classes: slice) -> Tensor:
        """Scores (n, i, j, k) of some classes in float32; not to be written to."""
        if self.unseen is not None and bool(self.unseen.any()):
            return self._with_background(self.unseen, classes)
        return self.head.scores(self.means, classes) if self.head else self.means[classes]

    def _with_background(self, unseen: Tensor, classes: slice) -> Tensor:
        if self.head is not None:
            scores = self.head.scores(self.means, classes)
        else:
            # Where no window was computed at all there is no head either, and nothing that is kept.
            count = len(range(*classes.indices(self.num_classes)))
            scores = self.means[:1].expand(count, -1, -1, -1) if bool(unseen.all()) else self.means[classes]
        scores = scores.masked_fill(unseen, 0.0)
        if classes.start == 0:
            scores[0].masked_fill_(unseen[0], BACKGROUND_SCORE)
        return scores

    def check_finite(self) -> None:
        """Look at all values.

        Raises:
            NotFiniteError: Not all scores are finite.
        """
        # Channel by channel: of planes that do not lie in one piece a copy is made.
        ends = [float(value) for channel in self.means for value in channel.aminmax()]
        largest = max((abs(end) for end in ends), key=lambda end: (isnan(end), end))
        bound = self.head.largest_score(largest) if self.head else largest
        # The bound of a head is a product of maxima, so only where it is above all is it looked at closely.
        if not bound <= torch.finfo(torch.float32).max:
            raise NotFiniteError("the network gives values that are not finite")
