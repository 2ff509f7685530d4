"""Convolutions over ranges of rows: which input rows an output row needs, and both gradients by rows.

Shapes: (B, C, I, J, K), rows along I. Along J and K a convolution pads as always; along I the rows beyond the ends
are the zeros of its padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.geometry import Shape3
from pipeline.slabs.rows import Rows


@dataclass(frozen=True)
class RowConvolution:
    """A convolution without bias, row by row.

    Attributes:
        weight: (out, in, kernel) in the dtype that is computed in.
        stride, padding: Along i, j, k.
    """

    weight: Tensor
    stride: Shape3
    padding: Shape3

    @classmethod
    def of(cls, layer: nn.Conv3d, dtype: torch.dtype) -> RowConvolution:
        """The convolution of a layer, in `dtype`."""
        return cls(layer.weight.detach().to(dtype), tuple(layer.stride), tuple(layer.padding))  # type: ignore[arg-type]

    def output_shape(self, shape: torch.Size) -> torch.Size:
        """(B, out, I, J, K) for an input (B, in, I, J, K)."""
        sizes = zip(shape[2:], self.weight.shape[2:], self.stride, self.padding, strict=True)
        return torch.Size([shape[0], len(self.weight), *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)])

    def read(self, rows: Rows, start: int, stop: int) -> Tensor:
        """The input rows that output rows start to stop need, zeros beyond the ends included."""
        first = start * self.stride[0] - self.padding[0]
        last = (stop - 1) * self.stride[0] - self.padding[0] + self.weight.shape[2]
        before, after = max(0, -first), max(0, last - rows.shape[2])
        x = rows.read(first + before, last - after).to(self.weight.dtype)
        return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x

    def __call__(self, x: Tensor) -> Tensor:
        """Output rows of the input rows that `read` gave for them."""
        return F.conv3d(x, self.weight, None, self.stride, (0, *self.padding[1:]))

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The part of output rows, from what `read` gave for them and their gradient."""
        padding = (0, *self.padding[1:])
        return torch.nn.grad.conv3d_weight(x, self.weight.shape, gradient, self.stride, padding)

    def output_range(self, start: int, stop: int, num_rows: int) -> tuple[int, int]:
        """Output rows of `num_rows` that input rows start to stop have a part in."""
        kernel, stride, padding = self.weight.shape[2], self.stride[0], self.padding[0]
        first = -((kernel - 1 - padding - start) // stride)
        return max(0, first), min(num_rows, (stop - 1 + padding) // stride + 1)

    def input_gradient(self, gradient: Tensor, first: int, start: int, stop: int, plane: torch.Size) -> Tensor:
        """The gradient of input rows start to stop.

        Args:
            gradient: Of the output rows from `first` on that `output_range` names.
            first: The first of them.
            start: First input row.
            stop: Row behind the last input row.
            plane: (J, K) of the input.
        """
        kernel, stride = self.weight.shape[2:], self.stride
        if not gradient.shape[2]:
            return gradient.new_zeros(gradient.shape[0], self.weight.shape[1], stop - start, *plane)
        # Where the wanted rows lie among those that the output rows reach, and how much of it a padding can cut off.
        offset = start + self.padding[0] - first * stride[0]
        reached = (gradient.shape[2] - 1) * stride[0] + kernel[0]
        cut = max(0, min(offset, reached - offset - (stop - start)))
        extra = [
            size - ((out - 1) * s - 2 * p + k)
            for size, out, k, s, p in zip(
                plane, gradient.shape[3:], kernel[1:], stride[1:], self.padding[1:], strict=True
            )
        ]
        full = F.conv_transpose3d(
            gradient, self.weight, None, stride, (cut, *self.padding[1:]), output_padding=(0, *extra)
        )
        # Rows that a stride steps over have no gradient.
        before = max(0, -offset)
        wanted = full[:, :, offset - cut + before : offset - cut + stop - start]
        after = stop - start - before - wanted.shape[2]
        return F.pad(wanted, (0, 0, 0, 0, before, after)) if before or after else wanted
