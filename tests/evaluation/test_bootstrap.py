"""Intervals of means: what they contain, what they depend on, and an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.bootstrap import LEVEL, Interval, interval_method, mean_intervals

RNG = np.random.default_rng(3)


def cases(number: int) -> list[str]:
    return [f"case_{index}" for index in range(number)]


def test_the_interval_is_that_of_another_implementation_up_to_the_noise_of_resampling():
    values = 1 - RNG.gamma(2.0, 0.05, 40)
    (ours,), _ = mean_intervals(values[:, None], cases(40))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", confidence_level=LEVEL, n_resamples=20_000, rng=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_the_same_seed_gives_the_same_interval_and_another_one_a_slightly_other():
    values = RNG.random((20, 3))
    first, again, other = (mean_intervals(values, cases(20), seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_cases_of_a_patient_are_drawn_together_which_widens_the_interval():
    by_patient = np.repeat(RNG.normal(0.8, 0.1, 8), 6)[:, None]
    patients = [f"patient_{index // 6}" for index in range(48)]
    (together,), _ = mean_intervals(by_patient, patients)
    (apart,), _ = mean_intervals(by_patient, cases(48))
    assert together.high - together.low > 1.8 * (apart.high - apart.low)
    # Six equal cases of each patient are worth one.
    (single,), _ = mean_intervals(by_patient[::6], cases(8))
    assert together.low == pytest.approx(single.low)
    assert interval_method(patients).unit == "patient"
    assert interval_method(patients).num_units == 8
    assert interval_method(cases(48)).unit == "case"


def test_the_order_of_the_cases_does_not_matter():
    values, names = RNG.random((15, 2)), cases(15)
    order = RNG.permutation(15)
    expected, overall = mean_intervals(values, names)
    found, found_overall = mean_intervals(values[order], [names[index] for index in order])
    for one, other in zip([*expected, overall], [*found, found_overall], strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-12)


def test_unknown_values_take_no_part_and_too_few_values_give_no_interval():
    values = RNG.random((12, 3))
    values[4:, 1] = np.nan
    values[1:, 2] = np.nan
    (whole, some, one), overall = mean_intervals(values, cases(12))
    assert whole.low < values[:, 0].mean() < whole.high
    assert some.low < values[:4, 1].mean() < some.high
    assert np.isnan([one.low, one.high]).all()
    assert not np.isnan(overall.low)
    columns, overall = mean_intervals(np.full((3, 2), np.nan), cases(3))
    assert all(np.isnan(each.low) for each in [*columns, overall])
    columns, overall = mean_intervals(np.zeros((0, 2)), [])
    assert all(np.isnan(each.low) for each in [*columns, overall])


def test_the_mean_over_classes_weighs_a_rare_class_like_a_frequent_one():
    values = np.stack([np.full(10, 0.9), np.full(10, np.nan)], axis=1)
    values[:8, 1] = 0.1
    _, overall = mean_intervals(values, cases(10))
    assert (overall.low, overall.high) == pytest.approx((0.5, 0.5))


def test_equal_values_have_an_interval_of_no_width():
    (interval,), _ = mean_intervals(np.full((5, 1), 0.25), cases(5))
    assert interval == Interval(low=0.25, high=0.25)


def test_many_cases_are_drawn_in_blocks_of_the_same_stream(monkeypatch):
    values = RNG.random((30, 1))
    at_once, _ = mean_intervals(values, cases(30))
    monkeypatch.setattr("pipeline.evaluation.bootstrap.MOST_COUNTS", 700)
    assert mean_intervals(values, cases(30))[0] == at_once
