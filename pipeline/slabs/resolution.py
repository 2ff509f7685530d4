"""Between resolutions and between slabs and whole tensors: up-sampled rows, and an activation made whole.

Shapes: (B, C, I, J, K), rows along I.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.slabs.backward import check_unchanged, first_derivative_only, take_once
from pipeline.slabs.dtypes import compute_dtype, without_autocast
from pipeline.slabs.repeats import is_repeat
from pipeline.slabs.rows import Rows
from pipeline.slabs.store import slab_ranges, slab_rows


class UpsampledRows:
    """Rows of a transposed convolution whose kernel is its stride, computed wherever they are read; nothing is kept.

    Args:
        source: Activation at the lower resolution.
        layer: The transposed convolution.
    """

    def __init__(self, source: Rows, layer: nn.ConvTranspose3d) -> None:
        self.source = source
        self.dtype = compute_dtype(source.dtype, layer.weight.device)
        self.stride: tuple[int, ...] = tuple(layer.stride)
        sizes = zip(source.shape[2:], self.stride, strict=True)
        self.shape = torch.Size([source.shape[0], layer.out_channels, *(size * s for size, s in sizes)])
        self._weight = layer.weight.detach().to(self.dtype)
        self._bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        self._wants_source = source.handle.requires_grad
        wide = torch.promote_types(self.dtype, torch.float32)
        self._weight_gradient = torch.zeros_like(self._weight, dtype=wide)
        self._bias_gradient = self._weight_gradient.new_zeros(layer.out_channels)
        # A copy: what autograd holds must not hold autograd's own output. Gradients are summed in shared tensors.
        self.handle: Tensor = _Upsampled.apply(copy.copy(self), layer.weight, layer.bias, source.handle)

    def _source_range(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.stride[0], -(-stop // self.stride[0])

    def read(self, start: int, stop: int) -> Tensor:
        """Up-sampled rows start to stop."""
        first, last = self._source_range(start, stop)
        x = self.source.read(first, last).to(self.dtype)
        rows = F.conv_transpose3d(x, self._weight, self._bias, self.stride)
        offset = start - first * self.stride[0]
        return rows[:, :, offset : offset + stop - start]

    def sweeps(self) -> Iterator[bool]:
        """One."""
        yield True

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        """Hand the gradient on to the source.

        Rows that share a row of the source with rows that are not there count as zero, and are added another time.
        """
        first, last = self._source_range(start, start + gradient.shape[2])
        height = slab_rows(self.shape, self.dtype)
        if is_repeat(gradient, start, start + gradient.shape[2], height=height, num_rows=self.shape[2]):
            if self._wants_source:
                batch, channels, _, *plane = self.source.shape
                shape = (batch, channels, last - first, *plane)
                self.source.add_gradient(first, gradient.new_empty(shape, dtype=self.source.dtype))
            return
        before = start - first * self.stride[0]
        after = last * self.stride[0] - start - gradient.shape[2]
        if before or after:
            gradient = F.pad(gradient, (0, 0, 0, 0, before, after))
        x = self.source.read(first, last).to(self.dtype)
        self._weight_gradient += torch.nn.grad.conv3d_weight(gradient, self._weight.shape, x, self.stride)
        self._bias_gradient += gradient.to(self._bias_gradient.dtype).sum((0, 2, 3, 4))
        if self._wants_source:
            found = F.conv3d(gradient, self._weight, None, self.stride)
            self.source.add_gradient(first, found.to(self.source.dtype))

    def take_gradient(self) -> Tensor:
        """The handle's, which says nothing."""
        return torch.zeros_like(self.handle)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of weight, bias and the handle of the source."""
        return self._weight_gradient, self._bias_gradient, self.source.take_gradient() if self._wants_source else None


class _Upsampled(torch.autograd.Function):
    """Takes (rows, weight, bias, handle of the source) and gives the rows' handle; the rows do the work."""

    @staticmethod
    def forward(ctx: Any, rows: UpsampledRows, weight: Tensor, bias: Tensor | None, handle: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(weight, bias, handle)
        return weight.new_zeros(())

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        rows: UpsampledRows = take_once(ctx, "rows")
        check_unchanged(ctx)
        weight, bias, handle = rows.gradients()
        return None, weight, bias if ctx.needs_input_grad[2] else None, handle


def make_whole(rows: Rows) -> Tensor:
    """An activation as a tensor (B, C, I, J, K)."""
    result: Tensor = _MadeWhole.apply(rows, rows.handle)
    return result


class _MadeWhole(torch.autograd.Function):
    """Takes (rows, handle) and gives the activation."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, handle: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(handle)
        out = torch.empty(rows.shape, dtype=rows.dtype, device=handle.device)
        with without_autocast(handle.device):
            for start, stop in _ranges(rows):
                out[:, :, start:stop] = rows.read(start, stop)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        rows: Rows = take_once(ctx, "rows")
        check_unchanged(ctx)
        with without_autocast(gradient.device):
            for _ in rows.sweeps():
                for start, stop in _ranges(rows):
                    rows.add_gradient(start, gradient[:, :, start:stop].clone(memory_format=torch.contiguous_format))
        return None, rows.take_gradient()


def _ranges(rows: Rows) -> Iterator[tuple[int, int]]:
    return slab_ranges(rows.shape[2], slab_rows(rows.shape, rows.dtype))
