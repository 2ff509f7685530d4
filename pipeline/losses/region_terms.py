"""Sigmoid over regions that may overlap: what a chunk of voxels adds to the loss, and its gradient.

The target stays a map of class indices: a region is a set of classes, and a voxel belongs to every region that has its
class. Binary cross entropy as torch's `BCEWithLogitsLoss`, Dice as MONAI's `DiceLoss(sigmoid=True)`.

Legend: B samples, R regions, T classes, V voxels of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.errors import InputError
from pipeline.losses.terms import LossOptions, Slopes, Sums, loss_dtype, split_off_ignored


@dataclass(frozen=True)
class RegionTerms:
    """Terms of R regions; there is no background among them.

    Attributes:
        options: Of the loss.
        membership: (R, T + 1) from `make_membership`.
        class_weights: (R,) for the cross entropy of voxels inside each region, or None.
        weighted_dice: Whether the Dice terms are weighted too.
    """

    options: LossOptions
    membership: Tensor
    class_weights: Tensor | None = None
    weighted_dice: bool = False

    def add_up(self, logits: Tensor, target: Tensor) -> Sums:
        """Sums over a chunk: logits (B, R, V) and target (B, V)."""
        logits = logits.to(loss_dtype(logits.dtype))
        inside, valid = self._find_inside(target, logits)
        log_probability = logsigmoid(logits)
        # Of w * y * -log(p) + (1 - y) * -log(1 - p), where log(1 - p) is log(p) - logit.
        cross_entropy = (logits * (valid - inside)).sum() - (log_probability * valid).sum()
        if self.class_weights is not None:
            cross_entropy -= (log_probability * inside * self._extra_weights(logits)).sum()
        probability = log_probability.exp_().mul_(valid)
        overlap = (probability * inside).sum(2)
        return Sums(overlap, probability.sum(2), inside.sum(2), cross_entropy, valid.sum() * logits.shape[1])

    def differentiate(self, logits: Tensor, target: Tensor, slopes: Slopes, out: Tensor) -> None:
        """Write the gradient by logits (B, R, V) into `out`, which may be `logits` itself."""
        logits = logits.to(loss_dtype(logits.dtype))
        inside, valid = self._find_inside(target, logits)
        probability = logits.sigmoid()
        by_ce = (probability * valid).sub_(inside)
        if self.class_weights is not None:
            by_ce += (probability - 1).mul_(inside).mul_(self._extra_weights(logits))
        by_dice = inside.mul_(slopes.own).add_(slopes.every).mul_(probability).mul_(probability.neg_().add_(1))
        out.copy_(by_dice.mul_(valid).add_(by_ce.mul_(slopes.cross_entropy)))

    def weigh_channels(self, num_channels: int, like: Tensor) -> Tensor:
        """(R,): the mean over all regions, each times its weight where Dice is weighted."""
        weights = torch.full_like(like[0], 1 / num_channels)
        if self.weighted_dice and self.class_weights is not None:
            weights *= self.class_weights.to(weights)
        return weights

    def _find_inside(self, target: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The multi-hot target (B, R, V), zero at ignored voxels, and 1 for voxels that count (B, 1, V)."""
        index, valid = split_off_ignored(target, self.options.ignore_index, like.dtype)
        membership = self.membership.to(like)
        index = index[:, 0].clamp_(max=membership.shape[1] - 1)
        # Unlike indexing, this refuses negative values.
        inside = membership.index_select(1, index.flatten()).unflatten(1, index.shape)
        return inside.transpose(0, 1).mul_(valid), valid

    def _extra_weights(self, like: Tensor) -> Tensor:
        """(R, 1) what a weight adds to one."""
        return (self.class_weights.to(like) - 1)[:, None]


def make_membership(regions: Sequence[Sequence[int]]) -> Tensor:
    """(R, T + 1) with 1 where class T belongs to region R; the last column, all 0, is for classes in no region.

    Args:
        regions: Of each region its class indices.

    Raises:
        InputError: A region is empty or holds a negative index.
    """
    if not regions or any(not region or min(region) < 0 for region in regions):
        raise InputError(
            f"regions {[list(region) for region in regions]} are no sets of classes",
            where="regions",
            fix="Give each region at least one class index of 0 or more",
        )
    table = torch.zeros(len(regions), 2 + max(max(region) for region in regions))
    for row, region in zip(table, regions, strict=True):
        row[list(region)] = 1
    return table
