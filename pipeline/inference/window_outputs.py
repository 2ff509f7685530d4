"""What a network gives for a batch of windows, by rows: class scores, or the features that its head makes them from.

Legend: B windows, K classes, F features, (i, j, k) voxels of a window; rows are planes along i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.geometry import format_shape
from pipeline.slabs.dtypes import without_autocast
from pipeline.slabs.rows import PendingLogits
from pipeline.slabs.store import slab_ranges, slab_rows

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ScoreHead:
    """The affine map from features to scores.

    It may be applied behind a weighted mean over windows instead of in each of them: weights of a mean add up to one,
    so the mean of W f + b is W (mean of f) + b.

    Attributes:
        weight: (K, F) float32.
        bias: (K,) float32.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, pending: PendingLogits) -> ScoreHead:
        """The head of logits that were not computed."""
        return cls(pending.weight.detach().flatten(1).float(), pending.bias.detach().float())

    def to(self, device: torch.device) -> ScoreHead:
        """The same head on `device`."""
        return ScoreHead(self.weight.to(device), self.bias.to(device))

    def scores(self, features: Tensor, classes: slice) -> Tensor:
        """Scores (n, ...) in float32 of some classes from features (F, ...)."""
        with without_autocast(features.device):
            scores = torch.addmm(self.bias[classes, None], self.weight[classes], features.flatten(1))
        return scores.unflatten(1, features.shape[1:])

    def largest_score(self, largest_feature: float) -> float:
        """A bound on the size of all scores, not finite where the head is not."""
        return float((self.weight.abs().sum(1) * largest_feature + self.bias.abs()).max())


# Rows; scores (B, K, n, j, k) or features (B, F, n, j, k) there; and the head where these are features.
Rows = tuple[slice, Tensor, ScoreHead | None]


def num_features(network: Network) -> int | None:
    """Features that the network's scores are made from, where it can leave the scores to its caller; None elsewhere."""
    return getattr(network, "num_features", None) if hasattr(network, "pending_logits") else None


def gathers_features(network: Network, num_classes: int) -> bool:
    """Whether a network has fewer features than scores, so that its features are what a sweep gathers."""
    found = num_features(network)
    return found is not None and found < num_classes


@dataclass(frozen=True)
class WindowOutputs:
    """A network as what it gives for windows.

    Attributes:
        network: Takes (B, C, i, j, k) and gives (B, K, i, j, k). Where it has a method `pending_logits`, as our U-Net
            has, logits of a whole window never exist.
        num_classes: K.
        of_features: Give features instead of scores; only where `num_features` is not None.
    """

    network: Network
    num_classes: int
    of_features: bool

    def rows(self, batch: Tensor, flip: tuple[int, ...] = ()) -> Iterator[Rows]:
        """Rows of the windows with what the network gives there.

        Args:
            batch: (B, C, i, j, k).
            flip: Axes of the batch that are mirrored for the network, and back.
        """
        num_rows = batch.shape[2]
        for rows, values, head in self._plain_rows(batch.flip(flip) if flip else batch):
            mirrored = slice(num_rows - rows.stop, num_rows - rows.start) if 2 in flip else rows
            yield mirrored, values.flip(flip) if flip else values, head
            # Or they would still be there while the next are computed.
            del values

    def _plain_rows(self, batch: Tensor) -> Iterator[Rows]:
        if not hasattr(self.network, "pending_logits"):
            scores = full_resolution(self.network(batch))
            self._check_shape(scores.shape, batch)
            yield slice(0, batch.shape[2]), scores, None
            return
        pending: PendingLogits = self.network.pending_logits(batch)
        self._check_shape(pending.shape, batch)
        head = ScoreHead.of(pending) if self.of_features else None
        taken = pending.features if head else pending
        for start, stop in slab_ranges(batch.shape[2], slab_rows(taken.shape, torch.float32)):
            values = pending.features.read(start, stop) if head else pending.compute(start, stop)
            yield slice(start, stop), values, head

    def _check_shape(self, found: torch.Size, batch: Tensor) -> None:
        expected = (batch.shape[0], self.num_classes, *batch.shape[2:])
        if tuple(found) != expected:
            raise InputError(
                f"the network gives {format_shape(found)} for windows of {format_shape(batch.shape)}, "
                f"expected {format_shape(expected)}"
            )


def all_flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of spatial axes to mirror, none first, as axes of a batch."""
    spatial = sorted({axis + 2 for axis in axes})
    return [flip for count in range(len(spatial) + 1) for flip in combinations(spatial, count)]


def full_resolution(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The scores (B, K, I, J, K') at full resolution of any output that deep supervision knows.

    Args:
        output: A tensor, a list of them from the highest resolution down, or DynUNet's stack (B, heads, K, I, J, K').
    """
    if not isinstance(output, Tensor):
        return output[0]
    return output[:, 0] if output.ndim == 6 else output
