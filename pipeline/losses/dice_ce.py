"""Soft Dice + cross entropy that keeps nothing for the backward pass but the logits and the target.

The voxels are taken chunk by chunk, once for the sums and again for the gradient, so no probabilities, one-hot target
or float copy of the whole patch ever exist. From `PendingLogits` no logits exist either (see `fused_head`).

Legend: B samples, K channels of the logits, (I, J, K') voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.losses.chunks import split_voxels, without_repeats
from pipeline.losses.fused_head import fused_head_loss
from pipeline.losses.region_terms import RegionTerms, make_membership
from pipeline.losses.softmax_terms import SoftmaxTerms
from pipeline.losses.terms import LossOptions, Sums, Terms, finish, loss_dtype
from pipeline.slabs.backward import first_derivative_only
from pipeline.slabs.rows import PendingLogits


class DiceCELoss(nn.Module):
    """Dice plus cross entropy, in float32 or better, from logits or from pending logits alike.

    The Dice term of a channel is `1 - (2 * overlap + smooth) / (predicted + reference + smooth)`.

    Without regions, channels are classes that exclude each other: softmax, Dice over the foreground classes, cross
    entropy over all classes. Equal to MONAI's `DiceCELoss(include_background=False, softmax=True, to_onehot_y=True,
    batch=batch_dice, smooth_nr=smooth, smooth_dr=smooth, lambda_dice=dice_weight, lambda_ce=ce_weight)`; and with
    `weight=class_weights` where `weighted_dice` is set, because MONAI weights both parts (but for a single foreground
    class, whose weight it leaves out).

    With regions, channels are regions that may overlap: sigmoid, Dice over all regions, binary cross entropy. Equal to
    MONAI's `DiceLoss(sigmoid=True)` plus torch's `BCEWithLogitsLoss` on the multi-hot target.

    An ignore label comes on top of both.

    Args:
        ignore_index: Target value of voxels that take part in neither term.
        batch_dice: Take overlaps and sums over the whole batch instead of each sample.
        smooth: Added to numerator and denominator; a class absent from prediction and target costs nothing.
        dice_weight: Weight of the Dice term.
        ce_weight: Weight of the cross entropy.
        class_weights: K weights. The cross entropy is the weighted mean over voxels, each with the weight of its class
            (torch's `CrossEntropyLoss(weight=...)`); with regions, voxels inside a region count so much (torch's
            `BCEWithLogitsLoss(pos_weight=...)`).
        weighted_dice: Multiply each channel's Dice term by its class weight too. Their mean is still divided by the
            number of channels, as MONAI does.
        regions: The classes that make up each region. The target stays a map of class indices; classes in no region
            are background.

    Raises:
        InputError: Weights or regions make no sense.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -1,
        batch_dice: bool = True,
        smooth: float = 1e-5,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        weighted_dice: bool = False,
        regions: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        _check_weights(class_weights, weighted_dice, regions)
        self.options = LossOptions(ignore_index, batch_dice, smooth, dice_weight, ce_weight)
        self.weighted_dice = weighted_dice
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        self.register_buffer("class_weights", weights, persistent=False)
        membership = None if regions is None else make_membership(regions)
        self.register_buffer("membership", membership, persistent=False)

    def forward(self, outputs: Tensor | PendingLogits, target: Tensor) -> Tensor:
        """The loss as a float32 scalar (float64 for float64 logits); finite when every voxel is ignored.

        Args:
            outputs: Logits (B, K, I, J, K') in any floating dtype, K at least 2 without regions; or what stands for
                them.
            target: (B, I, J, K'), class indices of any integer dtype.

        Raises:
            ValueError: The shapes do not belong together, or the target holds no class indices.
        """
        self._check_shapes(outputs.shape, target.shape)
        if target.is_floating_point():
            raise ValueError(f"the target holds class indices and is of an integer dtype, not {target.dtype}")
        if isinstance(outputs, PendingLogits):
            return fused_head_loss(outputs, target, self._terms())
        return _DiceCE.apply(outputs, target, self._terms())

    def _terms(self) -> Terms:
        if self.membership is None:
            return SoftmaxTerms(self.options, self.class_weights, self.weighted_dice)
        return RegionTerms(self.options, self.membership, self.class_weights, self.weighted_dice)

    def _check_shapes(self, logits: torch.Size, target: torch.Size) -> None:
        if target != (logits[0], *logits[2:]):
            raise ValueError(f"target {tuple(target)} does not belong to logits {tuple(logits)}")
        if logits[1] < 2 and self.membership is None:
            raise ValueError("a single channel has no background to be told from; give regions for a sigmoid")
        for name, wanted in (("regions", self.membership), ("class_weights", self.class_weights)):
            if wanted is not None and len(wanted) != logits[1]:
                raise ValueError(f"{len(wanted)} {name} do not belong to logits {tuple(logits)}")


def _check_weights(
    class_weights: Sequence[float] | None, weighted_dice: bool, regions: Sequence[Sequence[int]] | None
) -> None:
    if class_weights is None:
        if weighted_dice:
            raise InputError(
                "there are no weights for a weighted Dice", where="weighted_dice", fix="Give class_weights"
            )
        return
    if not all(0 <= weight < math.inf for weight in class_weights):
        raise InputError(f"weights {list(class_weights)} are not all finite and 0 or more", where="class_weights")
    if regions is not None and len(regions) != len(class_weights):
        raise InputError(
            f"{len(class_weights)} weights for {len(regions)} regions", where="class_weights", fix="Give one per region"
        )


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, terms: Terms) -> Tensor:
        flat, flat_target = logits.flatten(2), target.flatten(1)
        parts = (terms.add_up(flat[:, :, voxels], flat_target[:, voxels]) for voxels in _split(flat))
        value, ctx.slopes = finish(reduce(Sums.plus, parts), terms, loss_dtype(logits.dtype))
        ctx.terms = terms
        ctx.save_for_backward(logits, target)
        return value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        logits, target = ctx.saved_tensors
        flat, target = logits.flatten(2), target.flatten(1)
        slopes = ctx.slopes.times(grad_output)
        # Made flat, because flattening permuted axes copies and what is written into a copy would be lost.
        gradient = torch.empty_like(flat)
        for voxels in _split(flat):
            ctx.terms.differentiate(flat[:, :, voxels], target[:, voxels], slopes, out=gradient[:, :, voxels])
        return gradient.unflatten(2, logits.shape[2:]), None, None


def _split(logits: Tensor) -> list[slice]:
    """Chunks of the voxels of logits (B, K, V)."""
    batch, num_channels, num_voxels = logits.shape
    return without_repeats(split_voxels(num_voxels, batch * num_channels), logits)
