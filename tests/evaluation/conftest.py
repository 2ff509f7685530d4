"""Label files on an oblique grid, in chosen axis orders, written with nibabel alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

SHAPE = (15, 11, 9)
SPACING = (0.8, 1.1, 2.5)

WriteLabel = Callable[..., Path]


@pytest.fixture(scope="session")
def oblique() -> NDArray[np.float64]:
    """Unequal spacing and oblique axes, closest to RAS."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [9, -12, 15], degrees=True).as_matrix() * SPACING
    affine[:3, 3] = [-13.0, 21.5, 4.25]
    return affine


@pytest.fixture
def write_label_file(oblique: NDArray[np.float64]) -> WriteLabel:
    """Write (I, J, K) values given in RAS order to a file whose axes run as `axis_codes` say."""

    def write(path: Path, values: NDArray[np.uint8], *, axis_codes: str = "RAS", shift_mm: float = 0.0) -> Path:
        affine = oblique.copy()
        affine[0, 3] += shift_mm
        image = nib.Nifti1Image(values, affine)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axis_codes))), path)
        return path

    return write


@pytest.fixture(scope="session")
def two_boxes() -> NDArray[np.uint8]:
    """(I, J, K) with a box of value 1 and a box of value 5."""
    values = np.zeros(SHAPE, np.uint8)
    values[2:8, 2:7, 2:6] = 1
    values[9:13, 3:9, 3:7] = 5
    return values
