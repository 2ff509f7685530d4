"""How classes lie to each other: mirroring along an axis on which they keep an order would hide what tells them apart.

The front of a hippocampus is in front of its back in every patient, and a left kidney is left of a right one. A lesion
lies anywhere in its organ, and keeps no order with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import Record

# Of fewer cases, some pair among many classes has an order by chance.
FEWEST_CASES = 10
# The rest is for positions between, wrong labels and a situs inversus.
KEPT_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class ClassOrder(Record):
    """The two classes whose order along an axis is kept by the largest share of the cases that hold both.

    Attributes:
        axis: 0, 1, 2: to the right, the front and the top of the patient.
        lower, upper: Names; the centre of `upper` lies further along the axis.
        share: Of the cases that hold both classes, those in which it does.
        num_cases: Cases that hold both.
    """

    axis: int
    lower: str
    upper: str
    share: float
    num_cases: int

    @property
    def is_kept(self) -> bool:
        """Whether it holds so often that the side tells the classes apart."""
        return self.share >= KEPT_SHARE


def class_centers(label: NDArray[Any], foreground: NDArray[np.bool_], values: Sequence[int]) -> NDArray[np.float64]:
    """The centre of each class.

    Args:
        label: (I, J, K) of any integer type.
        foreground: (I, J, K), where a class is that may be asked for.
        values: In the label, by class.

    Returns:
        (classes, 3) voxel indices; NaN for a class that is not in there.
    """
    where = np.nonzero(foreground)
    known, index = np.unique(np.asarray(values, np.int64), return_index=True)
    found = label[where].astype(np.int64)
    position = np.minimum(np.searchsorted(known, found), known.size - 1)
    declared = known[position] == found
    classes = index[position[declared]]
    counts = np.bincount(classes, minlength=len(values))
    sums = [np.bincount(classes, axis[declared], minlength=len(values)) for axis in where]
    with np.errstate(invalid="ignore"):
        return np.stack(sums, axis=1) / counts[:, None]


def class_orders(centers: Sequence[NDArray[np.float64]], names: Sequence[str]) -> tuple[ClassOrder, ...]:
    """The order along each axis that is kept best.

    Args:
        centers: Of each case, (classes, 3), NaN for classes that it lacks.
        names: By class.

    Returns:
        At most one of each axis; none where no two classes are in ten cases together.
    """
    numbers, above = _count_pairs(np.stack(centers))
    seen = numbers >= FEWEST_CASES
    if not seen.any():
        return ()
    found = []
    for axis in range(3):
        shares = np.where(seen, above[axis] / np.maximum(numbers, 1), -1.0)
        # The best share; of these the one that most cases speak for.
        best = np.lexsort((-numbers.ravel(), -shares.ravel()))[0]
        lower, upper = divmod(int(best), len(names))
        found.append(
            ClassOrder(
                axis=axis,
                lower=names[lower],
                upper=names[upper],
                share=float(shares[lower, upper]),
                num_cases=int(numbers[lower, upper]),
            )
        )
    return tuple(found)


def _count_pairs(centers: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cases with both classes, (classes, classes), and those with the second one's centre further along each axis."""
    num_classes = centers.shape[1]
    numbers = np.zeros((num_classes, num_classes), np.int64)
    above = np.zeros((3, num_classes, num_classes), np.int64)
    for case in centers:
        present = ~np.isnan(case[:, 0])
        numbers += present[:, None] & present[None, :]
        for axis in range(3):
            # NaN is above nothing.
            above[axis] += case[None, :, axis] > case[:, None, axis]
    np.fill_diagonal(numbers, 0)
    return numbers, above


def mirror_axes(orders: Sequence[ClassOrder]) -> tuple[int, ...]:
    """Axes along which no two classes keep an order."""
    kept = {order.axis for order in orders if order.is_kept}
    return tuple(axis for axis in range(3) if axis not in kept)
