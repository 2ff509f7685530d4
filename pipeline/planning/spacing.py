"""Target spacing, anisotropic axis and median shape of a dataset.

The rules are those of Isensee et al. 2021 (nnU-Net, Nature Methods 18, 203-211).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.datasets.fingerprint import CaseFingerprint
from pipeline.geometry import Shape3, Spacing, format_spacing

ANISOTROPIC_RATIO = 3.0
FINE_PERCENTILE = 10.0
Axis = Literal[0, 1, 2]
AXES: tuple[Axis, Axis, Axis] = (0, 1, 2)


@dataclass(frozen=True)
class TargetGrid:
    """What all cases are resampled to.

    Attributes:
        spacing: Millimetres along i, j, k.
        anisotropic_axis: The axis whose voxels are more than three times longer than along both others, or None.
        median_shape: Median of the cropped cases' shapes at this spacing.
        reason: Why this spacing, as a sentence.
    """

    spacing: Spacing
    anisotropic_axis: Axis | None
    median_shape: Shape3
    reason: str


def make_target_grid(cases: Sequence[CaseFingerprint], *, spacing: Spacing | None = None) -> TargetGrid:
    """The target grid of the cases; a given `spacing` is taken as it is."""
    if spacing is None:
        spacing, reason = _choose_spacing(cases)
    else:
        reason = f"Target spacing {format_spacing(spacing)} mm was given."
    return TargetGrid(spacing, anisotropic_axis(spacing), median_shape(cases, spacing), reason)


def _choose_spacing(cases: Sequence[CaseFingerprint]) -> tuple[Spacing, str]:
    spacings = np.array([case.spacing for case in cases])
    shapes = np.array([case.cropped_shape for case in cases])
    target, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    axis = int(np.argmax(target))
    others = [other for other in AXES if other != axis]
    coarse = target[axis] > ANISOTROPIC_RATIO * target[others].max()
    few_slices = shape[axis] * ANISOTROPIC_RATIO < shape[others].min()
    if not (coarse and few_slices):
        spacing = _rounded(target)
        return spacing, f"Target spacing {format_spacing(spacing)} mm is the median of {_count(cases)} per axis."
    fine = max(float(np.percentile(spacings[:, axis], FINE_PERCENTILE)), float(target[others].max()))
    reason = (
        f"is the median of {_count(cases)}, but along {'ijk'[axis]}, where slices are few and {target[axis]:.4g} mm "
        f"apart in the median, the 10th percentile, so that cases with thin slices keep their detail."
    )
    target[axis] = fine
    spacing = _rounded(target)
    return spacing, f"Target spacing {format_spacing(spacing)} mm {reason}"


def anisotropic_axis(spacing: Spacing) -> Axis | None:
    """The axis whose spacing is more than three times that of both others, or None."""
    axis = AXES[int(np.argmax(spacing))]
    others = [spacing[other] for other in AXES if other != axis]
    return axis if spacing[axis] > ANISOTROPIC_RATIO * max(others) else None


def median_shape(cases: Sequence[CaseFingerprint], spacing: Spacing) -> Shape3:
    """Median over the cases of the cropped shape, resampled to `spacing`, at least one voxel an axis."""
    extents = np.array([np.multiply(case.cropped_shape, case.spacing) for case in cases])
    shapes = np.round(extents / np.asarray(spacing))
    i, j, k = np.maximum(1, np.round(np.median(shapes, axis=0))).astype(int)
    return int(i), int(j), int(k)


def _count(cases: Sequence[CaseFingerprint]) -> str:
    return f"{len(cases)} case{'s' if len(cases) > 1 else ''}"


def _rounded(values: np.ndarray) -> Spacing:
    i, j, k = (round(float(value), 6) for value in values)
    return i, j, k
