"""The shape of the U-Net that suits a patch: strides, kernels, features and blocks of each stage.

Axes are (i, j, k) everywhere. The rule for strides and kernels follows Isensee et al. 2021 (nnU-Net, Nature Methods
18, 203-211): an axis is halved while its edge allows, and a coarse axis waits until the others have caught up with it.
"""

from __future__ import annotations

from math import prod

from pipeline.geometry import Shape3, Spacing
from pipeline.plan import BlockName, NetworkPlan, NormName

SMALLEST_HALVED_EDGE = 8
COARSE_RATIO = 2.0
# Below a stride of 32 more stages add little memory, but patches could only grow in steps of 64 voxels and more.
MAX_STAGES = 6
PLAIN_BLOCKS = 2
# Residual encoders put their depth where it is cheap; Isensee et al. 2024, "nnU-Net Revisited", MICCAI.
RESIDUAL_BLOCKS = (1, 3, 4, 6)


def make_topology(
    patch_size: Shape3,
    spacing: Spacing,
    *,
    base_features: int = 32,
    max_features: int = 320,
    block: BlockName = "plain",
    norm: NormName = "group",
    num_groups: int = 32,
    deep_supervision: bool = True,
) -> NetworkPlan:
    """The network for patches of about `patch_size` voxels with `spacing` in millimetres.

    A patch from `round_up_patch` is a multiple of this network's total stride.
    """
    strides, kernels = _strides_and_kernels(patch_size, spacing)
    num_stages = len(strides)
    return NetworkPlan(
        features_per_stage=tuple(min(max_features, base_features * 2**stage) for stage in range(num_stages)),
        strides=strides,
        kernel_sizes=kernels,
        num_blocks_per_stage=_blocks_per_stage(block, num_stages),
        num_decoder_blocks=PLAIN_BLOCKS if block == "plain" else 1,
        block=block,
        norm=norm,
        num_groups=num_groups,
        deep_supervision=deep_supervision,
    )


def _blocks_per_stage(block: BlockName, num_stages: int) -> tuple[int, ...]:
    if block == "plain":
        return (PLAIN_BLOCKS,) * num_stages
    return tuple(RESIDUAL_BLOCKS[min(stage, len(RESIDUAL_BLOCKS) - 1)] for stage in range(num_stages))


def _strides_and_kernels(patch_size: Shape3, spacing: Spacing) -> tuple[tuple[Shape3, ...], tuple[Shape3, ...]]:
    """Halve every axis that is long enough and not much coarser than the finest such axis, stage by stage."""
    edges, steps = [float(n) for n in patch_size], list(spacing)
    strides, kernels = [_shape3(1, 1, 1)], [_kernel(steps, _shape3(1, 1, 1))]
    while len(strides) < MAX_STAGES:
        stride = _next_stride(edges, steps)
        if stride == (1, 1, 1) and len(strides) > 1:
            break
        edges = [edge / s for edge, s in zip(edges, stride, strict=True)]
        steps = [step * s for step, s in zip(steps, stride, strict=True)]
        strides.append(stride)
        kernels.append(_kernel(steps, kernels[-1]))
    return tuple(strides), tuple(kernels)


def _next_stride(edges: list[float], steps: list[float]) -> Shape3:
    long_enough = [edge >= SMALLEST_HALVED_EDGE for edge in edges]
    finest = min((step for step, is_long in zip(steps, long_enough, strict=True) if is_long), default=0.0)
    return _shape3(
        *(2 if ok and step <= COARSE_RATIO * finest else 1 for ok, step in zip(long_enough, steps, strict=True))
    )


def _kernel(steps: list[float], previous: Shape3) -> Shape3:
    """3 along an axis once its voxels are not much longer than the shortest, and from then on."""
    finest = min(steps)
    return _shape3(
        *(3 if k == 3 or step <= COARSE_RATIO * finest else 1 for k, step in zip(previous, steps, strict=True))
    )


def _shape3(i: int, j: int, k: int) -> Shape3:
    return i, j, k


def round_up_patch(patch_size: Shape3, spacing: Spacing) -> Shape3:
    """A patch that covers `patch_size` by less than one stride of its own topology, and is a multiple of that stride.

    A patch that is such a multiple already comes back as it is.
    """
    rounded, seen = patch_size, set[Shape3]()
    while True:
        strides, _ = _strides_and_kernels(rounded, spacing)
        total = [prod(stride[axis] for stride in strides) for axis in range(3)]
        previous, rounded = rounded, _shape3(*(-(-n // s) * s for n, s in zip(patch_size, total, strict=True)))
        # A rounded edge may be long enough for one more halving, so its own strides are looked at again.
        if rounded == previous:
            return rounded
        # Strides of one axis depend on the others, so roundings might alternate: then one of them is what is wanted.
        if rounded in seen:
            patch_size, seen = rounded, set()
        seen.add(rounded)


def forward_flops_per_stage(network: NetworkPlan, patch_size: Shape3, *, in_channels: int) -> tuple[int, ...]:
    """Floating-point operations of one patch's forward pass in each resolution's encoder and decoder stage.

    Convolutions alone are counted; heads, norms and the loss are bound by memory bandwidth rather than by arithmetic.
    """
    voxels, flops = prod(patch_size), []
    last = network.num_stages - 1
    for stage, features in enumerate(network.features_per_stage):
        voxels //= prod(network.strides[stage])
        kernel = prod(network.kernel_sizes[stage])
        below = network.features_per_stage[stage - 1] if stage else in_channels
        pairs = kernel * features * (below + features * (_convolutions(network, stage) - 1))
        if stage < last:
            # The first decoder block sees the skip beside the up-sampled tensor: two convolutions' worth.
            pairs += kernel * features * features * (network.num_decoder_blocks + 1)
            pairs += features * network.features_per_stage[stage + 1]
        flops.append(2 * voxels * pairs)
    return tuple(flops)


def _convolutions(network: NetworkPlan, stage: int) -> int:
    return network.num_blocks_per_stage[stage] * (2 if network.block == "residual" else 1)
