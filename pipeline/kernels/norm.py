"""Kernels of group norm with leaky ReLU for GPUs, in Triton; `group_norm` is what uses them.

Sums are taken in two stages, first over blocks of voxels by as many programs as keep the whole GPU busy and then over
the blocks: torch's own kernel leaves the sums of a group to one multiprocessor, of which a GPU has a hundred. No sum
depends on the order in which programs end, so results are the same from run to run.

Arguments that belong together are tuples:
    an activation   pointer and strides by sample, channel and voxel, so that both memory formats are read as they are
    norm            pointers to statistics (N, G, 2), weight (C,) and bias (C,), and the slope of the leaky ReLU
    size            V, C, G, and rows and number of the blocks

Legend: N samples, C channels, V voxels, G groups. voxels_a_tile x channels_a_tile is what a program holds at one time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.programs import block_of_program


@triton.jit
def sum_moments(x, moments, size, voxels_a_tile: tl.constexpr, channels_a_tile: tl.constexpr):
    """Mean of every block and its sum of squares around it, (N, blocks, 2, C) float32."""
    num_voxels, num_channels, _, rows, _ = size
    start, stop = block_of_program(num_voxels, rows)
    channel = _channels(channels_a_tile)
    values, by_voxel = _columns(x, channel)
    is_channel = (channel < num_channels)[None, :]
    # Of values less one of them, so that a mean far from zero costs no digits.
    shift = tl.load(values + start * by_voxel, mask=is_channel, other=0).to(tl.float32)
    total = tl.zeros((voxels_a_tile, channels_a_tile), tl.float32)
    squares = tl.zeros((voxels_a_tile, channels_a_tile), tl.float32)
    for first in range(start, stop, voxels_a_tile):
        voxel = (first + tl.arange(0, voxels_a_tile))[:, None]
        inside = (voxel < stop) & is_channel
        value = tl.load(values + voxel * by_voxel, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - shift, 0)
        total += value
        squares += value * value
    column_total = tl.sum(total, 0)
    mean = column_total / (stop - start).to(tl.float32)
    _store_pair(
        moments, mean + tl.reshape(shift, (channels_a_tile,)), tl.sum(squares, 0) - column_total * mean, num_channels
    )


@triton.jit
def join_moments(moments, statistics, size, eps, blocks_a_tile: tl.constexpr, channels_a_tile: tl.constexpr):
    """Mean and 1 / standard deviation of every group, (N, G, 2) float32, from the moments of blocks."""
    num_voxels, num_channels, num_groups, rows, num_blocks = size
    group, sample = tl.program_id(0), tl.program_id(1)
    per_group = num_channels // num_groups
    column = tl.arange(0, channels_a_tile)[None, :]
    moments += sample.to(tl.int64) * num_blocks * 2 * num_channels + group * per_group + column
    num_values = 1.0 * num_voxels * per_group
    total = tl.zeros((blocks_a_tile, channels_a_tile), tl.float32)
    for first in range(0, num_blocks, blocks_a_tile):
        block = (first + tl.arange(0, blocks_a_tile))[:, None]
        inside = (block < num_blocks) & (column < per_group)
        count = tl.minimum(num_voxels - block * rows, rows).to(tl.float32)
        total += tl.load(moments + block * 2 * num_channels, mask=inside, other=0) * count
    mean = tl.sum(tl.sum(total, 1), 0) / num_values
    spread = tl.zeros((blocks_a_tile, channels_a_tile), tl.float32)
    for first in range(0, num_blocks, blocks_a_tile):
        block = (first + tl.arange(0, blocks_a_tile))[:, None]
        inside = (block < num_blocks) & (column < per_group)
        count = tl.minimum(num_voxels - block * rows, rows).to(tl.float32)
        distance = tl.load(moments + block * 2 * num_channels, mask=inside, other=0) - mean
        squares = tl.load(moments + (block * 2 + 1) * num_channels, mask=inside, other=0)
        spread += tl.where(inside, squares + distance * distance * count, 0)
    variance = tl.sum(tl.sum(spread, 1), 0) / num_values
    statistics += (sample * num_groups + group) * 2
    tl.store(statistics, mean)
    tl.store(statistics + 1, 1 / tl.sqrt(variance + eps))


@triton.jit
def normalise(x, y, norm, size, voxels_a_tile: tl.constexpr, channels_a_tile: tl.constexpr):
    """Write the normalised and activated values."""
    channel = _channels(channels_a_tile)
    values, by_voxel = _columns(x, channel)
    results, results_by_voxel = _columns(y, channel)
    voxel = _tile_of_voxels(voxels_a_tile)
    inside = (voxel < size[0]) & (channel < size[1])[None, :]
    mean, rstd, factor, summand = _of_channels(norm, channel, size)
    normal = (tl.load(values + voxel * by_voxel, mask=inside, other=0).to(tl.float32) - mean) * rstd
    z = normal * factor + summand
    z = tl.where(z > 0, z, z * norm[3])
    tl.store(results + voxel * results_by_voxel, z.to(y[0].dtype.element_ty), mask=inside)


@triton.jit
def sum_gradients(x, dy, sums, norm, size, voxels_a_tile: tl.constexpr, channels_a_tile: tl.constexpr):
    """Sums over every block of the gradient by what the activation takes, and of it times the normalised values.

    (N, blocks, 2, C) float32.
    """
    num_voxels, num_channels, _, rows, _ = size
    start, stop = block_of_program(num_voxels, rows)
    channel = _channels(channels_a_tile)
    values, by_voxel = _columns(x, channel)
    gradients, gradients_by_voxel = _columns(dy, channel)
    mean, rstd, factor, summand = _of_channels(norm, channel, size)
    plain = tl.zeros((voxels_a_tile, channels_a_tile), tl.float32)
    weighted = tl.zeros((voxels_a_tile, channels_a_tile), tl.float32)
    for first in range(start, stop, voxels_a_tile):
        voxel = (first + tl.arange(0, voxels_a_tile))[:, None]
        inside = (voxel < stop) & (channel < num_channels)[None, :]
        normal = (tl.load(values + voxel * by_voxel, mask=inside, other=0).to(tl.float32) - mean) * rstd
        dz = tl.load(gradients + voxel * gradients_by_voxel, mask=inside, other=0).to(tl.float32)
        dz = tl.where(normal * factor + summand > 0, dz, dz * norm[3])
        plain += dz
        weighted += dz * normal
    _store_pair(sums, tl.sum(plain, 0), tl.sum(weighted, 0), num_channels)


@triton.jit
def join_gradients(
    sums, by_channel, by_group, weight, size, blocks_a_tile: tl.constexpr, channels_a_tile: tl.constexpr
):
    """The sums of all blocks, (N, 2, C), and their weighted means over a group, (N, G, 2); float32."""
    num_voxels, num_channels, num_groups, _, num_blocks = size
    group, sample = tl.program_id(0), tl.program_id(1)
    per_group = num_channels // num_groups
    column = tl.arange(0, channels_a_tile)
    channel = group * per_group + column
    plain = tl.zeros((blocks_a_tile, channels_a_tile), tl.float32)
    weighted = tl.zeros((blocks_a_tile, channels_a_tile), tl.float32)
    sums += sample.to(tl.int64) * num_blocks * 2 * num_channels + channel[None, :]
    for first in range(0, num_blocks, blocks_a_tile):
        block = (first + tl.arange(0, blocks_a_tile))[:, None]
        inside = (block < num_blocks) & (column < per_group)[None, :]
        plain += tl.load(sums + block * 2 * num_channels, mask=inside, other=0)
        weighted += tl.load(sums + (block * 2 + 1) * num_channels, mask=inside, other=0)
    of_plain, of_weighted = tl.sum(plain, 0), tl.sum(weighted, 0)
    by_channel += sample * 2 * num_channels + channel
    tl.store(by_channel, of_plain, mask=column < per_group)
    tl.store(by_channel + num_channels, of_weighted, mask=column < per_group)
    factor = tl.load(weight + channel, mask=column < per_group, other=0).to(tl.float32)
    num_values = 1.0 * num_voxels * per_group
    by_group += (sample * num_groups + group) * 2
    tl.store(by_group, tl.sum(of_plain * factor, 0) / num_values)
    tl.store(by_group + 1, tl.sum(of_weighted * factor, 0) / num_values)


@triton.jit
def differentiate(x, dy, dx, norm, by_group, size, voxels_a_tile: tl.constexpr, channels_a_tile: tl.constexpr):
    """Write the gradient by x."""
    channel = _channels(channels_a_tile)
    values, by_voxel = _columns(x, channel)
    gradients, gradients_by_voxel = _columns(dy, channel)
    results, results_by_voxel = _columns(dx, channel)
    voxel = _tile_of_voxels(voxels_a_tile)
    inside = (voxel < size[0]) & (channel < size[1])[None, :]
    mean, rstd, factor, summand = _of_channels(norm, channel, size)
    of_plain, of_weighted = _of_groups(by_group, channel, size)
    normal = (tl.load(values + voxel * by_voxel, mask=inside, other=0).to(tl.float32) - mean) * rstd
    dz = tl.load(gradients + voxel * gradients_by_voxel, mask=inside, other=0).to(tl.float32)
    dz = tl.where(normal * factor + summand > 0, dz, dz * norm[3])
    gradient = rstd * (dz * factor - of_plain - normal * of_weighted)
    tl.store(results + voxel * results_by_voxel, gradient.to(dx[0].dtype.element_ty), mask=inside)


@triton.jit
def _tile_of_voxels(voxels_a_tile: tl.constexpr):
    """(voxels_a_tile, 1): this program's voxels where every program has one tile."""
    return (tl.program_id(0).to(tl.int64) * voxels_a_tile + tl.arange(0, voxels_a_tile))[:, None]


