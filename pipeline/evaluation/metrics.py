"""Overlap, surface and volume metrics of one class in one case.

What an empty mask gives (tested; as recommended by Metrics Reloaded, Maier-Hein et al. 2024, no number is invented):

| prediction | reference | Dice, IoU | NSD | HD95, ASSD | volume error | relative volume error |
|------------|-----------|-----------|-----|------------|--------------|-----------------------|
| empty      | empty     | NaN       | NaN | NaN        | 0 ml         | NaN                   |
| empty      | present   | 0         | 0   | NaN        | as it is     | -1                    |
| present    | empty     | 0         | 0   | NaN        | as it is     | NaN                   |

NaN takes no part in means. A distance to nothing has no value, so a missed class shows in Dice, IoU and NSD, and is
counted beside the means (`summary.ClassSummary.num_missed`), which keeps HD95 and ASSD free of made-up penalties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AllowInfNan, BeforeValidator, PlainSerializer

from pipeline.evaluation.surfaces import Surface, directed_distances, find_surface
from pipeline.geometry import Spacing
from pipeline.plan import Record

Mask = NDArray[np.bool_]

MM3_PER_ML = 1000.0
# Voxel sizes come from float32 headers: a distance of one voxel must not miss a tolerance of one voxel by rounding.
TOLERANCE_SLACK_MM = 1e-4
NAN = float("nan")


def _nan_to_null(value: float) -> float | None:
    return None if np.isnan(value) else value


def _null_to_nan(value: float | None) -> float:
    return NAN if value is None else value


Score = Annotated[
    float, AllowInfNan(True), BeforeValidator(_null_to_nan), PlainSerializer(_nan_to_null, return_type=float | None)
]
"""A number that may have no value: NaN in Python, null in JSON."""


@dataclass(frozen=True, kw_only=True)
class ClassScores(Record):
    """Every metric of one class in one case.

    Attributes:
        dice: 2 |P and R| / (|P| + |R|).
        iou: |P and R| / |P or R|.
        nsd: Normalised surface distance (surface Dice, Nikolov et al. 2018): the share of both surfaces, by area, that
            lies within the tolerance of the other one.
        hd95_mm: The larger of the two directed 95th percentiles of surface distance, weighted by area.
        assd_mm: Average symmetric surface distance: over both surfaces together, weighted by area.
        volume_error_ml: |P volume - R volume|.
        relative_volume_error: (P volume - R volume) / R volume; negative where too little was found.
        prediction_ml, reference_ml: Volumes.
    """

    dice: Score
    iou: Score
    nsd: Score
    hd95_mm: Score
    assd_mm: Score
    volume_error_ml: Score
    relative_volume_error: Score
    prediction_ml: float
    reference_ml: float


METRIC_NAMES = tuple(item.name for item in fields(ClassScores))


def score_class(prediction: Mask, reference: Mask, *, spacing: Spacing, tolerance_mm: float = 1.0) -> ClassScores:
    """All metrics of one class in one case.

    Surfaces, areas and percentiles follow DeepMind's `surface-distance` (Nikolov et al. 2018) and equal it to rounding,
    apart from distances that differ from the tolerance by less than 0.0001 mm, which count as within it.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask of the same shape.
        spacing: Voxel size along i, j, k in millimetres.
        tolerance_mm: Distance up to which surfaces count as equal for `nsd`.

    Raises:
        ValueError: The masks differ in shape.
    """
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"masks of different shapes {prediction.shape} and {reference.shape}")
    nsd, hd95, assd = _surface_scores(find_surface(prediction, spacing), find_surface(reference, spacing), tolerance_mm)
    voxel_ml = math.prod(spacing) / MM3_PER_ML
    predicted, true = _count(prediction) * voxel_ml, _count(reference) * voxel_ml
    return ClassScores(
        dice=dice(prediction, reference),
        iou=iou(prediction, reference),
        nsd=nsd,
        hd95_mm=hd95,
        assd_mm=assd,
        volume_error_ml=abs(predicted - true),
        relative_volume_error=(predicted - true) / true if true else NAN,
        prediction_ml=predicted,
        reference_ml=true,
    )


def dice(prediction: Mask, reference: Mask) -> float:
    """Dice coefficient, 2 |P and R| / (|P| + |R|): 1 for equal masks, 0 when only one is empty, NaN when both are.

    Args:
        prediction: (I, J, K) mask; of any dtype, non-zero voxels are meant.
        reference: (I, J, K) mask.
    """
    total = _count(prediction) + _count(reference)
    return 2 * _count(np.logical_and(prediction, reference)) / total if total else NAN


def iou(prediction: Mask, reference: Mask) -> float:
    """Intersection over union (Jaccard index): 0 when only one mask is empty, NaN when both are.

    Args:
        prediction: (I, J, K) mask.
        reference: (I, J, K) mask.
    """
    union = _count(np.logical_or(prediction, reference))
    return _count(np.logical_and(prediction, reference)) / union if union else NAN


def _count(mask: Mask) -> int:
    return int(np.count_nonzero(mask))


def _surface_scores(prediction: Surface, reference: Surface, tolerance_mm: float) -> tuple[float, float, float]:
    """NSD, HD95 and ASSD."""
    if prediction.is_empty or reference.is_empty:
        return (NAN if prediction.is_empty and reference.is_empty else 0.0), NAN, NAN
    to_reference = directed_distances(prediction, reference)
    to_prediction = directed_distances(reference, prediction)
    areas = np.concatenate([prediction.areas, reference.areas])
    distances = np.concatenate([to_reference, to_prediction])
    within = areas[distances <= tolerance_mm + TOLERANCE_SLACK_MM].sum()
    hd95 = max(
        weighted_percentile(to_reference, prediction.areas, 95), weighted_percentile(to_prediction, reference.areas, 95)
    )
    return float(within / areas.sum()), hd95, float(np.average(distances, weights=areas))


def weighted_percentile(values: NDArray[np.float64], weights: NDArray[np.float64], percent: float) -> float:
    """The smallest of `values` that at least `percent` of the total weight does not exceed.

    Args:
        values: (N,), not empty.
        weights: (N,), not negative.
        percent: 0 to 100.
    """
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order])
    # Sums of equal areas must not pass the percentage over by rounding.
    rank = int(np.searchsorted(share, share[-1] * (percent / 100 - 1e-9)))
    return float(values[order][min(rank, len(values) - 1)])
