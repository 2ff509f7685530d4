"""Sums and gradients of a head's Dice and cross entropy on a GPU, without logits that are ever written.

Legend: B samples, C features, K classes, V voxels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.availability import serves
from pipeline.kernels.tensors import device_of, power_of_two, strided

# What a program holds of the gradient by the weights: more would not fit its registers.
MOST_WEIGHTS = 8192
TILE_VALUES, MOST_VOXELS, LEAST = 4096, 128, 16
# Four for each multiprocessor of a large GPU, as each leaves a gradient of the whole head.
NUM_PROGRAMS = 512


def serves_head(features: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take features (B, C, I, J, K') with a head of these weights (K, C)."""
    num_classes, num_channels = weight.shape
    return _padded(num_channels) * _padded(num_classes) <= MOST_WEIGHTS and serves(features)


class Head(NamedTuple):
    """What the kernels need beside features and target.

    Attributes:
        weight: (K, C).
        bias: (K,).
        class_weights: (K,), of the cross entropy.
        ignore_index: Target of voxels that do not count.
    """

    weight: Tensor
    bias: Tensor
    class_weights: Tensor
    ignore_index: int

    def add_up(self, features: Tensor, target: Tensor) -> Tensor:
        """Sums over the voxels as (B, 3 K + 2) float64: overlap, predicted and reference, cross entropy, its weights.

        Args:
            features: (B, C, V).
            target: (B, V) of any integer dtype.
        """
        from pipeline.kernels import head as kernels

        grid, size, tile = self._share_out(features)
        sums = features.new_empty((*reversed(grid), 3 * len(self.bias) + 2), dtype=torch.float32)
        with device_of(features):
            kernels.add_up[grid](strided(features), strided(target), self[:3], sums, size, *tile, **_warps(tile))
        return sums.sum(1, dtype=torch.float64)

    def differentiate(
        self, features: Tensor, target: Tensor, slopes: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by features (B, C, V), weight (K, C) and bias (K,); those of the head in float32.

        Args:
            features: (B, C, V).
            target: (B, V).
            slopes: As `losses.terms.Slopes`: (B or 1, K, 1), the same again, and a scalar.
        """
        from pipeline.kernels import head as kernels

        grid, size, tile = self._share_out(features)
        num_programs, dx = grid[0] * grid[1], torch.empty_like(features)
        by_weight = features.new_empty((num_programs, *self.weight.shape), dtype=torch.float32)
        by_bias = features.new_empty((num_programs, len(self.bias)), dtype=torch.float32)
        own, every, entropy = (slope.contiguous() for slope in slopes)
        of_loss = own, every, own.shape[1] if len(own) > 1 else 0, entropy
        results = strided(dx), by_weight, by_bias
        with device_of(features):
            kernels.differentiate[grid](
                strided(features), strided(target), (self[:3], of_loss), results, size, *tile, **_warps(tile)
            )
        return dx, by_weight.sum(0), by_bias.sum(0)

    def _share_out(self, features: Tensor) -> tuple[tuple[int, int], tuple[int, ...], tuple[int, int, int]]:
        """Blocks and samples, size and tile, as the kernels take them."""
        batch, channels, num_voxels = features.shape
        classes = len(self.bias)
        wide = max(_padded(channels), _padded(classes))
        tile = (max(min(TILE_VALUES // wide, MOST_VOXELS), LEAST), _padded(channels), _padded(classes))
        tiles = math.ceil(num_voxels / tile[0])
        rows = math.ceil(tiles / max(NUM_PROGRAMS // batch, 1)) * tile[0]
        return (math.ceil(num_voxels / rows), batch), (num_voxels, channels, classes, rows, self.ignore_index), tile


def _padded(number: int) -> int:
    """The least power of two that is not below it, and large enough for a matrix product."""
    return max(power_of_two(number), LEAST)


def _warps(tile: tuple[int, int, int]) -> dict[str, int]:
    """More threads where a program holds more."""
    return {"num_warps": 8 if tile[1] * tile[2] > MOST_WEIGHTS // 4 else 4}
