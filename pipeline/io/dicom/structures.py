"""One structure of a series: a name, a number and the voxels that belong to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Structure:
    """A structure on the grid of an image.

    Attributes:
        name: As the file calls it.
        number: As the file counts.
        mask: (i, j, k) = (columns, rows, slices) of the image's file order.
    """

    name: str
    number: int
    mask: NDArray[np.bool_]
