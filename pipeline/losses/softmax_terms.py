"""Softmax over classes that exclude each other: what a chunk of voxels adds to the loss, and its gradient.

With p the probabilities, t the voxel's class, a and b the slopes of `Slopes` (own and every) and c that of the cross
entropy, the softmax turns the derivative g by p into p * (g - sum of g * p) and the cross entropy's part is p - onehot.
As g is b but for the class t, where it is a + b, the gradient is

    p * (b + c - s),  s = sum over classes of b * p + a[t] * p[t],

and at class t another a[t] * p[t] - c: two passes over the classes and sparse ones, without a one-hot target. Dice of
soft predictions as Milletari et al. (2016), sums as in MONAI's DiceLoss.

Legend: B samples, K classes, V voxels of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.losses.terms import LossOptions, Slopes, Sums, loss_dtype, split_off_ignored


@dataclass(frozen=True)
class SoftmaxTerms:
    """Terms of K classes, the first of which is the background.

    Attributes:
        options: Of the loss.
        class_weights: (K,) for the cross entropy, or None.
        weighted_dice: Whether the Dice terms of the foreground classes are weighted too.
    """

    options: LossOptions
    class_weights: Tensor | None = None
    weighted_dice: bool = False

    def add_up(self, logits: Tensor, target: Tensor) -> Sums:
        """Sums over a chunk: logits (B, K, V) and target (B, V)."""
        dtype = loss_dtype(logits.dtype)
        index, valid = split_off_ignored(target, self.options.ignore_index, dtype)
        probability, own_log = _normalise(logits, index, valid, dtype)
        predicted = probability.sum(2)
        weight = self._voxel_weights(index, valid)
        cross_entropy, total = -(own_log * weight).sum(), weight.sum()
        # The probabilities are not needed any more: their memory takes what each class has at its own voxels.
        spread = probability.zero_()
        overlap = spread.scatter_(1, index, own_log.exp_().mul_(valid)).sum(2)
        reference = spread.scatter_(1, index, valid).sum(2)
        return Sums(overlap, predicted, reference, cross_entropy, total)

    def differentiate(self, logits: Tensor, target: Tensor, slopes: Slopes, out: Tensor) -> None:
        """Write the gradient by logits (B, K, V) into `out`, which may be `logits` itself."""
        dtype = loss_dtype(logits.dtype)
        index, valid = split_off_ignored(target, self.options.ignore_index, dtype)
        probability, own_log = _normalise(logits, index, valid, dtype)
        own_slope = slopes.own.expand_as(probability).gather(1, index)
        own = own_log.exp_().mul_(valid).mul_(own_slope)
        ce = slopes.cross_entropy * self._voxel_weights(index, valid)
        by_every = probability * slopes.every
        shared = by_every.sum(1, keepdim=True).add_(own).neg_().add_(ce)
        gradient = by_every.addcmul_(probability, shared)
        out.copy_(gradient.scatter_add_(1, index, own.sub_(ce)))

    def _voxel_weights(self, index: Tensor, valid: Tensor) -> Tensor:
        """(B, 1, V) weight of a voxel's cross entropy: that of its class."""
        if self.class_weights is None:
            return valid
        return self.class_weights.to(valid)[index].mul_(valid)

    def weigh_channels(self, num_channels: int, like: Tensor) -> Tensor:
        """(K,): the mean over the foreground classes, each times its weight where Dice is weighted."""
        weights = torch.full_like(like[0], 1 / max(num_channels - 1, 1))
        weights[0] = 0
        if self.weighted_dice and self.class_weights is not None:
            weights *= self.class_weights.to(weights)
        return weights


def _normalise(logits: Tensor, index: Tensor, valid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K, V), zero at ignored voxels, and the log probability (B, 1, V) of each voxel's own class.

    The softmax is taken apart so that it works in one buffer, takes the exponential once and masks for nothing.
    """
    shifted = logits - logits.amax(1, keepdim=True).to(dtype)
    own_log = shifted.gather(1, index)
    exponential = shifted.exp_()
    norm = exponential.sum(1, keepdim=True)
    own_log -= norm.log()
    return exponential.mul_(valid / norm), own_log
