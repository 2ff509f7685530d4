"""The estimators of signal and noise against problems whose answer is known in closed form."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training.noise_scale import (
    HORIZON,
    MAX_GROWTH,
    MIN_STEPS,
    NoiseReading,
    NoiseSums,
    recommended_batch,
    signal_and_noise,
)

# Gradients of a patch are MEAN + FACTOR @ standard normal, with a covariance far from a multiple of the identity.
MEAN = np.array([0.7, -0.2, 0.4, 0.0, 0.1])
FACTOR = np.random.default_rng(1).normal(size=(5, 5)) * np.array([0.8, 0.4, 0.2, 0.04, 0.6])
SIGNAL, NOISE = float(MEAN @ MEAN), float(np.trace(FACTOR @ FACTOR.T))


def draw_steps(batches: tuple[int, ...], num: int, seed: int, mean: np.ndarray = MEAN) -> np.ndarray:
    """Estimates (num, 2) of |G|^2 and tr(Sigma) from steps over micro-batches of these numbers of patches."""
    rng = np.random.default_rng(seed)
    gradients = np.stack([(mean + rng.normal(size=(num, size, 5)) @ FACTOR.T).mean(axis=1) for size in batches], axis=1)
    mean_small = (gradients**2).sum(axis=2).mean(axis=1)
    big = (gradients.mean(axis=1) ** 2).sum(axis=1)
    inverse = float(np.mean([1 / size for size in batches]))
    return np.stack(signal_and_noise(mean_small, big, num_batches=len(batches), mean_inverse_batch=inverse), axis=1)


def sums_of(steps: np.ndarray) -> NoiseSums:
    sums = NoiseSums()
    for signal, noise in steps.tolist():
        sums.add(signal, noise)
    return sums


@pytest.mark.parametrize("batches", [(1, 1), (1, 1, 1, 1), (2, 2), (2, 2, 2, 2), (1, 3, 2)], ids=str)
def test_both_estimates_are_unbiased_whatever_the_accumulation_and_the_batch(batches):
    num = 200_000
    steps = draw_steps(batches, num, seed=len(batches))
    errors = steps.std(axis=0) / math.sqrt(num)
    assert (errors < 0.02 * np.array([SIGNAL, NOISE])).all()  # a check that can fail
    assert (np.abs(steps.mean(axis=0) - [SIGNAL, NOISE]) < 4 * errors).all()


def test_all_micro_batches_tell_more_than_the_first_one_alone():
    """Patches differ in the size of their gradients; products of two different ones are rid of that."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(20_000, 2, 50)) * rng.lognormal(sigma=0.7, size=(20_000, 2, 1)) + 0.2
    norms, big = (gradients**2).sum(axis=2), (gradients.mean(axis=1) ** 2).sum(axis=1)
    options = {"num_batches": 2, "mean_inverse_batch": 1.0}
    of_all, _ = signal_and_noise(norms.mean(axis=1), big, **options)
    of_first, _ = signal_and_noise(norms[:, 0], big, **options)
    assert of_all.mean() == pytest.approx(50 * 0.04, rel=0.1)
    assert of_all.std() < of_first.std() / 3


def test_kinds_of_patches_that_are_spread_evenly_lower_the_signal_by_their_variance():
    """Every step holds as many patches of one kind as of the other, and kinds are all that patches differ in."""
    one, other = np.array([1.0, 0.5]), np.array([0.2, -0.3])
    mean, between = (one + other) / 2, float(((one - other) ** 2).sum()) / 4
    for num in (2, 4, 8):
        norms = (one @ one + other @ other) / 2
        signal, _ = signal_and_noise(norms, mean @ mean, num_batches=num, mean_inverse_batch=1.0)
        assert signal == pytest.approx(mean @ mean - between / (num - 1))


def test_the_noise_scale_lies_within_its_standard_error_as_often_as_it_should():
    deviations = []
    for seed in range(300):
        reading = sums_of(draw_steps((1, 1, 1, 1), 600, seed)).read()
        deviations.append((reading.noise_scale - NOISE / SIGNAL) / reading.standard_error)
    assert 0.8 < np.std(deviations) < 1.25
    assert abs(np.mean(deviations)) < 0.4


def test_a_noise_scale_is_not_told_before_enough_steps():
    steps = draw_steps((4,) * 8, MIN_STEPS, seed=0)
    early, known = sums_of(steps[:-1]).read(), sums_of(steps).read()
    assert early == NoiseReading(MIN_STEPS - 1)
    assert "not yet known (49 of 50 steps)" in early.describe(batch_size=4, effective_batch=32)
    assert known.noise_scale is not None


