from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.datasets.class_order import FEWEST_CASES, class_centers, class_orders, mirror_axes
from pipeline.datasets.dataset import read_dataset
from pipeline.datasets.fingerprint import make_fingerprint

Centers = NDArray[np.float64]
NAMES = ("background", "front", "back", "lesion")
SHAPE = (7, 9, 5)


def _random_centers(seed: int, num_cases: int = 40) -> Centers:
    """(cases, classes, 3): the front lies in front of the back, everything else anywhere."""
    centers = np.random.default_rng(seed).uniform(0, 50, (num_cases, len(NAMES), 3))
    centers[:, 0] = np.nan
    centers[:, 1, 1] = centers[:, 2, 1] + np.abs(centers[:, 1, 1]) + 1
    return centers


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.int16, np.uint32]))
def test_centers_are_those_of_scipy(seed: int, dtype: type) -> None:
    values = (0, 7, 2, 40)
    label = np.random.default_rng(seed).choice(np.array([0, 2, 3, 7], dtype), SHAPE)
    found = class_centers(label, label > 0, values)
    expected = [ndimage.center_of_mass(np.ones(SHAPE), label, value) for value in (7, 2)]
    np.testing.assert_allclose(found[[1, 2]], expected)
    # Neither the background nor a class that is not there, and no value that is not declared.
    assert np.isnan(found[[0, 3]]).all()


def test_a_label_without_foreground_has_no_centers() -> None:
    label = np.zeros(SHAPE, np.uint8)
    assert np.isnan(class_centers(label, label > 0, (0, 1))).all()


@given(st.integers(0, 2**32 - 1))
def test_an_order_that_all_cases_keep_is_found_with_its_axis(seed: int) -> None:
    order = class_orders(list(_random_centers(seed)), NAMES)[1]
    assert (order.axis, order.lower, order.upper, order.share) == (1, "back", "front", 1.0)
    assert order.num_cases == 40


@given(st.integers(0, 2**32 - 1), st.sampled_from(range(3)))
def test_mirrored_cases_keep_the_same_orders_the_other_way_round(seed: int, axis: int) -> None:
    centers = _random_centers(seed, num_cases=15)
    mirrored = centers.copy()
    mirrored[..., axis] *= -1
    before, after = (class_orders(list(cases), NAMES) for cases in (centers, mirrored))
    assert [order.share for order in before] == [order.share for order in after]
    assert mirror_axes(before) == mirror_axes(after)


def test_an_axis_without_order_is_mirrored() -> None:
    assert mirror_axes(class_orders(list(_random_centers(seed=3)), NAMES)) == (0, 2)


@pytest.mark.parametrize(("num_broken", "axes"), [(0, (0, 2)), (4, (0, 2)), (5, (0, 1, 2))])
def test_an_order_may_be_broken_by_one_case_in_ten(num_broken: int, axes: tuple[int, ...]) -> None:
    centers = _random_centers(seed=3)
    centers[:num_broken, [1, 2]] = centers[:num_broken, [2, 1]]
    assert mirror_axes(class_orders(list(centers), NAMES)) == axes


def test_few_cases_say_nothing() -> None:
    centers = list(_random_centers(seed=1))
    assert class_orders(centers[: FEWEST_CASES - 1], NAMES) == ()
    # Nor do many of which few hold both classes.
    for center in centers[FEWEST_CASES - 1 :]:
        center[2:] = np.nan
    assert class_orders(centers, NAMES) == ()


def test_a_single_class_is_mirrored_along_all_axes() -> None:
    centers = [center[:2] for center in _random_centers(seed=2)]
    assert mirror_axes(class_orders(centers, NAMES[:2])) == (0, 1, 2)


def test_axes_are_those_of_the_patient_however_files_are_turned(msd: Path, save: Callable[..., Path]) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 1:3, 1:3], label[2:5, 6:8, 1:3] = 1, 2
    save(msd / "imagesTr/a.nii.gz", np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    path = save(msd / "labelsTr/a.nii.gz", label)
    turn = [[1, -1], [2, 1], [0, -1]]
    for part in ("imagesTr", "labelsTr"):
        nib.save(nib.load(msd / part / "a.nii.gz").as_reoriented(turn), msd / part / "a.nii.gz")
    assert nib.load(path).shape != SHAPE
    dataset = read_dataset(msd)
    copies = tuple(replace(dataset.cases[0], case_id=f"copy_{index}") for index in range(FEWEST_CASES))
    orders = make_fingerprint(replace(dataset, cases=copies), num_workers=1).class_orders
    names = list(dataset.labels)
    assert (orders[1].lower, orders[1].upper, orders[1].share) == (names[1], names[2], 1.0)
    assert mirror_axes(orders) == (0, 2)
