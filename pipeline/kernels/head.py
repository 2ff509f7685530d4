"""Kernels of a head and its Dice and cross entropy for GPUs, in Triton; `head_loss` is what uses them.

A program takes a tile of voxels from features to logits, probabilities and what they add to the loss, or back to the
gradient of the features, and keeps all of it in registers: neither logits nor probabilities are ever written. The
formulas are those of `losses.softmax_terms`.

Arguments that belong together are tuples:
    an activation   pointer and strides by sample, channel and voxel
    head            pointers to weight (K, C), bias (K,) and class weights (K,)
    slopes          pointers to own (B or 1, K) and every (B or 1, K), their stride by sample, pointer to the slope of
                    the cross entropy
    size            V, C, K, rows of a block, and the target that is ignored

Legend: B samples, V voxels, C features, K classes. A tile is voxels_a_tile x channels_a_tile features, or x
classes_a_tile logits; both are powers of two, of which C and K fill a part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.programs import block_of_program


@triton.jit
def add_up(
    x,
    target,
    head,
    sums,
    size,
    voxels_a_tile: tl.constexpr,
    channels_a_tile: tl.constexpr,
    classes_a_tile: tl.constexpr,
):
    """Sums over every block, (B, blocks, 3 K + 2) float32.

    Of each class overlap, probability and number of voxels, then the cross entropy and the weights it is divided by.
    """
    num_voxels, num_channels, num_classes, rows, _ = size
    start, stop = block_of_program(num_voxels, rows)
    label = tl.arange(0, classes_a_tile)
    weight, bias = _weight_and_bias(head, size, x, channels_a_tile, classes_a_tile)
    overlap = tl.zeros((classes_a_tile,), tl.float32)
    predicted = tl.zeros((classes_a_tile,), tl.float32)
    reference = tl.zeros((classes_a_tile,), tl.float32)
    entropies = tl.zeros((voxels_a_tile,), tl.float32)
    weights = tl.zeros((voxels_a_tile,), tl.float32)
    for first in range(start, stop, voxels_a_tile):
        voxel = first + tl.arange(0, voxels_a_tile)
        features = _features(x, voxel, stop, num_channels, channels_a_tile)
        own, counts, voxel_weight = _targets(target, head, voxel, stop, size)
        is_own = own[:, None] == label[None, :]
        probability, own_log = _softmax(features, weight, bias, is_own, counts)
        predicted += tl.sum(probability, 0)
        overlap += tl.sum(tl.where(is_own, probability, 0.0), 0)
        reference += tl.sum(tl.where(is_own, counts[:, None], 0.0), 0)
        entropies -= own_log * voxel_weight
        weights += voxel_weight
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    sums += program * (3 * num_classes + 2)
    is_class = label < num_classes
    tl.store(sums + label, overlap, mask=is_class)
    tl.store(sums + num_classes + label, predicted, mask=is_class)
    tl.store(sums + 2 * num_classes + label, reference, mask=is_class)
    tl.store(sums + 3 * num_classes, tl.sum(entropies, 0))
    tl.store(sums + 3 * num_classes + 1, tl.sum(weights, 0))


@triton.jit
def differentiate(
    x,
    target,
    head_and_slopes,
    results,
    size,
    voxels_a_tile: tl.constexpr,
    channels_a_tile: tl.constexpr,
    classes_a_tile: tl.constexpr,
):
    """Write the gradient by x, and what every block adds to those of weight and bias.

    Results are an activation for the gradient by x, and pointers to (B * blocks, K, C) and (B * blocks, K) float32.
    """
    num_voxels, num_channels, num_classes, rows, _ = size
    head, slopes = head_and_slopes
    dx, by_weight, by_bias = results
    start, stop = block_of_program(num_voxels, rows)
    label, channel = tl.arange(0, classes_a_tile), tl.arange(0, channels_a_tile)
    weight, bias = _weight_and_bias(head, size, x, channels_a_tile, classes_a_tile)
    own_slope, every_slope, entropy_slope = _slopes(slopes, label, num_classes)
    weight_sum = tl.zeros((classes_a_tile, channels_a_tile), tl.float32)
    bias_sum = tl.zeros((classes_a_tile,), tl.float32)
    for first in range(start, stop, voxels_a_tile):
        voxel = first + tl.arange(0, voxels_a_tile)
        features = _features(x, voxel, stop, num_channels, channels_a_tile)
        own, counts, voxel_weight = _targets(target, head, voxel, stop, size)
        is_own = own[:, None] == label[None, :]
        probability, _own_log = _softmax(features, weight, bias, is_own, counts)
        by_own = tl.sum(tl.where(is_own, probability * own_slope, 0.0), 1)
        by_entropy = entropy_slope * voxel_weight
        shared = by_entropy - by_own - tl.sum(probability * every_slope, 1)
        gradient = probability * (every_slope + shared[:, None])
        gradient += tl.where(is_own, (by_own - by_entropy)[:, None], 0.0)
        bias_sum += tl.sum(gradient, 0)
        rounded = gradient.to(features.dtype)
        weight_sum += tl.dot(tl.trans(rounded), features, input_precision="ieee")
        by_features = tl.dot(rounded, tl.trans(weight), input_precision="ieee")
        results_of_tile = _columns(dx, voxel, channel)
        inside = (voxel < stop)[:, None] & (channel < num_channels)[None, :]
        tl.store(results_of_tile, by_features.to(features.dtype), mask=inside)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    is_class = label < num_classes
    tl.store(by_bias + program * num_classes + label, bias_sum, mask=is_class)
    by_weight += (program * num_classes + label[:, None]) * num_channels + channel[None, :]
    tl.store(by_weight, weight_sum, mask=is_class[:, None] & (channel < num_channels)[None, :])


@triton.jit
def _columns(activation, voxel, channel):
    """Pointers (voxels, channels) of this program's sample."""
    pointer, by_sample, by_channel, by_voxel = activation
    sample = tl.program_id(1).to(tl.int64)
    return pointer + sample * by_sample + voxel[:, None] * by_voxel + channel.to(tl.int64)[None, :] * by_channel


