"""Dice and cross entropy of a volume from sums over its voxels, and what their gradients need.

Whatever the chunks are made from, their sums are added up, `finish` turns them into the loss and its slopes, and the
slopes give the gradient of every chunk. How a voxel's logits enter is in `softmax_terms` and `region_terms`.

Legend: B samples, K channels of the logits (classes or regions), V voxels of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Sums over voxels; sums of chunks are added up in float64, where no number of chunks shifts them.

    Attributes:
        overlap: (B, K) probability at the voxels that belong to the channel.
        predicted: (B, K) probability.
        reference: (B, K) number of voxels that belong to the channel.
        cross_entropy: Sum of the (weighted) cross entropy of every voxel.
        total: What the mean cross entropy is divided by: voxels, or the sum of their weights.
    """

    overlap: Tensor
    predicted: Tensor
    reference: Tensor
    cross_entropy: Tensor
    total: Tensor

    def plus(self, other: Sums) -> Sums:
        """The sums over the voxels of both."""
        return Sums(*(mine.double() + theirs.double() for mine, theirs in zip(self, other, strict=True)))


class Slopes(NamedTuple):
    """Derivatives of the loss.

    Attributes:
        own: (B or 1, K, 1) by the probability of a channel at voxels that belong to it.
        every: (B or 1, K, 1) by the probability of a channel at every voxel, on top.
        cross_entropy: By the (weighted) cross entropy of a voxel.
    """

    own: Tensor
    every: Tensor
    cross_entropy: Tensor

    def times(self, factor: Tensor) -> Slopes:
        """The derivatives of a multiple of the loss."""
        return Slopes(*(part * factor for part in self))


@dataclass(frozen=True)
class LossOptions:
    """As in `DiceCELoss`."""

    ignore_index: int
    batch_dice: bool
    smooth: float
    dice_weight: float
    ce_weight: float


class Terms(Protocol):
    """What a chunk of voxels adds to the loss and gets as its gradient.

    Attributes:
        options: Of the loss.
    """

    options: LossOptions

    def add_up(self, logits: Tensor, target: Tensor) -> Sums:
        """Sums over a chunk: logits (B, K, V) and target (B, V)."""

    def differentiate(self, logits: Tensor, target: Tensor, slopes: Slopes, out: Tensor) -> None:
        """Write the gradient by logits (B, K, V) into `out`, which may be `logits` itself."""

    def weigh_channels(self, num_channels: int, like: Tensor) -> Tensor:
        """(K,) weight of each channel's Dice term in their mean over channels, in dtype and on the device of `like`."""


def finish(sums: Sums, terms: Terms, dtype: torch.dtype) -> tuple[Tensor, Slopes]:
    """The loss and its slopes in `dtype`, from the sums over all voxels."""
    options = terms.options
    sums = Sums(*(part.double() for part in sums))
    axes = [0] if options.batch_dice else []
    overlap, predicted, reference = (part.sum(axes, keepdim=True) if axes else part for part in sums[:3])
    numerator = 2 * overlap + options.smooth
    denominator = predicted + reference + options.smooth
    scale = terms.weigh_channels(overlap.shape[1], overlap) / len(overlap)
    total = torch.where(sums.total > 0, sums.total, 1)
    dice = (scale * (1 - numerator / denominator)).sum()
    slopes = Slopes(
        own=(-2 * options.dice_weight * scale / denominator)[..., None],
        every=(options.dice_weight * scale * numerator / denominator**2)[..., None],
        cross_entropy=options.ce_weight / total,
    )
    value = options.dice_weight * dice + options.ce_weight * sums.cross_entropy / total
    return value.to(dtype), Slopes(*(part.to(dtype) for part in slopes))


def split_off_ignored(target: Tensor, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Class indices (B, 1, V) as int64 with 0 in the place of ignored voxels, and 1 for voxels that count, else 0."""
    # In int64, because an unsigned type would wrap a negative ignore_index round to a class.
    valid = target[:, None].long() != ignore_index
    return torch.where(valid, target[:, None], 0).long(), valid.to(dtype)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses of logits in `dtype` are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
