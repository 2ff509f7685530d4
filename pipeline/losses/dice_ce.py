"""Soft Dice + cross entropy that keeps nothing for the backward pass but the logits and the target.

The softmax is taken chunk by chunk over the voxels, once for the sums and again for the gradient, so no probabilities,
one-hot target or float copy of the whole patch ever exist.

Legend: B samples, K classes, V voxels; logits (B, K, I, J, K'), target (B, I, J, K').
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Elements of a chunk: few enough that its temporaries (some 16 MiB each) do not count beside the network's, and many
# enough that a GPU is busy. The bound on their number keeps the temporaries near a tenth of half-precision logits.
CHUNK_ELEMENTS = 2**22
MAX_CHUNKS = 64


class DiceCELoss(nn.Module):
    """Softmax Dice over the foreground classes plus cross entropy over all classes, in float32 or better.

    The Dice term of a class is `1 - (2 * overlap + smooth) / (predicted + reference + smooth)`; its mean is taken over
    the foreground classes (and samples). Equal to MONAI's `DiceCELoss(include_background=False, softmax=True,
    to_onehot_y=True, batch=batch_dice, smooth_nr=smooth, smooth_dr=smooth, lambda_dice=dice_weight,
    lambda_ce=ce_weight)`, with an ignore label on top.

    Args:
        ignore_index: Target value of voxels that take part in neither term.
        batch_dice: Take overlaps and sums over the whole batch instead of each sample.
        smooth: Added to numerator and denominator; a class absent from prediction and target costs nothing.
        dice_weight: Weight of the Dice term.
        ce_weight: Weight of the cross entropy.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -1,
        batch_dice: bool = True,
        smooth: float = 1e-5,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss as a float32 scalar (float64 for float64 logits); finite when every voxel is ignored.

        Args:
            logits: (B, K, I, J, K'), any floating dtype, K at least 2.
            target: (B, I, J, K'), class indices of any integer dtype.

        Raises:
            ValueError: The shapes do not belong together.
        """
        if target.shape != (logits.shape[0], *logits.shape[2:]):
            raise ValueError(f"target {tuple(target.shape)} does not belong to logits {tuple(logits.shape)}")
        return _DiceCE.apply(logits, target, self)


class _Sums(NamedTuple):
    """What both terms need: (B, K) sums over voxels, the summed cross entropy, the number of voxels that count."""

    overlap: Tensor
    predicted: Tensor
    reference: Tensor
    cross_entropy: Tensor
    num_valid: Tensor


class _Chunk(NamedTuple):
    """A range of voxels: log probabilities and masked one-hot target (B, K, V), mask (B, 1, V)."""

    voxels: slice
    log_probability: Tensor
    onehot: Tensor
    valid: Tensor


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: DiceCELoss) -> Tensor:
        sums = _sum_over_voxels(logits, target, loss.ignore_index)
        axes = [0] if loss.batch_dice else []
        overlap, predicted, reference = (part.sum(axes, keepdim=True) if axes else part for part in sums[:3])
        numerator = 2 * overlap + loss.smooth
        denominator = predicted + reference + loss.smooth
        foreground = torch.ones_like(numerator)
        foreground[:, 0] = 0
        scale = foreground / foreground.sum()
        num_valid = sums.num_valid.clamp(min=1)
        # Derivatives by the probability of a class: at its own voxels, at every voxel, and of the cross entropy.
        ctx.own = -2 * loss.dice_weight * scale / denominator
        ctx.every = loss.dice_weight * scale * numerator / denominator**2
        ctx.ce = loss.ce_weight / num_valid
        ctx.ignore_index = loss.ignore_index
        ctx.save_for_backward(logits, target)
        dice = (scale * (1 - numerator / denominator)).sum()
        return loss.dice_weight * dice + loss.ce_weight * sums.cross_entropy / num_valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        own, every, ce = ((part * grad_output)[..., None] for part in (ctx.own, ctx.every, ctx.ce))
        # Flat first: flattening permuted axes copies, and what is written into a copy is lost.
        gradient = torch.empty_like(logits.flatten(2))
        for chunk in _chunks(logits, target, ctx.ignore_index):
            probability = chunk.log_probability.exp_().mul_(chunk.valid)
            # The softmax turns a gradient g by probability into p * (g - sum of g * p), the cross entropy into p - t.
            by_dice = (own * chunk.onehot).add_(every).mul_(probability)
            by_dice.sub_(probability * by_dice.sum(1, keepdim=True))
            gradient[:, :, chunk.voxels] = by_dice.add_(probability.sub_(chunk.onehot).mul_(ce))
        return gradient.unflatten(2, logits.shape[2:]), None, None


def _sum_over_voxels(logits: Tensor, target: Tensor, ignore_index: int) -> _Sums:
    parts: list[Tensor] = []
    for chunk in _chunks(logits, target, ignore_index):
        cross_entropy = -(chunk.log_probability * chunk.onehot).sum()
        probability = chunk.log_probability.exp_()
        overlap = (probability * chunk.onehot).sum(2)
        found = [overlap, probability.mul_(chunk.valid).sum(2), chunk.onehot.sum(2), cross_entropy, chunk.valid.sum()]
        parts = [part + new for part, new in zip(parts, found, strict=True)] if parts else found
    return _Sums(*parts)


def _chunks(logits: Tensor, target: Tensor, ignore_index: int) -> Iterator[_Chunk]:
    num_samples, num_classes = logits.shape[:2]
    logits, target = logits.flatten(2), target.flatten(1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    num_voxels = target.shape[1]
    length = max(CHUNK_ELEMENTS // (num_samples * num_classes), -(-num_voxels // MAX_CHUNKS), 1)
    for start in range(0, num_voxels, length):
        voxels = slice(start, min(start + length, num_voxels))
        part = target[:, None, voxels]
        valid = part != ignore_index
        log_probability = logits[:, :, voxels].to(dtype).log_softmax(1)
        onehot = torch.zeros_like(log_probability)
        onehot.scatter_(1, torch.where(valid, part, 0).long(), valid.to(dtype))
        yield _Chunk(voxels, log_probability, onehot, valid.to(dtype))
