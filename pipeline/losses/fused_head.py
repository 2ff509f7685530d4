"""Head and loss as one autograd function: no logits, probabilities or one-hot target of a volume ever exist.

The 1x1x1 convolution is taken chunk by chunk over the voxels, once for the sums of the loss and again for its
gradient, so nothing is kept but the features and the target, and what is live beside them does not depend on the number
of classes. Features are read in blocks of rows, because a row may cost something to read (see `pipeline.slabs.rows`).

Legend: B samples, C features, K channels of the logits, (I, J, K') voxels, V voxels of a chunk.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.losses.chunks import split_voxels, without_repeats
from pipeline.losses.gpu_head import gpu_head, gpu_head_loss
from pipeline.losses.terms import Slopes, Sums, Terms, finish, loss_dtype
from pipeline.slabs.backward import first_derivative_only, take_once
from pipeline.slabs.dtypes import compute_dtype, without_autocast
from pipeline.slabs.rows import PendingLogits, Rows, WholeRows

# Features of a block of rows, and its gradient: few reads, and little beside the features themselves.
BLOCK_BYTES = 2**25


def fused_head_loss(pending: PendingLogits, target: Tensor, terms: Terms) -> Tensor:
    """The loss of pending logits as a scalar, float32 or float64.

    Args:
        pending: Features with the head's weight and bias; (B, K, I, J, K') as logits.
        target: (B, I, J, K') class indices of any integer dtype.
        terms: What voxels add to the loss.
    """
    on_gpu = gpu_head(pending, terms)
    if on_gpu is not None:
        return gpu_head_loss(pending, target, on_gpu, terms)
    features = pending.features
    return _FusedHead.apply(features.handle, pending.weight, pending.bias, target, features, terms)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, handle: Tensor, weight: Tensor, bias: Tensor, target: Tensor, features: Rows, terms: Terms
    ) -> Tensor:
        dtype = compute_dtype(features.dtype, handle.device)
        with without_autocast(handle.device):
            head = _Head.cast(weight, bias, dtype)
            parts = (
                _add_up_block(features.read(rows.start, rows.stop), target[:, rows], head, terms)
                for rows in without_repeats(_split_rows(features), handle)
            )
            value, ctx.slopes = finish(reduce(Sums.plus, parts), terms, loss_dtype(dtype))
        ctx.save_for_backward(handle, weight, bias, target)
        # A tensor is freed together with the saved ones; other features see to what they keep themselves.
        ctx.is_tensor = isinstance(features, WholeRows)
        ctx.features = None if ctx.is_tensor else features
        ctx.terms, ctx.dtype = terms, dtype
        return value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        handle, weight, bias, target = ctx.saved_tensors
        features = WholeRows(handle) if ctx.is_tensor else take_once(ctx, "features")
        with without_autocast(handle.device):
            work = _Backward(_Head.cast(weight, bias, ctx.dtype), ctx.terms, ctx.slopes.times(grad_output))
            for last in features.sweeps() if ctx.needs_input_grad[0] else (True,):
                work.sweep(features, target, last=last, wanted=ctx.needs_input_grad[0])
        by_features = features.take_gradient() if ctx.needs_input_grad[0] else None
        by_weight = work.by_weight.view_as(weight).to(weight.dtype)
        return by_features, by_weight, work.by_bias.to(bias.dtype), None, None, None


class _Head(NamedTuple):
    """Weight (K, C) and bias (K,) of the convolution, in the dtype of the logits."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def cast(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> _Head:
        """The head in the dtype it is computed in."""
        return cls(weight.detach().flatten(1).to(dtype), bias.detach().to(dtype))

    def __call__(self, features: Tensor) -> Tensor:
        """Features (B, C, V) -> logits (B, K, V)."""
        batch, _, num_voxels = features.shape
        bias = self.bias[:, None].expand(batch, -1, num_voxels)
        return torch.baddbmm(bias, self.weight.expand(batch, -1, -1), features)

    def pull_back(self, by_logits: Tensor, *, out: Tensor) -> None:
        """Write the gradient by features (B, C, V) that a gradient by logits (B, K, V) gives."""
        weight = self.weight.mT.expand(len(out), -1, -1)
        if out.dtype == by_logits.dtype:
            torch.bmm(weight, by_logits, out=out)
        else:
            out.copy_(torch.bmm(weight, by_logits))

    def split(self, features: Tensor) -> list[slice]:
        """Chunks of the voxels of features (B, C, V)."""
        batch, _, num_voxels = features.shape
        return without_repeats(split_voxels(num_voxels, batch * len(self.weight)), features)


def _add_up_block(block: Tensor, target: Tensor, head: _Head, terms: Terms) -> Sums:
    """Sums over rows: features (B, C, n, J, K') and target (B, n, J, K')."""
    features, target = block.flatten(2), target.flatten(1)
    parts = (
        terms.add_up(head(features[:, :, voxels].to(head.weight.dtype)), target[:, voxels])
        for voxels in head.split(features)
    )
    return reduce(Sums.plus, parts)


class _Backward:
    """The backward pass over blocks of rows; gradients of weight (K, C) and bias (K,) in float32 or better."""

    def __init__(self, head: _Head, terms: Terms, slopes: Slopes) -> None:
        self.head = head
        self.terms = terms
        self.slopes = slopes
        dtype = loss_dtype(head.weight.dtype)
        self.by_weight = torch.zeros_like(head.weight, dtype=dtype)
        self.by_bias = torch.zeros_like(head.bias, dtype=dtype)

    def sweep(self, features: Rows, target: Tensor, *, last: bool, wanted: bool) -> None:
        """Go through all rows with their target (B, I, J, K') and hand in their gradient.

        Args:
            features: All features.
            target: Of all voxels.
            last: Whether this is the last sweep; the head gets its gradients in that one.
            wanted: Whether the features get theirs.
        """
        blocks = _split_rows(features)
        worked_on = without_repeats(blocks, features.handle)
        for rows in blocks:
            if rows in worked_on:
                gradient = self._through_rows(features.read(rows.start, rows.stop), target[:, rows], of_head=last)
            else:
                batch, channels, _, *plane = features.shape
                shape = (batch, channels, rows.stop - rows.start, *plane)
                gradient = features.handle.new_empty(shape, dtype=features.dtype)
            if wanted:
                features.add_gradient(rows.start, gradient)
            del gradient

    def _through_rows(self, block: Tensor, target: Tensor, *, of_head: bool) -> Tensor:
        """The gradient of a block of features (B, C, n, J, K') with target (B, n, J, K')."""
        gradient = torch.empty_like(block, memory_format=torch.contiguous_format)
        flat, flat_gradient, flat_target = block.flatten(2), gradient.view(*block.shape[:2], -1), target.flatten(1)
        for voxels in self.head.split(flat):
            chunk = flat[:, :, voxels].to(self.head.weight.dtype)
            by_logits = self._differentiate(chunk, flat_target[:, voxels])
            if of_head:
                self._add_head(chunk, by_logits)
            self.head.pull_back(by_logits, out=flat_gradient[:, :, voxels])
            del chunk, by_logits
        return gradient

    def _differentiate(self, features: Tensor, target: Tensor) -> Tensor:
        logits = self.head(features)
        self.terms.differentiate(logits, target, self.slopes, out=logits)
        return logits

    def _add_head(self, features: Tensor, by_logits: Tensor) -> None:
        self.by_weight += torch.bmm(by_logits, features.mT).sum(0, dtype=self.by_weight.dtype)
        self.by_bias += by_logits.sum(2, dtype=self.by_bias.dtype).sum(0)


def _split_rows(features: Rows) -> list[slice]:
    """Blocks of rows of at most `BLOCK_BYTES`, or single rows where one is more."""
    batch, channels, num_rows, *plane = features.shape
    row_bytes = batch * channels * math.prod(plane) * features.dtype.itemsize
    length = max(BLOCK_BYTES // row_bytes, 1)
    return [slice(start, min(start + length, num_rows)) for start in range(0, num_rows, length)]
