"""The search for the largest patch that fits, and for the fastest way to run it.

Field of view comes first: a larger patch that is recomputed or runs in slabs is taken over a smaller one that is not,
and the batch grows only when the patch covers the median case. Nothing here knows how memory is predicted: functions
take `required_bytes`, which answers for a rung and is asked as rarely as can be.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pipeline.plan import Rung

RequiredBytes = Callable[[Rung], int]
# All ways to run one patch: families along which time grows and memory falls, see `execution_families`.
Families = Sequence[Sequence[Rung]]

NUM_INTERPOLATIONS = 5


def largest_fitting(voxels: Sequence[int], required_bytes: Callable[[int], int], budget_bytes: int) -> int | None:
    """Index of the first of the sizes, which fall, that fits the budget; None when not even the last does.

    Memory is nearly a straight line in the voxels, so a few guesses are interpolated before the rest is bisected; the
    answer and its larger neighbour are both asked for, never extrapolated.

    Args:
        voxels: Of each size, the largest first.
        required_bytes: What the size at an index takes.
        budget_bytes: What it may take.
    """
    if required_bytes(0) <= budget_bytes:
        return 0
    too_large, fits, tries = 0, len(voxels), 0
    while fits - too_large > 1:
        middle = (too_large + fits) // 2
        if tries < NUM_INTERPOLATIONS:
            middle = _interpolated(voxels, required_bytes, budget_bytes, too_large, fits)
        if required_bytes(middle) <= budget_bytes:
            fits = middle
        else:
            too_large = middle
        tries += 1
    return fits if fits < len(voxels) else None


def _interpolated(
    voxels: Sequence[int], required_bytes: Callable[[int], int], budget_bytes: int, too_large: int, fits: int
) -> int:
    """The index strictly between both whose voxels a line through them gives for the budget.

    Before anything was found to fit, the line goes through no voxels and no bytes.
    """
    none_fits = fits == len(voxels)
    low_voxels, low_bytes = (0, 0) if none_fits else (voxels[fits], required_bytes(fits))
    share = (budget_bytes - low_bytes) / max(1, required_bytes(too_large) - low_bytes)
    wanted = low_voxels + share * (voxels[too_large] - low_voxels)
    guess = next((index for index in range(too_large, fits) if voxels[index] <= wanted), fits)
    return min(max(guess, too_large + 1), fits - 1)


def choose_rung(patches: Sequence[Families], required_bytes: RequiredBytes, budget_bytes: int) -> Rung | None:
    """The largest patch that fits in any way, run in the way that takes the least time.

    Args:
        patches: Ways to run each patch, the largest patch first.
        required_bytes: What a rung takes.
        budget_bytes: What it may take.

    Returns:
        None when nothing fits.
    """
    plain = patches[0][0][0]
    if required_bytes(plain) <= budget_bytes:
        return plain

    def of_leanest(index: int) -> int:
        return required_bytes(leanest_ways(patches[index])[0])

    index = largest_fitting([families[0][0].voxels for families in patches], of_leanest, budget_bytes)
    index = len(patches) if index is None else index
    # Which family is the leanest is an expectation, so the larger neighbour is asked for in all of them.
    while index and any(required_bytes(way) <= budget_bytes for way in leanest_ways(patches[index - 1])):
        index -= 1
    return None if index == len(patches) else fastest_fitting(patches[index], required_bytes, budget_bytes)


def leanest_ways(families: Families) -> list[Rung]:
    """The leanest way of each family, beginning with the one that is expected to take least."""
    return [family[-1] for family in reversed(families)]


def fastest_fitting(families: Families, required_bytes: RequiredBytes, budget_bytes: int) -> Rung | None:
    """The way to run a patch that fits and takes the least time; host memory is used only when nothing else fits."""
    for needs_host in (False, True):
        group = [family for family in families if (family[0].offload_stages > 0) == needs_host]
        if found := _fastest_of(group, required_bytes, budget_bytes):
            return found
    return None


def _fastest_of(families: Families, required_bytes: RequiredBytes, budget_bytes: int) -> Rung | None:
    best = None
    # A family that is fast to its end leaves little to ask of the others.
    for family in sorted(families, key=lambda ways: ways[-1].relative_time):
        faster = [way for way in family if best is None or way.relative_time < best.relative_time]
        if faster and required_bytes(faster[-1]) <= budget_bytes:
            best = faster[bisect_left(faster, True, key=lambda way: required_bytes(way) <= budget_bytes)]
    return best


def choose_batch(
    rung: Rung,
    required_bytes: RequiredBytes,
    budget_bytes: int,
    *,
    effective_batch: int | Literal["auto"],
    largest: int,
) -> Rung:
    """The rung, of batch 1, with as many patches per iteration as fit, at most `largest`.

    It is a divisor of a given `effective_batch`, so that accumulation reaches that exactly.
    """
    sizes = [size for size in range(largest, 1, -1) if effective_batch == "auto" or effective_batch % size == 0]
    rungs = [_with_batch(rung, size) for size in [*sizes, 1]]
    index = largest_fitting([way.voxels for way in rungs], lambda at: required_bytes(rungs[at]), budget_bytes)
    return rung if index is None else rungs[index]


def _with_batch(rung: Rung, batch_size: int) -> Rung:
    return replace(rung, batch_size=batch_size, accumulate_grad_batches=max(1, rung.effective_batch // batch_size))
