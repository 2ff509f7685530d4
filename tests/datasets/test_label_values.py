from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.datasets.label_values import count_values

LABELS = st.sampled_from([np.uint8, np.int16, np.uint32, np.int64]).flatmap(
    lambda kind: arrays(kind, (1, 4, 3, 2), elements={"max_value": 2**40} if kind is np.int64 else None)
)


@given(LABELS)
def test_counts_are_those_of_numpys_unique_for_every_integer_type(label: NDArray[np.integer]) -> None:
    values, counts = np.unique(label, return_counts=True)
    assert count_values(label) == dict(zip(values.tolist(), counts.tolist(), strict=True))


@given(arrays(np.int8, (1, 5, 2, 3)))
def test_reversed_and_transposed_views_count_the_same(label: NDArray[np.int8]) -> None:
    assert count_values(label[:, ::-1].transpose(0, 3, 1, 2)) == count_values(label)
