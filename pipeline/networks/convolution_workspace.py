"""What a CPU's convolutions take inside themselves and give back: memory of the process that no tensor shows.

Rules found by measuring: single convolutions and their backward passes (float32 and bf16, 3 to 128 channels, kernels 1
to 7, strides 1 and 2, transposed or not), each between a reset of the process's peak (`/proc/self/clear_refs`) and a
reading of it (`VmHWM`), with torch 2.13 (oneDNN 3.12), one thread and AVX-512 with bf16. Most rules were within 4 % and
all within 15 %, but for bf16 1x1x1 convolutions to over 64 channels and transposed ones with overlapping windows, which
take up to half more. Other CPUs and releases of oneDNN may choose other algorithms.

Legend: B samples, C channels, V voxels. A blocked tensor has its channels filled up to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.networks.small_convolution import Convolution

aten = torch.ops.aten
# glibc takes freed blocks up to this size back into its heap, which does not shrink as long as anything lies behind
# them; larger ones go back to the system. DEFAULT_MMAP_THRESHOLD_MAX on 64 bits, less a page for a block's header.
LARGEST_KEPT_BYTES = 32 * 1024**2 - 4096
CHANNELS_PER_BLOCK = 16
# oneDNN reads tensors with fewer channels, such as images, as they are.
FEWEST_BLOCKED_CHANNELS = 4
HALF_PRECISION = (torch.bfloat16, torch.float16)


def estimate_cpu_workspace(func: Any, args: Sequence[Any], result: Any) -> int:
    """Bytes that an operator allocates and frees inside, at their most and beyond its arguments and results.

    Args:
        func: An operator as a dispatch mode gets it; all but convolutions are taken to need nothing.
        args: Its positional arguments, real or fake.
        result: What it returned.
    """
    rule = _RULES.get(func)
    return max(0, rule(args, result)) if rule is not None else 0


class Workspace(NamedTuple):
    """What a layer's forward pass allocates and frees inside.

    Attributes:
        num_bytes: At their most, beyond input, weights and output.
        largest_bytes: Of the largest single block.
    """

    num_bytes: int
    largest_bytes: int


def estimate_layer_workspace(
    layer: nn.Conv3d | nn.ConvTranspose3d, shape: Sequence[int], out_shape: Sequence[int]
) -> Workspace:
    """The workspace of a layer on a CPU in float32, without running it.

    Args:
        layer: On any device.
        shape: (B, C, I, J, K) of the input.
        out_shape: Of the output.
    """
    # Only sizes are looked at, so one number stands for a whole tensor.
    x, weight, y = (torch.empty(1).expand(*size) for size in (shape, layer.weight.shape, out_shape))
    transposed = isinstance(layer, nn.ConvTranspose3d)
    geometry = (layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups)
    conv = _convolution((x, weight, None, *geometry), y)
    if isinstance(layer, Convolution) and layer.asks_onednn(shape):
        conv = conv._replace(is_onednn=True)
    return Workspace(max(0, _forward_bytes(conv)), _largest_block(conv))


class _Convolution(NamedTuple):
    """The small side x is a convolution's input and y its output, whether the convolution is transposed or not."""

    x: Tensor
    weight: Tensor
    y: Tensor
    stride: Sequence[int]
    transposed: bool
    is_onednn: bool

    @property
    def kernel(self) -> torch.Size:
        return self.weight.shape[2:]

    @property
    def weight_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    @property
    def is_strided(self) -> bool:
        return max(self.stride) > 1

    @property
    def keeps_layout(self) -> bool:
        """Tensors with channels last are read and written as they are."""
        return self.x.is_contiguous(memory_format=_channels_last(self.x)) and self.x.shape[1] > 1


def _convolution(args: Sequence[Any], y: Tensor) -> _Convolution:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    backend = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, None
    )
    return _Convolution(x, weight, y, stride, transposed, _is_onednn(backend))


def _forward(args: Sequence[Any], y: Tensor) -> int:
    return _forward_bytes(_convolution(args, y))


