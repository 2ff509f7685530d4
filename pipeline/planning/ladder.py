"""What stands around the chosen rung: the table that a person argues with, and the fallbacks below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import prod

from pipeline.geometry import Shape3
from pipeline.plan import NetworkPlan, Rung
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.planning.candidates import fallback_patches
from pipeline.planning.meter import StepMemory
from pipeline.planning.rung_meter import LASTING_PARTS, RungMeter
from pipeline.planning.search import largest_fitting
from pipeline.sizes import MIB

NUM_SMALLER_PATCHES = 2
# A step down that saves less than this share is not worth the interruption.
LEAST_SAVING = 0.02
# Nor is one that may not be seen by the device: PyTorch's caching allocator takes segments of 20 MiB for blocks of 1 to
# 10 MiB (kLargeBuffer of c10/cuda/CUDACachingAllocator).
LEAST_SAVED_BYTES = 20 * MIB


def list_candidates(
    meter: RungMeter, chosen: Rung, patches: Sequence[Shape3], budget_bytes: int, *, searched_batch: int
) -> tuple[Rung, ...]:
    """The chosen rung among its alternatives, the largest patch first and the fastest way first.

    These are the ways that the search looked at for the chosen patch, and the best one found for the next larger patch,
    the next smaller ones, and the largest patch that the plain step fits.

    Args:
        meter: Has metered what the search asked for.
        chosen: Rung of the plan.
        patches: That came into question, the largest first.
        budget_bytes: What a rung may take.
        searched_batch: Patches per iteration that patches were compared with.
    """
    index = patches.index(chosen.patch_size)
    own = [way for batch in {searched_batch, chosen.batch_size} for way in _known_ways(meter, chosen.patch_size, batch)]
    own = [meter.weighed(way) for way in {*own, chosen}]
    plain = _largest_plain(meter, patches[index:], budget_bytes, searched_batch)
    smaller = _next_smaller(meter, own, patches[index + 1 :], budget_bytes, searched_batch)
    found = [*own, *_next_larger(meter, patches[:index], searched_batch), *plain, *smaller]
    return tuple(sorted(dict.fromkeys(found), key=lambda rung: (-prod(rung.patch_size), rung.relative_time)))


def _known_ways(meter: RungMeter, patch_size: Shape3, batch_size: int) -> Iterator[Rung]:
    return (way for family in meter.families(patch_size, batch_size) for way in family if meter.is_known(way))


def _next_larger(meter: RungMeter, larger: Sequence[Shape3], batch_size: int) -> list[Rung]:
    """The leanest way of the next larger patch, which the search found too large."""
    ways = [meter.weighed(way) for patch in larger[-1:] for way in _known_ways(meter, patch, batch_size)]
    return [min(ways, key=lambda way: way.required_bytes)] if ways else []


def _largest_plain(meter: RungMeter, patches: Sequence[Shape3], budget_bytes: int, batch_size: int) -> list[Rung]:
    plain = [meter.families(patch, batch_size)[0][0] for patch in patches]
    voxels = [rung.voxels for rung in plain]
    index = largest_fitting(voxels, lambda at: meter.required_bytes(plain[at]), budget_bytes)
    return [] if index is None else [meter.weighed(plain[index])]


def _next_smaller(
    meter: RungMeter, own: Sequence[Rung], smaller: Sequence[Shape3], budget_bytes: int, batch_size: int
) -> list[Rung]:
    """The fastest way that fits for each of the next smaller patches, of the ways weighed for the chosen one."""
    weighed = [way for way in own if way.batch_size == batch_size]
    found: list[Rung] = []
    for patch in smaller[:NUM_SMALLER_PATCHES]:
        likely = map(meter.weighed, _likely_ways(meter, weighed, patch, budget_bytes))
        found += islice((rung for rung in likely if rung.required_bytes <= budget_bytes), 1)
    return found


def _likely_ways(meter: RungMeter, weighed: Sequence[Rung], patch_size: Shape3, budget_bytes: int) -> list[Rung]:
    """Ways to run a smaller patch that fit when memory is scaled by the voxels, the fastest first."""
    scale = prod(patch_size) / prod(weighed[0].patch_size)
    fitting = {way.execution for way in weighed if way.required_bytes * scale <= budget_bytes}
    ways = [way for family in meter.families(patch_size, weighed[0].batch_size) for way in family]
    likely = [way for way in ways if way.execution in fitting]
    return sorted(likely, key=lambda way: (way.offload_stages > 0, way.relative_time))


def list_fallbacks(meter: RungMeter, chosen: Rung) -> tuple[Rung, ...]:
    """Rungs below the chosen one, in stepping order: smaller batches, then leaner ways, then smaller patches.

    All are metered, train the chosen rung's network with its effective batch, and save enough of the one before.
    Smaller batches come first, for they cost no time: statistics are taken per patch, so the training is the same.
    """
    network = meter.network_plan(chosen.patch_size)
    rungs = [meter.weighed(chosen)]
    least = _least_bytes(meter.memory(chosen))
    for rung in _below(meter, network, rungs):
        if rungs[-1].required_bytes - least < LEAST_SAVED_BYTES:
            break
        weighed = meter.weighed(rung, network=network)
        if _saves_enough(rungs[-1], weighed):
            rungs.append(weighed)
    return tuple(rungs[1:])


def _below(meter: RungMeter, network: NetworkPlan, rungs: Sequence[Rung]) -> Iterator[Rung]:
    """What may come next, below the last of the rungs that were taken so far: the list grows meanwhile."""
    # Batch norm in a smaller batch would be another training.
    yield from _smaller_batches(rungs[0]) if network.norm != "batch" else ()
    ways = _slower_ways(meter, rungs[-1])
    yield from (way for way in ways if not way.offload_stages)
    # Where the leanest of several saves too little, none of the others need be metered: memory falls with the stages
    # in host memory, and grows with the patch.
    with_host = [way for way in ways if way.offload_stages]
    if with_host and _saves_enough(rungs[-1], meter.weighed(with_host[-1], network=network)):
        yield from with_host
    top = rungs[-1]
    patches = [replace(top, patch_size=patch) for patch in fallback_patches(top.patch_size, network.total_stride)]
    if patches and _saves_enough(top, smallest := meter.weighed(patches[-1], network=network)):
        yield from (patch for patch in patches if _may_save_enough(rungs[-1], patch, smallest))


def _may_save_enough(before: Rung, patch: Rung, smallest: Rung) -> bool:
    """Whether a patch between two that were metered is worth metering: memory is nearly a straight line in the voxels.

    A fifth is allowed for the "nearly".
    """
    share = (before.voxels - patch.voxels) / (before.voxels - smallest.voxels)
    saved = share * (before.required_bytes - smallest.required_bytes)
    return saved >= 0.8 * _least_saving(before)


def _least_bytes(memory: StepMemory) -> int:
    """What no rung of the network can go below: the device's constant share, and what lives through every step."""
    lasting = sum(memory.parts.get(part, 0) for part in LASTING_PARTS)
    return lasting + estimate_overhead_bytes(lasting)


