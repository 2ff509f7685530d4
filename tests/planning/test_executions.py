from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.plan import Execution
from pipeline.planning.executions import (
    OFFLOAD_TIME_FACTOR,
    SLAB_TIME_FACTORS,
    execution_families,
    relative_time,
)
from pipeline.planning.topology import forward_flops_per_stage, make_topology

PATCH = (64, 96, 32)
NETWORK = make_topology(PATCH, (1.0, 1.0, 1.0))
FLOPS = forward_flops_per_stage(NETWORK, PATCH, in_channels=1)
SHARES = [count / sum(FLOPS) for count in FLOPS]


def time_of(*stages: int) -> float:
    return relative_time(NETWORK, PATCH, Execution(*stages), in_channels=1)


def test_recomputation_adds_a_third_of_the_recomputed_stages() -> None:
    assert time_of() == 1.0
    assert time_of(2) - 1 == pytest.approx((SHARES[0] + SHARES[1]) / 3)
    assert time_of(NETWORK.num_stages) == pytest.approx(4 / 3)


def test_a_stage_in_slabs_is_charged_its_factor_instead_of_recomputation() -> None:
    slabs = SHARES[0] * (SLAB_TIME_FACTORS[0] - 1)
    assert time_of(0, 1) - 1 == pytest.approx(slabs)
    assert time_of(2, 1) - 1 == pytest.approx(slabs + SHARES[1] / 3)
    assert time_of(0, 1, 1) == pytest.approx(
        time_of(0, 1) + SHARES[0] * SLAB_TIME_FACTORS[0] * (OFFLOAD_TIME_FACTOR - 1)
    )


@pytest.mark.parametrize("may_offload", [False, True])
def test_every_way_is_valid_for_its_network_and_slower_along_its_family(may_offload: bool) -> None:
    families = execution_families(NETWORK, may_offload=may_offload)
    assert families[0][0] == Execution()
    ways = [way for family in families for way in family]
    assert len(set(ways)) == len(ways)
    assert not [problem for way in ways for problem in way.problems(NETWORK)]
    assert any(way.offload_stages for way in ways) == may_offload
    for family in families:
        times = [time_of(*way) for way in family]
        assert all(a < b for a, b in pairwise(times))
        every_in_slabs = family[0].slab_stages == NETWORK.num_stages - 1
        assert family[-1].recompute_stages == (0 if every_in_slabs else NETWORK.num_stages)


@pytest.mark.parametrize("options", [{"block": "residual"}, {"norm": "batch"}])
def test_networks_that_cannot_run_in_slabs_are_only_recomputed(options: dict[str, str]) -> None:
    network = make_topology(PATCH, (1.0, 1.0, 1.0), **options)
    families = execution_families(network, may_offload=True)
    assert len(families) == 1
    assert not any(way.slab_stages for way in families[0])


def test_a_network_of_two_stages_has_its_ways_too() -> None:
    network = make_topology((8, 8, 8), (1.0, 1.0, 1.0))
    ways = [way for family in execution_families(network, may_offload=True) for way in family]
    assert not [problem for way in ways for problem in way.problems(network)]


@pytest.mark.parametrize(
    ("execution", "words"),
    [
        ((0, 0, 0), "plain"),
        ((1, 0, 0), "recompute 1"),
        ((6, 0, 0), "recompute 1-6"),
        ((0, 1, 0), "slabs 1"),
        ((2, 2, 0), "slabs 1-2"),
        ((3, 2, 0), "slabs 1-2, recompute 3"),
        ((6, 2, 1), "slabs 1-2 (1 in host memory), recompute 3-6"),
    ],
)
def test_a_way_is_told_in_words(execution: tuple[int, int, int], words: str) -> None:
    assert str(Execution(*execution)) == words
