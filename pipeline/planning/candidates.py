"""Which patches, batches and recomputation come into question, and the search for the largest that fits.

A rung is one way to run a step. Field of view comes first: a larger patch with recomputation is taken over a smaller
one without, and the batch grows only when the patch covers the median case.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from pipeline.geometry import Shape3, Spacing
from pipeline.planning.topology import make_topology, round_up_patch

# An axis is not cut below this many voxels: patches without context do not train.
SMALLEST_EDGE = 16
NUM_INTERPOLATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run a training step: patch (I, J, K), patches per iteration, and recomputed stages from the top."""

    patch_size: Shape3
    batch_size: int = 1
    recompute_stages: int = 0

    @property
    def voxels(self) -> int:
        """Voxels of one iteration."""
        return prod(self.patch_size) * self.batch_size


RequiredBytes = Callable[[Rung], int]


def patch_candidates(median_shape: Shape3, spacing: Spacing) -> tuple[Shape3, ...]:
    """Patches from the whole median case downwards, each within the one before.

    The axis that is largest against the median case gives way, by one stride of the network, so that the aspect stays
    near the median's. This is the order in which nnU-Net's planner shrinks its patch.
    """
    patch = round_up_patch(median_shape, spacing)
    candidates = [patch]
    while smaller := _next_smaller(patch, median_shape, spacing):
        candidates.append(smaller)
        patch = smaller
    return tuple(candidates)


def _next_smaller(patch: Shape3, median_shape: Shape3, spacing: Spacing) -> Shape3 | None:
    strides = make_topology(patch, spacing).total_stride
    by_need = sorted(range(3), key=lambda axis: (-patch[axis] / median_shape[axis], -patch[axis]))
    for axis in by_need:
        edges = list(patch)
        edges[axis] -= max(strides[axis], 2)
        if edges[axis] < SMALLEST_EDGE:
            continue
        smaller = round_up_patch((edges[0], edges[1], edges[2]), spacing)
        if smaller != patch and all(a <= b for a, b in zip(smaller, patch, strict=True)):
            return smaller
    return None


def largest_fitting(rungs: Sequence[Rung], required_bytes: RequiredBytes, budget_bytes: int) -> int | None:
    """Index of the first of `rungs`, which fall in size, that fits the budget; None when not even the last does.

    Memory is nearly a straight line in the voxels, so a few guesses are interpolated before the rest is bisected; the
    answer and its larger neighbour are both asked for, never extrapolated.
    """
    if required_bytes(rungs[0]) <= budget_bytes:
        return 0
    if required_bytes(rungs[-1]) > budget_bytes:
        return None
    too_large, fits, tries = 0, len(rungs) - 1, 0
    while fits - too_large > 1:
        middle = (too_large + fits) // 2
        if tries < NUM_INTERPOLATIONS:
            middle = _interpolated(rungs, too_large, fits, required_bytes, budget_bytes)
        if required_bytes(rungs[middle]) <= budget_bytes:
            fits = middle
        else:
            too_large = middle
        tries += 1
    return fits


def _interpolated(
    rungs: Sequence[Rung], too_large: int, fits: int, required_bytes: RequiredBytes, budget_bytes: int
) -> int:
    """The index strictly between both whose voxels a line through them gives for the budget."""
    high, low = rungs[too_large], rungs[fits]
    share = (budget_bytes - required_bytes(low)) / max(1, required_bytes(high) - required_bytes(low))
    voxels = low.voxels + share * (high.voxels - low.voxels)
    guess = next(index for index in range(too_large, fits + 1) if rungs[index].voxels <= voxels or index == fits)
    return min(max(guess, too_large + 1), fits - 1)


def choose_patch(
    rungs: Sequence[Rung], required_bytes: RequiredBytes, budget_bytes: int, *, max_recompute: int
) -> Rung | None:
    """The largest of `rungs` that fits with at most `max_recompute` recomputed stages, and of these the fewest.

    Args:
        rungs: Without recomputation, the largest first.
        required_bytes: What a rung takes; more recomputed stages are taken never to need more.
        budget_bytes: What it may take.
        max_recompute: Most stages that may be recomputed.

    Returns:
        None when nothing fits.
    """
    plain = largest_fitting(rungs, required_bytes, budget_bytes)
    best = None if plain is None else rungs[plain]
    larger = [replace(rung, recompute_stages=max_recompute) for rung in rungs[:plain]]
    # The next larger patch is asked first: where even that does not fit, recomputation gains nothing.
    if not larger or required_bytes(larger[-1]) > budget_bytes:
        return best
    index = largest_fitting(larger, required_bytes, budget_bytes)
    return best if index is None else _with_least_recompute(larger[index], required_bytes, budget_bytes)


def _with_least_recompute(rung: Rung, required_bytes: RequiredBytes, budget_bytes: int) -> Rung:
    trials = [replace(rung, recompute_stages=stages) for stages in range(1, rung.recompute_stages + 1)]
    return trials[bisect_left(trials, True, key=lambda trial: required_bytes(trial) <= budget_bytes)]


def choose_batch(
    rung: Rung, required_bytes: RequiredBytes, budget_bytes: int, *, effective_batch: int, largest: int
) -> Rung:
    """The rung with as many patches per iteration as fit, at most `largest`.

    Below `effective_batch` it is a divisor of it, so that accumulation reaches it exactly.
    """
    sizes = [size for size in range(max(1, largest), 1, -1) if size >= effective_batch or effective_batch % size == 0]
    rungs = [replace(rung, batch_size=size) for size in [*sizes, 1]]
    index = largest_fitting(rungs, required_bytes, budget_bytes)
    return rung if index is None else rungs[index]