def _slower_ways(meter: RungMeter, rung: Rung) -> list[Rung]:
    """Other ways to run the rung's patches: those metered already, all recomputed, and the leanest by host memory."""
    known = _known_ways(meter, rung.patch_size, rung.batch_size)
    families = meter.families(rung.patch_size, rung.batch_size)
    last = {family[0].offload_stages: family[-1] for family in families}
    ways = {*known, families[0][-1], *last.values()}
    kept = [replace(way, accumulate_grad_batches=rung.accumulate_grad_batches) for way in ways]
    return sorted(kept, key=lambda way: (way.offload_stages > 0, way.relative_time))


def _smaller_batches(rung: Rung) -> Iterator[Rung]:
    """The rung with batches of half the size and less, down to 1."""
    total, batch_size = rung.effective_batch, rung.batch_size
    while batch_size > 1:
        batch_size = next(size for size in range(batch_size // 2, 0, -1) if total % size == 0)
        yield replace(rung, batch_size=batch_size, accumulate_grad_batches=total // batch_size)


def _saves_enough(before: Rung, after: Rung) -> bool:
    return before.required_bytes - after.required_bytes >= _least_saving(before)


def _least_saving(before: Rung) -> float:
    """A share of what the step itself takes, the device's constant share left out, and a number of bytes."""
    return max(LEAST_SAVING * (before.required_bytes - estimate_overhead_bytes(0)), LEAST_SAVED_BYTES)
