"""Convolutions of one small sample in float32 on a CPU, which torch leaves to its slowest code.

Of a batch of one, torch gives oneDNN only what has more than 20,480 values along C, I and J, and computes the rest,
which is all of a small patch and the deep stages of any, as a matrix product of a copy with 27 times the values
(`ConvParams::use_mkldnn` in its Convolution.cpp). Here oneDNN is asked for directly; results differ by rounding only.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Of torch's rule: up to here it does not take oneDNN for a batch of one.
MOST_VALUES = 20480
# Products of input and output channels and voxels from which on oneDNN's own preparations pay (measured on AVX-512).
LEAST_WORK = 2**15
# On other processors oneDNN may have no fast code of its own; nothing was measured there.
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}


class Convolution(nn.Conv3d):
    """`nn.Conv3d` without groups and with zeros around, fast for small samples too."""

    def forward(self, x: Tensor) -> Tensor:
        """X (B, in, I, J, K) -> (B, out, I, J, K divided by the stride)."""
        if self._is_left_to_slow_code(x):
            return _DirectConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)

    def asks_onednn(self, shape: Sequence[int]) -> bool:
        """Whether oneDNN is asked for directly for a float32 input (B, in, I, J, K) on a CPU, outside autocast."""
        if shape[0] != 1 or self.weight.dtype != torch.float32 or self.kernel_size == (1, 1, 1):
            return False
        is_small = math.prod(shape[:4]) <= MOST_VALUES
        is_work = self.in_channels * self.out_channels * math.prod(shape[2:]) >= LEAST_WORK
        return (
            is_small and is_work and IS_X86 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        )

    def _is_left_to_slow_code(self, x: Tensor) -> bool:
        if type(x) is not Tensor or not _is_plain_torch():
            return False
        return x.device.type == "cpu" and x.dtype == torch.float32 and self.asks_onednn(x.shape)


def _is_plain_torch() -> bool:
    """Whether torch computes right now, in the dtype of the tensors.

    What records, meters or counts operators is shown torch's own.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return not torch.is_autocast_enabled("cpu")


class _DirectConvolution(torch.autograd.Function):
    """oneDNN's convolution; it keeps what torch's own keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        found: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
        return found

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        of_input, of_weight, of_bias = torch.ops.aten.convolution_backward(
            # Tensors of its own are what torch never takes from oneDNN.
            gradient.contiguous().to_mkldnn(),
            x.contiguous().to_mkldnn(),
            weight,
            [len(weight)],
            ctx.stride,
            ctx.padding,
            (1, 1, 1),
            False,
            (0, 0, 0),
            1,
            wanted,
        )
        return (_dense(of_input), _dense(of_weight), _dense(of_bias), None, None)


def _dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_mkldnn else gradient
