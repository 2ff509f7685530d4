"""Which ways of running a network's stages come into question, and how long they take against the plain way."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.geometry import Shape3
from pipeline.plan import Execution, NetworkPlan
from pipeline.planning.topology import forward_flops_per_stage

Family = tuple[Execution, ...]

# A tensor of a stage has a quarter of the bytes of one a stage above: from the fourth stage on it is all or nothing for
# recomputation, and from the third on for slabs.
DEEPEST_SINGLE_STAGE = 3
DEEPEST_SINGLE_SLAB_STAGE = 2

# Forward and backward pass of a stage in slabs against the same stage run plainly, from the highest resolution: what
# whole steps of 192 x 192 x 192 in ten slabs come to by stage, 1.31 times the plain one with the first stage in slabs
# and the others recomputed and 1.29 with five in slabs. Measured on a CPU (docs/benchmarks.md, "Ways of running the
# stages"); unmeasured on a GPU. What host memory adds hangs on the bus, and is assumed.
SLAB_TIME_FACTORS = (1.34, 1.24, 1.24)
OFFLOAD_TIME_FACTOR = 1.25
# Three times the operations of a forward pass make a step, and a recomputed stage runs forward once more.
RECOMPUTE_TIME_FACTOR = 4 / 3


def execution_families(network: NetworkPlan, *, may_offload: bool) -> tuple[Family, ...]:
    """Ways to run the network, in families: within one, each way recomputes more stages than the one before.

    So time grows and memory falls along a family. Families come in the order in which memory is expected to fall, those
    that need host memory last.
    """
    numbers = _slab_stages(network)
    families = [_family(network, slab_stages, 0) for slab_stages in (0, *numbers)]
    if may_offload:
        offloaded = [number for number in numbers if number <= DEEPEST_SINGLE_SLAB_STAGE]
        pairs = [(slabs, number) for number in offloaded for slabs in numbers[-2:] if slabs >= number]
        families += [_family(network, slabs, number) for slabs, number in pairs]
    return tuple(families)


def _slab_stages(network: NetworkPlan) -> tuple[int, ...]:
    """Numbers of stages that may run in slabs; the bottleneck gains nothing by it."""
    if not network.can_run_in_slabs:
        return ()
    every = network.num_stages - 1
    return tuple(sorted({*range(1, min(DEEPEST_SINGLE_SLAB_STAGE, every) + 1), every}))


def _family(network: NetworkPlan, slab_stages: int, offload_stages: int) -> Family:
    # The bottleneck alone is not worth its recomputation.
    most_slabs = slab_stages == network.num_stages - 1
    recomputed = [0, *(stages for stages in _recompute_stages(network) if stages > slab_stages and not most_slabs)]
    return tuple(Execution(stages, slab_stages, offload_stages) for stages in recomputed)


def _recompute_stages(network: NetworkPlan) -> Iterator[int]:
    yield from range(1, min(DEEPEST_SINGLE_STAGE, network.num_stages - 1) + 1)
    yield network.num_stages


def relative_time(network: NetworkPlan, patch_size: Shape3, execution: Execution, *, in_channels: int) -> float:
    """Time of a step against the plain step, by the operations of each stage's convolutions."""
    flops = forward_flops_per_stage(network, patch_size, in_channels=in_channels)
    weighted = sum(count * _time_factor(stage, execution) for stage, count in enumerate(flops))
    return weighted / sum(flops)


def _time_factor(stage: int, execution: Execution) -> float:
    if stage < execution.slab_stages:
        factor = SLAB_TIME_FACTORS[min(stage, len(SLAB_TIME_FACTORS) - 1)]
        return factor * (OFFLOAD_TIME_FACTOR if stage < execution.offload_stages else 1.0)
    return RECOMPUTE_TIME_FACTOR if stage < execution.recompute_stages else 1.0
