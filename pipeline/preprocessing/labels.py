"""Values in label files to class indices and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.io.nifti import smallest_integer
from pipeline.plan import Plan
from pipeline.store import IGNORE_INDEX

PIECE_VOXELS = 1 << 20


def class_indices(values: NDArray[Any], plan: Plan) -> NDArray[np.int16]:
    """Class indices of label values; the plan's ignore value becomes `IGNORE_INDEX`.

    Args:
        values: Integers of any shape.
        plan: Says which value is which class.

    Raises:
        InputError: A value is neither a class nor the ignore value.
    """
    index_of = {value: index for index, value in enumerate(plan.label_values)}
    if plan.ignore_value is not None:
        index_of[plan.ignore_value] = IGNORE_INDEX
    known = np.array(sorted(index_of), np.int64)
    indices = np.array([index_of[value] for value in known.tolist()], np.int16)
    found = np.empty(values.size, np.int16)
    flat = values.ravel()
    # Piece by piece: the search makes 64-bit copies of what it looks up.
    for start in range(0, values.size, PIECE_VOXELS):
        piece = flat[start : start + PIECE_VOXELS]
        places = np.searchsorted(known, piece.astype(np.int64)).clip(max=len(known) - 1)
        if (known[places] != piece).any():
            raise InputError(
                f"the label holds {sorted(set(np.unique(values).tolist()) - set(index_of))}, "
                f"the plan knows {known.tolist()}",
                fix="Declare these values in the dataset, or correct the label",
            )
        found[start : start + PIECE_VOXELS] = indices[places]
    return found.reshape(values.shape)


def class_values(indices: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Label values of class indices (0 or above), in the smallest integer type that holds them all."""
    dtype = smallest_integer(min(plan.label_values), max(plan.label_values))
    values: NDArray[Any] = np.array(plan.label_values, dtype)[indices]
    return values
