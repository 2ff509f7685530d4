from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry import Shape3, Spacing
from pipeline.plan import NetworkPlan, Rung
from pipeline.planning.candidates import patch_candidates
from pipeline.planning.executions import execution_families, relative_time
from pipeline.planning.search import choose_batch, choose_rung, fastest_fitting, largest_fitting
from pipeline.planning.topology import make_topology

edges = st.integers(4, 400)
shapes = st.tuples(edges, edges, edges)
millimetres = st.floats(0.3, 8.0)
spacings = st.tuples(millimetres, millimetres, millimetres)
budgets = st.integers(1_000_000, 10**10)
CONSTANT_BYTES = 1_000_000
Families = tuple[tuple[Rung, ...], ...]


def need(rung: Rung) -> int:
    """A smooth stand-in for the meter: bytes by voxel fall with each recomputed, slab and offloaded stage."""
    kept = 0.0
    for stage in range(8):
        size = 0.25**stage
        if stage < rung.offload_stages:
            kept += 20 * size
        elif stage < rung.slab_stages:
            kept += 150 * size
        else:
            kept += (220 if stage < rung.recompute_stages else 400) * size
    return CONSTANT_BYTES + int(rung.voxels * (60 + kept))


def ways_of(patch: Shape3, network: NetworkPlan, *, may_offload: bool = True) -> Families:
    families = execution_families(network, may_offload=may_offload)
    return tuple(
        tuple(
            Rung(
                patch_size=patch,
                **way._asdict(),
                relative_time=relative_time(network, patch, way, in_channels=1),
            )
            for way in family
        )
        for family in families
    )


def all_ways(shape: Shape3, spacing: Spacing, *, may_offload: bool = True) -> list[Families]:
    patches = patch_candidates(shape, spacing)
    return [ways_of(patch, make_topology(patch, spacing), may_offload=may_offload) for patch in patches]


@given(shape=shapes, spacing=spacings, budget=budgets)
@settings(max_examples=60, deadline=None)
def test_the_largest_fitting_size_is_the_one_a_full_scan_finds(shape: Shape3, spacing: Spacing, budget: int) -> None:
    needs = [need(families[0][0]) for families in all_ways(shape, spacing)]
    voxels = [families[0][0].voxels for families in all_ways(shape, spacing)]
    scanned = next((index for index, number in enumerate(needs) if number <= budget), None)
    assert largest_fitting(voxels, needs.__getitem__, budget) == scanned


@given(shape=shapes, spacing=spacings, budget=budgets, may_offload=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_chosen_rung_is_the_best_of_all_in_field_of_view_then_without_host_memory_then_in_time(
    shape: Shape3, spacing: Spacing, budget: int, may_offload: bool
) -> None:
    patches = all_ways(shape, spacing, may_offload=may_offload)
    chosen = choose_rung(patches, need, budget)
    fitting = [[way for family in families for way in family if need(way) <= budget] for families in patches]
    best = next((ways for ways in fitting if ways), None)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.patch_size == best[0].patch_size
    assert (chosen.offload_stages > 0, chosen.relative_time) == min(
        (way.offload_stages > 0, way.relative_time) for way in best
    )
    assert need(chosen) <= budget


@given(shape=shapes, spacing=spacings, budgets=st.tuples(budgets, budgets))
@settings(max_examples=60, deadline=None)
def test_more_memory_never_gives_a_smaller_patch(shape: Shape3, spacing: Spacing, budgets: tuple[int, int]) -> None:
    less, more = (choose_rung(all_ways(shape, spacing), need, budget) for budget in sorted(budgets))
    assert less is None or (more is not None and prod(less.patch_size) <= prod(more.patch_size))


def test_a_way_that_is_leaner_than_expected_wins_the_larger_patch() -> None:
    def slabs_are_lean_without_host(rung: Rung) -> int:
        return need(replace(rung, offload_stages=0)) + (10**8 if rung.offload_stages else 0)

    patches = all_ways((64, 96, 48), (1.0, 1.0, 1.0))
    budget = slabs_are_lean_without_host(patches[2][2][-1])
    chosen = choose_rung(patches, slabs_are_lean_without_host, budget)
    assert chosen is not None
    assert chosen.patch_size == patches[2][0][0].patch_size


def test_the_last_way_of_any_family_wins_the_larger_patch_and_is_found_for_it() -> None:
    patches = all_ways((64, 96, 48), (1.0, 1.0, 1.0), may_offload=False)
    for number in range(len(patches[1])):
        only = patches[1][number][-1]
        budget = 10**9

        def needs_one_family(rung: Rung, only: Rung = only, budget: int = budget) -> int:
            fits = rung == only or prod(rung.patch_size) < prod(only.patch_size)
            return budget if fits else 2 * budget

        assert choose_rung(patches, needs_one_family, budget) == only


def test_host_memory_is_left_alone_as_long_as_a_slower_way_fits() -> None:
    families = all_ways((64, 96, 48), (1.0, 1.0, 1.0))[0]
    least = min(need(way) for family in families if not family[0].offload_stages for way in family)
    chosen = fastest_fitting(families, need, least)
    assert chosen is not None
    assert chosen.offload_stages == 0
    tighter = fastest_fitting(families, need, least - 1)
    assert tighter is not None
    assert tighter.offload_stages > 0


def test_a_large_volume_asks_for_few_meterings() -> None:
    asked: set[Rung] = set()

    def counted_need(rung: Rung) -> int:
        asked.add(rung)
        return need(rung)

    patches = all_ways((512, 512, 256), (0.8, 0.8, 1.5))
    network = make_topology((384, 384, 192), (0.8, 0.8, 1.5))
    chosen = choose_rung(patches, counted_need, need(ways_of((384, 384, 192), network)[0][0]))
    assert chosen is not None
    assert prod(chosen.patch_size) > prod((384, 384, 192))
    assert len(asked) <= 16


@given(
    effective=st.one_of(st.just("auto"), st.integers(1, 12)),
    largest=st.integers(1, 40),
    budget=st.integers(CONSTANT_BYTES, 10**9),
)
@settings(deadline=None)
def test_an_automatic_batch_fills_the_budget_and_keeps_a_given_effective_batch(
    effective: Any, largest: int, budget: int
) -> None:
    rung = Rung(patch_size=(32, 40, 24), accumulate_grad_batches=2 if effective == "auto" else effective)
    chosen = choose_batch(rung, need, budget, effective_batch=effective, largest=largest)
    batch = chosen.batch_size
    assert batch == 1 or (batch <= largest and need(replace(rung, batch_size=batch)) <= budget)
    assert chosen.effective_batch == (max(2, batch) if effective == "auto" else effective)
    larger = [b for b in range(batch + 1, largest + 1) if effective == "auto" or effective % b == 0]
    assert not larger or need(replace(rung, batch_size=larger[0])) > budget
