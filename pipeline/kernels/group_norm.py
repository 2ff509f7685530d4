"""Group norm and leaky ReLU as one operation of a GPU, in the memory format that its convolutions are fastest in.

cuDNN's kernels for half precision take channels last, and turn every activation around that comes otherwise; on an H100
that, and torch's kernel of the norm, were half of a training step (docs/benchmarks.md has the figures). The norm is
where activations are written anyway, so it is what writes them channels last: whatever follows a norm keeps the format.

Nothing is kept for the backward pass but the input and the groups' statistics. Values are computed in float32, whatever
the input's dtype.

Legend: N samples, C channels, V voxels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.tensors import device_of, flat_voxels, power_of_two, strided
from pipeline.slabs.backward import first_derivative_only

# A tile fills the registers of four warps: 32 values and two sums of each a thread.
TILE_VALUES, MOST_CHANNELS = 4096, 64
# Eight for each multiprocessor of a large GPU.
NUM_PROGRAMS = 1024


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, *, eps: float, negative_slope: float = 1.0
) -> Tensor:
    """Normalise x (N, C, I, J, K) -> same shape and dtype, channels last.

    Args:
        x: Of a GPU and a dtype that `availability.serves` accepts.
        num_groups: A divisor of C.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: Added to the variance.
        negative_slope: Of the leaky ReLU behind the norm; 1 for none.
    """
    channels = x.shape[1]
    weight = x.new_ones(channels) if weight is None else weight
    bias = x.new_zeros(channels) if bias is None else bias
    with device_of(x):
        return _FusedNorm.apply(x, weight, bias, num_groups, eps, negative_slope)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, negative_slope: float
    ) -> Tensor:
        from pipeline.kernels import norm as kernels

        flat, tiling = flat_voxels(x), _Tiling.of(x, num_groups)
        moments, statistics = tiling.new_sums(x), x.new_empty((len(x), num_groups, 2), dtype=torch.float32)
        y = torch.empty_like(x, memory_format=torch.channels_last_3d)
        norm = statistics, weight, bias, negative_slope
        kernels.sum_moments[tiling.by_block](strided(flat), moments, tiling.size, *tiling.tile)
        kernels.join_moments[tiling.by_group](moments, statistics, tiling.size, eps, *tiling.joined)
        kernels.normalise[tiling.by_tile](strided(flat), strided(flat_voxels(y)), norm, tiling.size, *tiling.tile)
        ctx.save_for_backward(flat, weight, bias, statistics)
        ctx.tiling, ctx.negative_slope = tiling, negative_slope
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from pipeline.kernels import norm as kernels

        flat, weight, bias, statistics = ctx.saved_tensors
        tiling: _Tiling = ctx.tiling
        x, gradient = strided(flat), strided(flat_voxels(dy))
        norm = statistics, weight, bias, ctx.negative_slope
        sums, by_group = tiling.new_sums(flat), torch.empty_like(statistics)
        by_channel = flat.new_empty((len(flat), 2, tiling.num_channels), dtype=torch.float32)
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        with device_of(flat):
            kernels.sum_gradients[tiling.by_block](x, gradient, sums, norm, tiling.size, *tiling.tile)
            kernels.join_gradients[tiling.by_group](sums, by_channel, by_group, weight, tiling.size, *tiling.joined)
            if dx is not None:
                kernels.differentiate[tiling.by_tile](
                    x, gradient, strided(dx), norm, by_group, tiling.size, *tiling.tile
                )
                dx = dx.view(dy.shape)
        by_bias, by_weight = by_channel.sum(0).unbind(0)
        return dx, by_weight.to(weight.dtype), by_bias.to(bias.dtype), None, None, None


class _Tiling(NamedTuple):
    """How the work on an activation is shared out.

    Attributes:
        size: V, C, groups, and voxels and number of the blocks, as the kernels take them.
        num_samples: N.
        tile: Voxels and channels of a tile.
        joined: Blocks and channels of a tile of sums.
    """

    size: tuple[int, int, int, int, int]
    num_samples: int
    tile: tuple[int, int]
    joined: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, num_groups: int) -> _Tiling:
        """How work on x (N, C, I, J, K) is shared out."""
        samples, channels, *shape = x.shape
        num_voxels, per_group = math.prod(shape), channels // num_groups
        tile_channels = min(power_of_two(channels), MOST_CHANNELS)
        tile_voxels = TILE_VALUES // tile_channels
        num_columns = samples * math.ceil(channels / tile_channels)
        tiles = math.ceil(num_voxels / tile_voxels)
        rows = math.ceil(tiles / max(NUM_PROGRAMS // num_columns, 1)) * tile_voxels
        joined = power_of_two(per_group)
        size = (num_voxels, channels, num_groups, rows, math.ceil(num_voxels / rows))
        return cls(size, samples, (tile_voxels, tile_channels), (max(TILE_VALUES // joined // 4, 1), joined))

    def new_sums(self, like: Tensor) -> Tensor:
        """(N, blocks, 2, C) float32 for two sums of each block."""
        return like.new_empty((self.num_samples, self.num_blocks, 2, self.num_channels), dtype=torch.float32)

    @property
    def num_channels(self) -> int:
        """C."""
        return self.size[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of voxels that are summed on their own."""
        return self.size[4]

    @property
    def by_block(self) -> tuple[int, int, int]:
        """A program for each block, tile of channels and sample."""
        return self.num_blocks, math.ceil(self.num_channels / self.tile[1]), self.num_samples

    @property
    def by_tile(self) -> tuple[int, int, int]:
        """A program for each tile and sample."""
        return math.ceil(self.size[0] / self.tile[0]), *self.by_block[1:]

    @property
    def by_group(self) -> tuple[int, int]:
        """A program for each group and sample."""
        return self.size[2], self.num_samples