def test_a_mean_gradient_that_cannot_be_told_from_zero_gives_a_bound_and_no_number():
    for seed in range(20):
        reading = sums_of(draw_steps((1, 1), 200, seed, mean=np.zeros(5))).read()
        assert reading.noise_scale is None
        assert reading.standard_error is None
        text = reading.describe(batch_size=1, effective_batch=2)
        assert "lost in the noise" in text
        assert "effective_batch" not in text
    weak = [sums_of(draw_steps((1, 1), 60, seed, mean=MEAN / 4)).read() for seed in range(50)]
    bounds = [reading.at_least for reading in weak if reading.noise_scale is None]
    assert len(bounds) > 25
    assert np.mean([bound < 16 * NOISE / SIGNAL for bound in bounds]) > 0.95


def test_an_estimate_far_below_zero_gives_neither_number_nor_bound():
    reading = sums_of(np.tile([[-1.0, 3.0]], (60, 1)) + 0.01 * np.random.default_rng(0).normal(size=(60, 2))).read()
    assert reading == NoiseReading(60)
    assert "lost in the noise" in reading.describe(batch_size=1, effective_batch=2)


def test_gradients_without_noise_have_a_noise_scale_of_zero():
    reading = sums_of(np.tile([[2.0, 0.0]], (60, 1))).read()
    assert (reading.noise_scale, reading.standard_error) == (0.0, 0.0)


def test_means_are_plain_at_first_and_follow_a_change_in_the_long_run():
    few = sums_of(np.array([[1.0, 2.0], [3.0, 5.0]]))
    assert few.signal / few.weights == pytest.approx(2, rel=1e-3)
    assert few.noise / few.weights == pytest.approx(3.5, rel=1e-3)
    changed = sums_of(np.concatenate([np.tile([[1.0, 2.0]], (3 * HORIZON, 1)), np.tile([[1.0, 8.0]], (HORIZON, 1))]))
    assert changed.noise / changed.weights == pytest.approx(8 - 6 * math.exp(-1), rel=0.05)


def test_sums_are_plain_numbers_that_go_on_exactly_where_they_were():
    steps = draw_steps((1, 1), 120, seed=3)
    resumed = NoiseSums(**asdict(sums_of(steps[:70])))
    for signal, noise in steps[70:].tolist():
        resumed.add(signal, noise)
    assert resumed == sums_of(steps)
    assert all(type(value) in (int, float) for value in asdict(resumed).values())


@pytest.mark.parametrize(
    ("noise_scale", "batch_size", "effective_batch", "expected"),
    [(37, 1, 8, 32), (50, 1, 8, 64), (50, 3, 12, 48), (0.1, 2, 4, 2), (1e6, 1, 2, 16), (5, 1, 64, 4), (0, 1, 2, 1)],
)
def test_the_recommendation_follows_its_rule(noise_scale, batch_size, effective_batch, expected):
    assert recommended_batch(noise_scale, batch_size=batch_size, effective_batch=effective_batch) == expected


@given(st.floats(0, 1e9), st.integers(1, 9), st.integers(2, 40))
def test_a_recommendation_is_a_multiple_of_the_batch_within_its_bounds(noise_scale, batch_size, accumulate):
    effective_batch = batch_size * accumulate
    found = recommended_batch(noise_scale, batch_size=batch_size, effective_batch=effective_batch)
    assert found % batch_size == 0
    assert batch_size <= found <= MAX_GROWTH * effective_batch
    if batch_size <= noise_scale <= MAX_GROWTH * effective_batch / 2:
        assert 1 / 1.42 < found / noise_scale < 1.42


def test_the_reading_in_words_names_error_and_recommendation():
    text = NoiseReading(80, 36.6, 4.2).describe(batch_size=1, effective_batch=8)
    assert text == "noise scale 36.6 +- 4.2 patches, recommended effective_batch 32 (now 8)"


def test_the_standard_error_knows_what_signal_and_noise_have_in_common():
    signal = np.random.default_rng(0).uniform(1, 3, size=100)
    reading = sums_of(np.stack([signal, 3 * signal], axis=1)).read()
    assert reading.noise_scale == pytest.approx(3)
    assert reading.standard_error == pytest.approx(0, abs=1e-6)


def test_in_the_long_run_the_standard_error_is_that_of_the_steps_that_still_weigh():
    """Weights that fall by 1 / HORIZON a step are worth (sum of weights)^2 / (sum of their squares) equal ones."""
    noise = np.random.default_rng(0).normal(5, 1, size=8 * HORIZON)
    reading = sums_of(np.stack([np.ones_like(noise), noise], axis=1)).read()
    assert reading.standard_error == pytest.approx(1 / np.sqrt(2 * HORIZON), rel=0.06)
    assert abs(reading.noise_scale - 5) < 3 * reading.standard_error
