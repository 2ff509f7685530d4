from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.sampling.patch_sampler import PatchChoice, PatchSampler
from tests.sampling.conftest import make_record

SHAPE: Shape3 = (20, 31, 14)
PATCH: Shape3 = (8, 16, 10)


def read_voxels(case_id: str, class_index: int) -> NDArray[np.int32]:
    """Class c sits in the plane i = c of every case."""
    return np.array([[class_index, j, k] for j in range(8) for k in range(5)], np.int32)


def make_sampler(num_cases: int = 7, shape: Shape3 = SHAPE, **options: object) -> PatchSampler:
    given_options = {"patch_size": PATCH, "foreground_fraction": 0.33, "seed": 3, **options}
    return PatchSampler([make_record(f"case{n}", shape) for n in range(num_cases)], **given_options)  # type: ignore[arg-type]


def choose(sampler: PatchSampler, index: int) -> PatchChoice:
    return sampler.choose(index, np.random.default_rng([sampler.seed, index]), read_voxels)


def test_every_pass_holds_every_case_once_in_an_order_of_its_own() -> None:
    sampler = make_sampler()
    passes = [[sampler.record_of(7 * p + n).case_id for n in range(7)] for p in range(20)]
    assert all(sorted(order) == [f"case{n}" for n in range(7)] for order in passes)
    assert len({tuple(order) for order in passes}) > 15


def test_a_choice_does_not_depend_on_what_was_chosen_before() -> None:
    forward = [choose(make_sampler(), index) for index in range(40)]
    sampler = make_sampler()
    backward = [choose(sampler, index) for index in reversed(range(40))]
    assert forward == backward[::-1]


def test_the_order_of_the_given_cases_does_not_matter_but_the_seed_does() -> None:
    records = [make_record(f"case{n}", SHAPE) for n in range(7)]
    options = {"patch_size": PATCH, "foreground_fraction": 0.33}
    one = PatchSampler(records, seed=3, **options)  # type: ignore[arg-type]
    other = PatchSampler(records[::-1], seed=3, **options)  # type: ignore[arg-type]
    third = PatchSampler(records, seed=4, **options)  # type: ignore[arg-type]
    assert [choose(one, n) for n in range(20)] == [choose(other, n) for n in range(20)]
    assert [choose(one, n) for n in range(20)] != [choose(third, n) for n in range(20)]


@given(fraction=st.floats(0, 1), first=st.integers(0, 10**6), num=st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_any_run_of_samples_holds_the_share_of_foreground_rounded_up_or_down(
    fraction: float, first: int, num: int
) -> None:
    sampler = make_sampler(foreground_fraction=fraction)
    aimed = sum(sampler.is_foreground(index) for index in range(first, first + num))
    assert abs(aimed - fraction * num) < 1 + 1e-9


def test_the_first_sample_of_a_run_aims_at_foreground() -> None:
    assert make_sampler(foreground_fraction=0.01).is_foreground(0)
    assert not any(make_sampler(foreground_fraction=0.0).is_foreground(index) for index in range(50))
    assert all(make_sampler(foreground_fraction=1.0).is_foreground(index) for index in range(50))


def test_foreground_patches_are_centred_on_voxels_of_present_classes_drawn_uniformly() -> None:
    sampler = make_sampler(foreground_fraction=1.0, shape=(60, 60, 60), patch_size=(3, 3, 3))
    choices = [choose(sampler, index) for index in range(600)]
    counts = Counter(choice.centre_class for choice in choices)
    assert set(counts) == {1, 3}
    assert abs(counts[1] - 300) < 60
    for choice in choices:
        centre = [start + 1 for start in choice.location.start]
        assert centre[0] == choice.centre_class or choice.location.start[0] == 0
        assert centre[1] <= 8
        assert centre[2] <= 5


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), patch=st.tuples(*[st.integers(1, 24)] * 3), index=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_patches_overlap_their_volume_as_far_as_possible(shape: Shape3, patch: Shape3, index: int) -> None:
    sampler = make_sampler(shape=shape, patch_size=patch, foreground_fraction=0.5)
    voxels = np.array([[n - 1 for n in shape], [0, 0, 0]], np.int32)
    choice = sampler.choose(index, np.random.default_rng(index), lambda *_: voxels)
    for start, n, p in zip(choice.location.start, shape, patch, strict=True):
        overlap = min(start + p, n) - max(start, 0)
        assert overlap == min(n, p)
        before, after = -start, start + p - n
        assert n >= p or abs(before - after) <= 1


def test_uniform_patches_reach_both_ends_and_are_spread_evenly() -> None:
    sampler = make_sampler(foreground_fraction=0.0)
    starts = np.array([choose(sampler, index).location.start for index in range(2000)])
    span = np.array(SHAPE) - PATCH
    assert (starts.min(axis=0) == 0).all()
    assert (starts.max(axis=0) == span).all()
    assert np.allclose(starts.mean(axis=0), span / 2, atol=0.06 * span + 0.1)


def test_a_case_without_foreground_gets_a_uniform_position() -> None:
    sampler = PatchSampler([make_record("case", SHAPE, (100, 0, 0))], patch_size=PATCH, foreground_fraction=1.0, seed=0)
    choices = [choose(sampler, index) for index in range(50)]
    assert {choice.centre_class for choice in choices} == {None}
    assert len({choice.location.start for choice in choices}) > 20


@pytest.mark.parametrize(
    ("options", "named"),
    [({"seed": -1}, "seed"), ({"foreground_fraction": 1.5}, "foreground_fraction"), ({"num_cases": 0}, "no cases")],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make_sampler(**options)  # type: ignore[arg-type]
