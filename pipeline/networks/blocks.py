"""Convolution blocks of the U-Net. Shapes: (B, C, I, J, K).

Weights start as He et al. (2015) for leaky ReLUs of slope 0.01: their variance is 2 / (1 + 0.01^2) over the number of
inputs of an output voxel. The norm that ends a residual branch starts at zero, so each block starts as its shortcut.
Heads start as torch's own convolutions do, with small logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.geometry import Shape3
from pipeline.networks.norms import make_norm
from pipeline.networks.small_convolution import Convolution
from pipeline.plan import NetworkPlan
from pipeline.slabs.dtypes import compute_dtype

NEGATIVE_SLOPE = 0.01


def make_convolution(
    in_channels: int, out_channels: int, kernel_size: Shape3, *, stride: Shape3 = (1, 1, 1), num_summed: int = 1
) -> Convolution:
    """A convolution that keeps the size up to the stride; it has no bias because the norm behind it has one.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Odd along each axis.
        stride: Along i, j, k.
        num_summed: How many such convolutions add up to one output; each starts smaller for it.
    """
    padding = tuple(size // 2 for size in kernel_size)
    layer = Convolution(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    _start_as_he(layer.weight, in_channels * num_summed * math.prod(kernel_size))
    return layer


def _start_as_he(weight: Tensor, num_inputs: int) -> None:
    nn.init.normal_(weight, std=nn.init.calculate_gain("leaky_relu", NEGATIVE_SLOPE) / math.sqrt(num_inputs))


class ConvBlock(nn.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Shape3,
        network: NetworkPlan,
        *,
        stride: Shape3 = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv = make_convolution(in_channels, out_channels, kernel_size, stride=stride)
        self.norm = make_norm(network.norm, out_channels, num_groups=network.num_groups, negative_slope=NEGATIVE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, I, J, K) -> (B, out, I, J, K divided by the stride)."""
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Two convolutions with norms and a shortcut around them; pre-summation norm, activation after the sum."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Shape3,
        network: NetworkPlan,
        *,
        stride: Shape3 = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel_size, network, stride=stride)
        self.conv = make_convolution(out_channels, out_channels, kernel_size)
        self.norm = make_norm(network.norm, out_channels, num_groups=network.num_groups)
        nn.init.zeros_(self.norm.weight)
        self.shortcut = _make_shortcut(in_channels, out_channels, network, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, I, J, K) -> (B, out, I, J, K divided by the stride)."""
        out = self.norm(self.conv(self.first(x)))
        out += self.shortcut(x)
        return F.leaky_relu_(out, NEGATIVE_SLOPE)


def _make_shortcut(in_channels: int, out_channels: int, network: NetworkPlan, stride: Shape3) -> nn.Module:
    """Average pooling for the stride, 1x1x1 convolution and norm for the channels (He et al. 2019, ResNet-D)."""
    layers: list[nn.Module] = []
    if stride != (1, 1, 1):
        layers.append(nn.AvgPool3d(stride, stride))
    if in_channels != out_channels:
        layers.append(make_convolution(in_channels, out_channels, (1, 1, 1)))
        layers.append(make_norm(network.norm, out_channels, num_groups=network.num_groups))
    return nn.Sequential(*layers)


def make_encoder_stage(in_channels: int, network: NetworkPlan, index: int) -> nn.Sequential:
    """The blocks of one encoder stage; the first one has the stage's stride."""
    block: Callable[..., nn.Module] = ResidualBlock if network.block == "residual" else ConvBlock
    features, kernel = network.features_per_stage[index], network.kernel_sizes[index]
    return nn.Sequential(
        block(in_channels, features, kernel, network, stride=network.strides[index]),
        *(block(features, features, kernel, network) for _ in range(network.num_blocks_per_stage[index] - 1)),
    )


class MergeBlock(nn.Module):
    """Convolution of an up-sampled tensor and its skip, norm, leaky ReLU.

    Convolving their concatenation is the sum of two convolutions, so the concatenated tensor never exists: neither a
    copy of the skip for the backward pass, nor the gradient of both in one.
    """

    def __init__(self, channels: int, kernel_size: Shape3, network: NetworkPlan) -> None:
        super().__init__()
        self.up_conv = make_convolution(channels, channels, kernel_size, num_summed=2)
        self.skip_conv = make_convolution(channels, channels, kernel_size, num_summed=2)
        self.norm = make_norm(network.norm, channels, num_groups=network.num_groups, negative_slope=NEGATIVE_SLOPE)

    def forward(self, up: Tensor, skip: Tensor) -> Tensor:
        """Two tensors (B, C, I, J, K) -> the same shape."""
        merged = self.up_conv(up)
        merged += self.skip_conv(skip)
        return self.norm(merged)


class DecoderStage(nn.Module):
    """Up-sampling by a transposed convolution, then the plain blocks, the first of which takes the skip too."""

    def __init__(self, network: NetworkPlan, index: int) -> None:
        super().__init__()
        features, kernel = network.features_per_stage[index], network.kernel_sizes[index]
        stride = network.strides[index + 1]
        self.upsample = nn.ConvTranspose3d(network.features_per_stage[index + 1], features, stride, stride)
        _start_as_he(self.upsample.weight, self.upsample.in_channels)
        nn.init.zeros_(self.upsample.bias)
        self.merge = MergeBlock(features, kernel, network)
        self.blocks = nn.Sequential(
            *(ConvBlock(features, features, kernel, network) for _ in range(network.num_decoder_blocks - 1))
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """X (B, lower, I, J, K) and skip (B, C, I, J, K times the stride) -> (B, C, like skip)."""
        return self.blocks(self.merge(self.upsample(x), skip))


class Head(nn.Conv3d):
    """The 1x1x1 convolution from features to logits, computed as a matrix product.

    With few classes the matrix product is several times faster on CPUs than the convolution it equals.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, I, J, K) -> logits (B, classes, I, J, K) in the autocast dtype."""
        voxels = x.flatten(2)
        batch, classes = len(x), self.out_channels
        # Autocast copies what it casts at full size, so the bias is cast before it is expanded over the voxels.
        bias = self.bias.to(compute_dtype(x.dtype, x.device))[:, None].expand(batch, classes, voxels.shape[2])
        logits = torch.baddbmm(bias, self.weight.flatten(1).expand(batch, classes, -1), voxels)
        return logits.unflatten(2, x.shape[2:])