def _forward_bytes(conv: _Convolution) -> int:
    if not conv.is_onednn:
        return 0 if prod(conv.kernel) == 1 else _column_bytes(conv)
    if conv.keeps_layout:
        return 0
    if conv.transposed:
        return 2 * _bytes(conv.y)
    return _reordered_bytes(conv.x, conv.y, conv.weight_bytes)


def _largest_block(conv: _Convolution) -> int:
    """Of what the forward pass allocates inside."""
    if not conv.is_onednn or conv.keeps_layout:
        return _forward_bytes(conv)
    return max(_blocked_bytes(conv.x, is_read=True), _blocked_bytes(conv.y))


def _backward(args: Sequence[Any], result: Sequence[Tensor | None]) -> int:
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted = args
    backend = torch._C._select_conv_backend(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups, bias_sizes
    )
    conv = _Convolution(x, weight, gradient, stride, transposed, _is_onednn(backend))
    copied = 0 if conv.keeps_layout or gradient.is_contiguous() else _bytes(gradient)
    by_input = _backward_by_input(conv) if wanted[0] else 0
    by_weight = _backward_by_weight(conv) if wanted[1] else 0
    return copied + max(by_input, by_weight)


def _backward_by_input(conv: _Convolution) -> int:
    x, y = conv.x, conv.y
    if not conv.is_onednn:
        return _bytes(x) if prod(conv.kernel) == 1 else _column_bytes(conv)
    if conv.keeps_layout:
        return 0
    if conv.is_strided and not conv.transposed:
        return 2 * _bytes(x)
    return _reordered_bytes(y, x, conv.weight_bytes)


def _backward_by_weight(conv: _Convolution) -> int:
    if not conv.is_onednn:
        return 0 if prod(conv.kernel) == 1 else _column_bytes(conv)
    images = 0 if conv.keeps_layout else _blocked_bytes(conv.x, is_read=True) + _blocked_bytes(conv.y)
    # Gradients of half-precision weights are summed in float32.
    summed = conv.weight.numel() * 4
    return max(images + _transposed_bytes(conv) + summed, summed + conv.weight_bytes) - conv.weight_bytes


def _transposed_bytes(conv: _Convolution) -> int:
    """Copies of one sample's tensors with voxels along the last axis in pairs, as half-precision products want them."""
    if conv.x.dtype not in HALF_PRECISION or (conv.kernel[-1] == 1 and conv.stride[-1] == 1):
        return 0
    return (_blocked_bytes(conv.x, is_read=True) + _blocked_bytes(conv.y)) // len(conv.x)


def _reordered_bytes(read: Tensor, written: Tensor, weight_bytes: int) -> int:
    """A primitive reads and writes blocked copies; then the written one is copied to where the result lies."""
    blocked = _blocked_bytes(written)
    at_work = _blocked_bytes(read, is_read=True) + weight_bytes + blocked
    return max(at_work, blocked + _bytes(written)) - _bytes(written)


def _column_bytes(conv: _Convolution) -> int:
    """Columns (C * kernel, V) of torch's own algorithm, for all samples, or for one when transposed."""
    if conv.transposed:
        columns = conv.weight.shape[1] * prod(conv.kernel) * prod(conv.x.shape[2:])
    else:
        columns = len(conv.x) * conv.x.shape[1] * prod(conv.kernel) * prod(conv.y.shape[2:])
    return columns * conv.x.element_size()


def _blocked_bytes(tensor: Tensor, *, is_read: bool = False) -> int:
    channels = tensor.shape[1]
    if is_read and channels < FEWEST_BLOCKED_CHANNELS:
        return 0
    blocked = -(-channels // CHANNELS_PER_BLOCK) * CHANNELS_PER_BLOCK
    return _bytes(tensor) // channels * blocked


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last


def _is_onednn(backend: Any) -> bool:
    # Python knows no name for the transposed one, so names that are known to be others decide.
    return not any(str(backend).endswith(name) for name in _OWN_ALGORITHMS)


_OWN_ALGORITHMS = ("Slow2d", "Slow3d", "SlowDilated2d", "SlowDilated3d", "SlowTranspose2d", "SlowTranspose3d", "Empty")
_RULES: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    aten.convolution.default: _forward,
    aten.convolution_backward.default: _backward,
}
