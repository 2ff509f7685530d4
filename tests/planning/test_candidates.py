from __future__ import annotations

from itertools import pairwise
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry import Shape3, Spacing
from pipeline.planning.candidates import (
    SMALLEST_EDGE,
    Rung,
    choose_batch,
    choose_patch,
    largest_fitting,
    patch_candidates,
)
from pipeline.planning.topology import make_topology, round_up_patch

edges = st.integers(4, 400)
shapes = st.tuples(edges, edges, edges)
millimetres = st.floats(0.3, 8.0)
spacings = st.tuples(millimetres, millimetres, millimetres)
STAGES = 6
CONSTANT_BYTES = 1_000_000


def need(rung: Rung) -> int:
    """A smooth stand-in for the meter: bytes by voxel that fall, ever less, with each recomputed stage."""
    return CONSTANT_BYTES + int(rung.voxels * (200 + 400 * 0.5**rung.recompute_stages))


@given(shape=shapes, spacing=spacings)
@settings(max_examples=60, deadline=None)
def test_candidates_shrink_from_the_rounded_median_case_to_small_patches(shape: Shape3, spacing: Spacing) -> None:
    candidates = patch_candidates(shape, spacing)
    assert candidates[0] == round_up_patch(shape, spacing)
    for larger, smaller in pairwise(candidates):
        assert smaller != larger
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
    for patch in candidates:
        assert all(n % s == 0 for n, s in zip(patch, make_topology(patch, spacing).total_stride, strict=True))
    assert max(candidates[-1]) <= 2 * SMALLEST_EDGE


def test_candidates_keep_the_aspect_of_the_median_case() -> None:
    for patch in patch_candidates((512, 512, 256), (0.8, 0.8, 1.5)):
        if min(patch) >= 64:
            assert patch[0] / patch[1] in (1.0, patch[0] / (patch[0] + 32), (patch[1] + 32) / patch[1])
            assert 1.4 <= patch[0] / patch[2] <= 2.7


@given(shape=shapes, spacing=spacings, budget=st.integers(CONSTANT_BYTES // 2, 10**10))
@settings(max_examples=60, deadline=None)
def test_the_largest_fitting_patch_is_the_one_a_full_scan_finds(shape: Shape3, spacing: Spacing, budget: int) -> None:
    rungs = [Rung(patch_size=patch) for patch in patch_candidates(shape, spacing)]
    scanned = next((index for index, rung in enumerate(rungs) if need(rung) <= budget), None)
    assert largest_fitting(rungs, need, budget) == scanned


@given(shape=shapes, spacing=spacings, budgets=st.tuples(*[st.integers(CONSTANT_BYTES, 10**10)] * 2))
@settings(max_examples=60, deadline=None)
def test_more_memory_never_gives_a_smaller_patch(shape: Shape3, spacing: Spacing, budgets: tuple[int, int]) -> None:
    rungs = [Rung(patch_size=patch) for patch in patch_candidates(shape, spacing)]
    less, more = (choose_patch(rungs, need, budget, max_recompute=STAGES) for budget in sorted(budgets))
    assert less is None or (more is not None and prod(less.patch_size) <= prod(more.patch_size))


@given(shape=shapes, spacing=spacings, budget=st.integers(CONSTANT_BYTES, 10**10))
@settings(max_examples=60, deadline=None)
def test_the_chosen_rung_is_the_best_of_all_in_field_of_view_then_in_time(
    shape: Shape3, spacing: Spacing, budget: int
) -> None:
    rungs = [Rung(patch_size=patch) for patch in patch_candidates(shape, spacing)]
    every = [Rung(patch_size=rung.patch_size, recompute_stages=r) for rung in rungs for r in range(STAGES + 1)]
    best = next((rung for rung in every if need(rung) <= budget), None)
    assert choose_patch(rungs, need, budget, max_recompute=STAGES) == best


def test_a_large_volume_asks_for_few_meterings() -> None:
    asked: set[Rung] = set()

    def counted_need(rung: Rung) -> int:
        asked.add(rung)
        return need(rung)

    rungs = [Rung(patch_size=patch) for patch in patch_candidates((512, 512, 256), (0.8, 0.8, 1.5))]
    budget = need(Rung(patch_size=(384, 384, 192)))
    chosen = choose_patch(rungs, counted_need, budget, max_recompute=STAGES)
    assert chosen is not None
    assert chosen.recompute_stages > 0
    assert len(asked) <= 14


@given(effective=st.integers(1, 12), largest=st.integers(1, 40), budget=st.integers(CONSTANT_BYTES, 10**9))
@settings(deadline=None)
def test_an_automatic_batch_fills_the_budget_and_accumulates_exactly(effective: int, largest: int, budget: int) -> None:
    rung = Rung(patch_size=(32, 40, 24))
    batch = choose_batch(rung, need, budget, effective_batch=effective, largest=largest).batch_size
    assert batch == 1 or (batch <= largest and need(Rung(patch_size=(32, 40, 24), batch_size=batch)) <= budget)
    assert batch >= effective or effective % batch == 0
    larger = [b for b in range(batch + 1, largest + 1) if b >= effective or effective % b == 0]
    assert not larger or need(Rung(patch_size=(32, 40, 24), batch_size=larger[0])) > budget
