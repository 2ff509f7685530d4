"""Count the values of a label without a sort or a copy of the whole volume."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_TABLE = 1_000_000


def count_values(label: NDArray[Any]) -> dict[int, int]:
    """Voxels by value, for the values that occur.

    Args:
        label: (1, I, J, K) of any integer type.
    """
    low, high = int(label.min()), int(label.max())
    if high - low >= LARGEST_TABLE:
        values, counts = np.unique(label, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    table = np.zeros(high - low + 1, np.int64)
    # One slab at a time: bincount needs eight bytes a voxel of its own.
    for slab in label[0]:
        table += np.bincount((slab.astype(np.int64) - low).ravel(), minlength=table.size)
    return {low + int(index): int(table[index]) for index in np.flatnonzero(table)}