@triton.jit
def _features(x, voxel, stop, num_channels, channels_a_tile: tl.constexpr):
    """(voxels, channels), zero beside the block and behind C."""
    channel = tl.arange(0, channels_a_tile)
    inside = (voxel < stop)[:, None] & (channel < num_channels)[None, :]
    return tl.load(_columns(x, voxel, channel), mask=inside, other=0)


@triton.jit
def _weight_and_bias(head, size, x, channels_a_tile: tl.constexpr, classes_a_tile: tl.constexpr):
    """Weight (channels, classes) in the dtype of x, and bias (1, classes), minus infinity behind K."""
    _, num_channels, num_classes, _, _ = size
    channel, label = tl.arange(0, channels_a_tile)[:, None], tl.arange(0, classes_a_tile)[None, :]
    inside = (channel < num_channels) & (label < num_classes)
    weight = tl.load(head[0] + label * num_channels + channel, mask=inside, other=0).to(x[0].dtype.element_ty)
    return weight, tl.load(head[1] + label, mask=label < num_classes, other=float("-inf")).to(tl.float32)


@triton.jit
def _slopes(slopes, label, num_classes):
    """Own and every (1, classes), zero behind K, and that of the cross entropy."""
    own, every, by_sample, entropy = slopes
    offset = tl.program_id(1) * by_sample + label
    is_class = label < num_classes
    own_slope = tl.load(own + offset, mask=is_class, other=0).to(tl.float32)[None, :]
    every_slope = tl.load(every + offset, mask=is_class, other=0).to(tl.float32)[None, :]
    return own_slope, every_slope, tl.load(entropy).to(tl.float32)


@triton.jit
def _targets(target, head, voxel, stop, size):
    """Class of each voxel, 1 where it counts and else 0, and the weight of its cross entropy; (voxels,) each.

    The weight of what is no class is not a number, so that neither is the loss.
    """
    pointer, by_sample, by_voxel = target
    inside = voxel < stop
    found = tl.load(pointer + tl.program_id(1).to(tl.int64) * by_sample + voxel * by_voxel, mask=inside, other=0)
    found = found.to(tl.int32)
    is_counted = inside & (found != size[4])
    own = tl.where(is_counted, found, 0)
    counts = is_counted.to(tl.float32)
    weight = tl.load(head[2] + own, mask=(own >= 0) & (own < size[2]), other=float("nan"))
    return own, counts, counts * weight.to(tl.float32)


@triton.jit
def _softmax(features, weight, bias, is_own, counts):
    """Probabilities (voxels, classes), zero where a voxel does not count, and the log of that of its class."""
    logits = tl.dot(features, weight, input_precision="ieee") + bias
    shifted = logits - tl.max(logits, 1)[:, None]
    exponential = tl.exp(shifted)
    norm = tl.sum(exponential, 1)
    own_log = tl.sum(tl.where(is_own, shifted, 0.0), 1) - tl.log(norm)
    return exponential * (counts / norm)[:, None], own_log
