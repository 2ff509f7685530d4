"""Head and loss as one autograd function of a GPU: `fused_head` in two kernels in place of hundreds of small ones.

On a GPU the many operations of every chunk of voxels cost more time to start than to run (docs/benchmarks.md).

Legend: B samples, C features, K classes, (I, J, K') voxels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.head_loss import Head, serves_head
from pipeline.kernels.tensors import flat_voxels
from pipeline.losses.softmax_terms import SoftmaxTerms
from pipeline.losses.terms import Sums, Terms, finish
from pipeline.slabs.backward import first_derivative_only
from pipeline.slabs.dtypes import without_autocast
from pipeline.slabs.rows import PendingLogits, WholeRows


def gpu_head(pending: PendingLogits, terms: Terms) -> Head | None:
    """What the kernels need, where they serve: whole features on a GPU that runs them, classes that exclude each other.

    Args:
        pending: (B, K, I, J, K') as logits.
        terms: What voxels add to the loss.
    """
    if not (isinstance(pending.features, WholeRows) and isinstance(terms, SoftmaxTerms)):
        return None
    weight, bias, weights = pending.weight.detach().flatten(1), pending.bias.detach(), terms.class_weights
    if not serves_head(pending.features.handle, weight):
        return None
    return Head(weight, bias, torch.ones_like(bias) if weights is None else weights, terms.options.ignore_index)


def gpu_head_loss(pending: PendingLogits, target: Tensor, head: Head, terms: Terms) -> Tensor:
    """The loss of pending logits as a float32 scalar; target (B, I, J, K') of any integer dtype."""
    return _GpuHead.apply(pending.features.handle, pending.weight, pending.bias, target, head, terms)


class _GpuHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, head: Head, terms: Terms
    ) -> Tensor:
        flat, flat_target = flat_voxels(features), target.flatten(1)
        with without_autocast(features.device):
            value, ctx.slopes = finish(_as_sums(head.add_up(flat, flat_target)), terms, torch.float32)
        ctx.save_for_backward(flat, weight, bias, flat_target)
        ctx.head, ctx.shape = head, features.shape
        return value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, bias, target = ctx.saved_tensors
        with without_autocast(flat.device):
            slopes = ctx.slopes.times(grad_output)
            by_features, by_weight, by_bias = ctx.head.differentiate(flat, target, slopes)
        by_weight = by_weight.view_as(weight).to(weight.dtype)
        return by_features.view(ctx.shape), by_weight, by_bias.to(bias.dtype), None, None, None


def _as_sums(sums: Tensor) -> Sums:
    """From (B, 3 K + 2)."""
    num_classes = sums.shape[1] // 3
    overlap, predicted, reference, totals = sums.split([num_classes] * 3 + [2], dim=1)
    return Sums(overlap, predicted, reference, *totals.sum(0))
