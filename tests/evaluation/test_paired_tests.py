"""The signed-rank test against its definition, and Holm's adjustment against the closed testing it stands for."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import rankdata

from pipeline.evaluation.paired_tests import holm, signed_rank_p, unit_means

RNG = np.random.default_rng(11)


def enumerated_p(differences: np.ndarray) -> float:
    """Two-sided p by all 2^n signs: what the test is defined as."""
    ranks = rankdata(np.abs(differences))
    sums = np.array([np.dot(ranks, signs) for signs in product([-1, 1], repeat=len(ranks))])
    return float(np.mean(np.abs(sums) >= abs(np.dot(ranks, np.sign(differences))) - 1e-9))


@pytest.mark.parametrize("number", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("digits", [1, 8])
def test_p_is_exact_for_few_cases_with_and_without_ties(number, digits):
    differences = np.round(RNG.normal(0.3, 1.0, number), digits)
    differences[differences == 0] = 0.1
    assert signed_rank_p(differences)[0] == pytest.approx(enumerated_p(differences))


def test_few_cases_cannot_give_a_small_p_and_the_least_is_told():
    for number in (1, 3, 5, 6):
        p, least = signed_rank_p(np.arange(1, number + 1) / 10)
        assert p == pytest.approx(least) == pytest.approx(2.0 ** (1 - number))
    assert signed_rank_p(np.arange(1, 6) / 10)[1] > 0.05 > signed_rank_p(np.arange(1, 7) / 10)[1]


def test_equal_cases_do_not_count_also_where_rounding_tells_them_apart():
    some = np.array([0.3, -0.1, 0.2, 0.4, 0.5, 0.6])
    assert signed_rank_p(np.concatenate([some, [0.0, 0.0, 1e-15]])) == signed_rank_p(some)
    assert signed_rank_p(np.zeros(4)) == (1.0, 1.0)
    assert np.isnan(signed_rank_p(np.zeros(0))).all()


def test_p_does_not_depend_on_which_run_is_first():
    differences = RNG.normal(0.2, 1.0, 30)
    assert signed_rank_p(differences) == pytest.approx(signed_rank_p(-differences))


def closed_bonferroni(p_values: list[float]) -> list[float]:
    """The adjusted p of each: the largest Bonferroni p of all sets of hypotheses that it is in."""
    everything = range(len(p_values))
    sets = [each for size in range(1, len(p_values) + 1) for each in combinations(everything, size)]
    of_set = {each: min(1.0, len(each) * min(p_values[index] for index in each)) for each in sets}
    return [max(p for each, p in of_set.items() if index in each) for index in everything]


def test_adjusted_p_values_are_those_of_closed_testing():
    for _ in range(20):
        p_values = np.round(RNG.random(6) ** 3, 2).tolist()
        assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


def test_a_row_without_a_test_is_no_test_to_pay_for():
    assert holm([0.01, float("nan"), 0.04])[0] == pytest.approx(0.02)
    assert np.isnan(holm([0.01, float("nan")])[1])
    assert holm([]) == []


def test_a_patient_counts_once():
    values = np.array([0.1, 0.3, 0.5])
    assert unit_means(values, ["b", "b", "a"]).tolist() == pytest.approx([0.5, 0.2])
