"""Label values to class indices and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.plan import Plan
from pipeline.preprocessing.labels import class_indices, class_values
from pipeline.store import IGNORE_INDEX


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_values_become_indices_and_come_back(plan: Plan, dtype: type) -> None:
    values = np.random.default_rng(0).choice([0, 3, 7, 9], (7, 8, 6)).astype(dtype)
    indices = class_indices(values, plan)
    assert indices.dtype == np.int16
    for value, index in ((0, 0), (3, 1), (7, 2), (9, IGNORE_INDEX)):
        np.testing.assert_array_equal(indices == index, values == value)
    back = class_values(np.maximum(indices, 0), plan)
    np.testing.assert_array_equal(back, np.where(values == 9, 0, values))


def test_values_need_not_be_sorted_small_or_positive(plan: Plan) -> None:
    wide = replace(plan, labels={"background": 0, "a": 70_000, "b": -5}, ignore_value=None)
    values = np.array([[[0, 70_000, -5]]])
    np.testing.assert_array_equal(class_indices(values, wide), [[[0, 1, 2]]])
    back = class_values(np.array([[[2, 0, 1]]]), wide)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, [[[-5, 0, 70_000]]])


def test_the_result_type_is_the_smallest_that_holds_every_class(plan: Plan) -> None:
    assert class_values(np.zeros((1, 1, 1), int), plan).dtype == np.uint8
    assert class_values(np.zeros((1, 1, 1), int), replace(plan, labels={"b": 0, "x": 300})).dtype == np.int16


@pytest.mark.parametrize("unknown", [1, 8, 200])
def test_values_that_the_plan_does_not_know_are_named(plan: Plan, unknown: int) -> None:
    values = np.zeros((5, 6, 7), np.uint8)
    values[1, 2, 3] = unknown
    with pytest.raises(InputError, match=rf"holds \[{unknown}\], the plan knows \[0, 3, 7, 9\]"):
        class_indices(values, plan)
