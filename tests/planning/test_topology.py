from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pipeline.geometry import Shape3, Spacing
from pipeline.networks.unet import UNet
from pipeline.planning.topology import (
    COARSE_RATIO,
    MAX_STAGES,
    forward_flops_per_stage,
    make_topology,
    round_up_patch,
)

edges = st.integers(1, 300)
shapes = st.tuples(edges, edges, edges)
millimetres = st.floats(0.2, 12.0)
spacings = st.tuples(millimetres, millimetres, millimetres)


@given(shape=shapes, spacing=spacings)
@example(shape=(1, 15, 65), spacing=(1.0, 0.5, 3.0))
def test_a_rounded_patch_is_the_next_multiple_of_its_own_stride(shape: Shape3, spacing: Spacing) -> None:
    patch = round_up_patch(shape, spacing)
    stride = make_topology(patch, spacing).total_stride
    assert all(size % s == 0 for size, s in zip(patch, stride, strict=True))
    assert all(0 <= size - n < s for size, n, s in zip(patch, shape, stride, strict=True))
    assert round_up_patch(patch, spacing) == patch


@given(shape=shapes, spacing=spacings)
def test_the_bottleneck_keeps_at_least_four_voxels_of_every_halved_axis(shape: Shape3, spacing: Spacing) -> None:
    patch = round_up_patch(shape, spacing)
    network = make_topology(patch, spacing)
    assert 2 <= network.num_stages <= MAX_STAGES
    bottleneck = [size // s for size, s in zip(patch, network.total_stride, strict=True)]
    assert all(edge >= min(4, size) for edge, size in zip(bottleneck, patch, strict=True))
    if network.num_stages < MAX_STAGES:
        assert max(bottleneck) < 8


@given(shape=shapes, spacing=spacings)
def test_an_axis_is_halved_only_when_no_longer_axis_is_much_finer(shape: Shape3, spacing: Spacing) -> None:
    patch = round_up_patch(shape, spacing)
    edge, step = list(map(float, patch)), list(spacing)
    for stride in make_topology(patch, spacing).strides[1:]:
        finest = min((s for s, e in zip(step, edge, strict=True) if e >= 8), default=0.0)
        for axis in range(3):
            assert stride[axis] == 1 or step[axis] <= COARSE_RATIO * finest
        edge = [e / s for e, s in zip(edge, stride, strict=True)]
        step = [e * s for e, s in zip(step, stride, strict=True)]


def test_hippocampus_crops_get_three_halvings_and_the_patch_of_nnunet() -> None:
    patch = round_up_patch((35, 50, 36), (1.0, 1.0, 1.0))
    assert patch == (40, 56, 40)
    assert make_topology(patch, (1.0, 1.0, 1.0)).strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))


def test_thick_slices_are_first_convolved_and_halved_in_their_plane_only() -> None:
    network = make_topology((320, 256, 20), (0.5, 0.5, 5.0))
    assert network.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2))
    assert network.kernel_sizes == ((3, 3, 1), (3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3))


def test_the_coarse_axis_may_be_any_axis() -> None:
    along_k = make_topology((320, 256, 20), (0.5, 0.5, 5.0))
    along_i = make_topology((20, 256, 320), (5.0, 0.5, 0.5))
    assert along_i.strides == tuple(stride[::-1] for stride in along_k.strides)
    assert along_i.kernel_sizes == tuple(kernel[::-1] for kernel in along_k.kernel_sizes)


def test_features_double_up_to_their_cap() -> None:
    network = make_topology((128, 128, 128), (1.0, 1.0, 1.0))
    assert network.features_per_stage == (32, 64, 128, 256, 320, 320)
    assert network.num_blocks_per_stage == (2,) * 6


def test_residual_networks_put_their_blocks_where_the_resolution_is_low() -> None:
    network = make_topology((128, 128, 128), (1.0, 1.0, 1.0), block="residual")
    assert network.num_blocks_per_stage == (1, 3, 4, 6, 6, 6)
    assert network.num_decoder_blocks == 1


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize(("patch", "spacing"), [((32, 48, 16), (1.0, 1.0, 1.0)), ((48, 32, 16), (0.5, 0.6, 4.0))])
def test_counted_operations_are_those_that_pytorch_counts(patch: Shape3, spacing: Spacing, block: str) -> None:
    plan = make_topology(patch, spacing, base_features=8, block=block, deep_supervision=False)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(2, 3, plan).eval()(torch.empty(1, 2, *patch))
    # The head, and the 1x1x1 shortcuts of residual blocks, are left out on purpose.
    assert sum(forward_flops_per_stage(plan, patch, in_channels=2)) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


def test_operations_grow_with_the_voxels() -> None:
    plan = make_topology((64, 96, 32), (1.0, 1.0, 1.0))
    small, large = (forward_flops_per_stage(plan, p, in_channels=1) for p in ((64, 96, 32), (64, 96, 64)))
    assert [b / a for a, b in zip(small, large, strict=True)] == [prod((64, 96, 64)) / prod((64, 96, 32))] * len(small)
