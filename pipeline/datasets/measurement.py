"""The figures of one case that a plan is made from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.case import Case
from pipeline.datasets.class_order import class_centers
from pipeline.geometry import Shape3, Spacing
from pipeline.io.volume import Volume, foreground_box
from pipeline.plan import Record

# nnU-Net samples as many (Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).
MOST_FOREGROUND_VOXELS = 10_000


@dataclass(frozen=True, kw_only=True)
class CaseFingerprint(Record):
    """The size of one case and its classes.

    Attributes:
        case_id, patient: As in the dataset.
        shape: Voxels along i, j, k in RAS order.
        spacing: Millimetres along i, j, k.
        cropped_shape: Shape of the box of non-zero voxels.
        voxels_by_class: Voxels of each class, in the order of the dataset's labels; ignored voxels are not counted.
    """

    case_id: str
    patient: str
    shape: Shape3
    spacing: Spacing
    cropped_shape: Shape3
    voxels_by_class: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The figures of a case whose image and label can be used.

    Attributes:
        fingerprint: Sizes.
        foreground: (C, N) float32, a seeded sample of at most 10,000 voxels with a label above 0.
        foreground_range: (C, 2) float32, least and greatest of all such voxels; (C, 0) when there are none.
        class_centers: (classes, 3) float64 voxel indices, see `class_order.class_centers`; the background has none.
    """

    fingerprint: CaseFingerprint
    foreground: NDArray[np.float32]
    foreground_range: NDArray[np.float32]
    class_centers: NDArray[np.float64]


def measure_case(
    case: Case, image: Volume, label: Volume, values: Sequence[int], ignore_value: int | None, counts: Mapping[int, int]
) -> Measured:
    """Measure a case whose image and label have been checked.

    Args:
        case: Whose id also seeds the sample.
        image: (C, I, J, K).
        label: (1, I, J, K) on the same grid.
        values: In the label, by class of the dataset.
        ignore_value: Value of ignored voxels.
        counts: Voxels of the label by value.
    """
    # Where the label is above 0 and not ignored.
    foreground = (label.array[0] > 0) & (label.array[0] != (0 if ignore_value is None else ignore_value))
    i, j, k = (int(part.stop - part.start) for part in foreground_box(image.array))
    voxels = image.array[:, foreground]
    sample = voxels
    if voxels.shape[1] > MOST_FOREGROUND_VOXELS:
        # Seeded by the case alone, so that neither other cases nor the order of workers change it.
        rng = np.random.default_rng(zlib.crc32(case.case_id.encode()))
        sample = voxels[:, rng.choice(voxels.shape[1], MOST_FOREGROUND_VOXELS, replace=False, shuffle=False)]
    extremes = [voxels.min(axis=1), voxels.max(axis=1)] if voxels.shape[1] else []
    return Measured(
        fingerprint=CaseFingerprint(
            case_id=case.case_id,
            patient=case.patient,
            shape=image.grid.shape,
            spacing=image.spacing,
            cropped_shape=(i, j, k),
            voxels_by_class=tuple(counts.get(value, 0) for value in values),
        ),
        foreground=sample,
        foreground_range=np.stack(extremes, axis=1) if extremes else np.empty((image.num_channels, 0), np.float32),
        class_centers=class_centers(label.array[0], foreground, values),
    )