@triton.jit
def _channels(channels_a_tile: tl.constexpr):
    """(channels_a_tile,): this program's channels."""
    return tl.program_id(1) * channels_a_tile + tl.arange(0, channels_a_tile)


@triton.jit
def _columns(activation, channel):
    """Pointers (1, channels_a_tile) to channels' first voxels of this program's sample, and the stride by voxel."""
    pointer, by_sample, by_channel, by_voxel = activation
    sample = tl.program_id(2).to(tl.int64)
    return pointer + sample * by_sample + channel.to(tl.int64)[None, :] * by_channel, by_voxel


@triton.jit
def _of_groups(pairs, channel, size):
    """Both values (1, channels_a_tile) that pairs (N, G, 2) hold for the groups of channels."""
    _, num_channels, num_groups, _, _ = size
    inside = channel < num_channels
    pairs += (tl.program_id(2) * num_groups + channel // (num_channels // num_groups)) * 2
    return tl.load(pairs, mask=inside, other=0)[None, :], tl.load(pairs + 1, mask=inside, other=0)[None, :]


@triton.jit
def _of_channels(norm, channel, size):
    """Mean, 1 / standard deviation, weight and bias of channels, (1, channels_a_tile) each."""
    statistics, weight, bias, _ = norm
    inside = channel < size[1]
    mean, rstd = _of_groups(statistics, channel, size)
    factor = tl.load(weight + channel, mask=inside, other=0).to(tl.float32)[None, :]
    return mean, rstd, factor, tl.load(bias + channel, mask=inside, other=0).to(tl.float32)[None, :]


@triton.jit
def _store_pair(pairs, first, second, num_channels):
    """Write two values (channels_a_tile,) of this program's block into pairs (N, blocks, 2, C)."""
    channel = tl.program_id(1) * first.shape[0] + tl.arange(0, first.shape[0])
    pairs += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * num_channels + channel
    tl.store(pairs, first, mask=channel < num_channels)
    tl.store(pairs + num_channels, second, mask=channel < num_channels)
