"""What a forward pass of the U-Net without gradients takes of a process on a CPU, without running it.

The stages are gone through with sizes in place of tensors, in the order of `UNet.run_stages`, which is what lets go of
tensors and when. Beside them stands what convolutions allocate inside themselves. In narrow networks that can be most
of all: torch takes its own algorithm for small samples, whose columns are 27 copies of the input, unless
`pipeline.networks.small_convolution` asks oneDNN. Shapes: (B, C, I, J, K).
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from pipeline.geometry import Shape3
from pipeline.networks.blocks import ConvBlock, DecoderStage, ResidualBlock
from pipeline.networks.convolution_workspace import LARGEST_KEPT_BYTES, estimate_layer_workspace
from pipeline.networks.unet import UNet

FLOAT_BYTES = torch.float32.itemsize
# glibc's aligned blocks ask for a little more than the next freed one of their size has, so that each of the largest
# may leave a gap in the heap before neighbours make up a larger one. Six is fitted to predictions with U-Nets of 8, 16
# and 32 features in windows of 40 x 56 x 40 to 64^3, which held 30 to 120 MiB so, the same one 60 more or less from run
# to run (glibc 2.36). Told to keep nothing it held what is estimated without gaps, at 1.1 to 1.6 times the CPU time.
NUM_GAPS = 6
# Twice the largest block at the end of the heap (M_TRIM_THRESHOLD follows M_MMAP_THRESHOLD so), and as much in gaps.
MOST_KEPT_BYTES = 4 * LARGEST_KEPT_BYTES

_Shape = tuple[int, ...]


class ForwardMemory(NamedTuple):
    """What a forward pass takes beyond weights and input.

    Attributes:
        tensor_bytes: Most bytes of tensors that are alive at one time.
        peak_bytes: Most bytes at one time, with what convolutions allocate inside themselves.
        kept_bytes: Most bytes beside it of freed blocks that the C library keeps, in windows one after the other.
    """

    tensor_bytes: int
    peak_bytes: int
    kept_bytes: int


def estimate_forward_memory(network: UNet, window: Shape3, *, in_channels: int, batch_size: int = 1) -> ForwardMemory:
    """Estimate `UNet.pending_logits` in evaluation mode and float32 for windows.

    Stages in slabs take less; they are counted as whole ones.

    Args:
        network: On any device.
        window: I, J, K.
        in_channels: C.
        batch_size: B.
    """
    forward = _ForwardPass()
    x: _Shape = (batch_size, in_channels, *window)
    skips = []
    for stage in network.encoder:
        assert isinstance(stage, nn.Sequential)
        x = forward.blocks(stage, x)
        skips.append(x)
    x = skips.pop()
    for stage in reversed(network.decoder):
        assert isinstance(stage, DecoderStage)
        lower, skip = x, skips.pop()
        x = forward.decoder_stage(stage, lower, skip)
        forward.free(lower, skip)
    return ForwardMemory(forward.tensor_bytes, forward.peak_bytes, forward.kept_bytes)


class _ForwardPass:
    """Bytes that are alive; each method takes what its module returns and frees all else that it took itself."""

    def __init__(self) -> None:
        self._live_bytes = 0
        self._blocks: list[int] = []
        self.tensor_bytes = self.peak_bytes = 0

    @property
    def kept_bytes(self) -> int:
        kept = (size for size in self._blocks if size <= LARGEST_KEPT_BYTES)
        return min(MOST_KEPT_BYTES, sum(nlargest(NUM_GAPS, kept)))

    def free(self, *shapes: _Shape) -> None:
        self._live_bytes -= sum(map(_bytes, shapes))

    def decoder_stage(self, stage: DecoderStage, lower: _Shape, skip: _Shape) -> _Shape:
        up = self._convolve(stage.upsample, lower)
        merged = self._convolve(stage.merge.up_conv, up)
        self.free(self._convolve(stage.merge.skip_conv, skip))
        normed = self._take(merged)
        self.free(merged, up)
        if not len(stage.blocks):
            return normed
        out = self.blocks(stage.blocks, normed)
        self.free(normed)
        return out

    def blocks(self, blocks: Iterable[nn.Module], x: _Shape) -> _Shape:
        """The caller holds the input of the first block until the last one is done."""
        for number, block in enumerate(blocks):
            out = self._residual(block, x) if isinstance(block, ResidualBlock) else self._conv_block(block, x)
            if number:
                self.free(x)
            x = out
        return x

    def _conv_block(self, block: nn.Module, x: _Shape) -> _Shape:
        assert isinstance(block, ConvBlock)
        convolved = self._convolve(block.conv, x)
        normed = self._take(convolved)
        self.free(convolved)
        return normed

    def _residual(self, block: ResidualBlock, x: _Shape) -> _Shape:
        first = self._conv_block(block.first, x)
        convolved = self._convolve(block.conv, first)
        self.free(first)
        out = self._take(convolved)
        self.free(convolved)
        shortcut = x
        for layer in block.shortcut:
            result = self._layer(layer, shortcut)
            if shortcut is not x:
                self.free(shortcut)
            shortcut = result
        if shortcut is not x:
            self.free(shortcut)
        return out

    def _layer(self, layer: nn.Module, x: _Shape) -> _Shape:
        """A convolution, a pooling or a norm."""
        if isinstance(layer, nn.Conv3d):
            return self._convolve(layer, x)
        stride = layer.stride if isinstance(layer, nn.AvgPool3d) else (1, 1, 1)
        return self._take((*x[:2], *(size // step for size, step in zip(x[2:], stride, strict=True))))

    def _convolve(self, layer: nn.Conv3d | nn.ConvTranspose3d, x: _Shape) -> _Shape:
        """All of the U-Net's convolutions keep the size up to the stride, which divides it."""
        up = isinstance(layer, nn.ConvTranspose3d)
        sizes = (size * step if up else size // step for size, step in zip(x[2:], layer.stride, strict=True))
        out = self._take((x[0], layer.out_channels, *sizes))
        inside = estimate_layer_workspace(layer, x, out)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes + inside.num_bytes)
        self._blocks.append(inside.largest_bytes)
        return out

    def _take(self, shape: _Shape) -> _Shape:
        self._live_bytes += _bytes(shape)
        self.tensor_bytes = max(self.tensor_bytes, self._live_bytes)
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        self._blocks.append(_bytes(shape))
        return shape


def _bytes(shape: _Shape) -> int:
    return FLOAT_BYTES * prod(shape)
