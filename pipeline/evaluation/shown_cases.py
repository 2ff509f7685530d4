"""Which cases the report shows, and their volumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.datasets.dataset import Case, read_case_image
from pipeline.errors import VoxfitError
from pipeline.evaluation.slices import ReportCase
from pipeline.evaluation.summary import CaseScores, Metrics
from pipeline.io.image_file import read_label
from pipeline.io.resample import resample_volume
from pipeline.log import get_logger


class ShownCase(NamedTuple):
    """A case that stands for a place in the ranking."""

    rank: str
    case_id: str
    mean_dice: float


def choose_shown_cases(metrics: Metrics) -> tuple[ShownCase, ...]:
    """The best, the median and the worst case by Dice, the mean over classes; fewer when there are fewer cases."""
    means = [(mean_over_classes(case, "dice"), case.case_id) for case in metrics.cases]
    ranked = sorted((-mean, case_id) for mean, case_id in means if not np.isnan(mean))
    last = len(ranked) - 1
    places = {0: "only"} if last == 0 else {0: "best", last: "worst"}
    if last >= 2:
        places[(last + 1) // 2] = "median"
    return tuple(ShownCase(places[place], ranked[place][1], -ranked[place][0]) for place in sorted(places) if ranked)


def mean_over_classes(case: CaseScores, metric: str) -> float:
    """A case's metric averaged over the classes in which it has a value; NaN when there is none."""
    values = [getattr(scores, metric) for scores in case.classes.values()]
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def read_shown_cases(
    metrics: Metrics,
    *,
    images: Mapping[str, Case],
    references: Mapping[str, Path],
    predictions: Mapping[str, Path],
) -> list[ReportCase]:
    """The volumes of the cases that the report shows: their first channel, on the reference's grid.

    A case without an image, or with one that cannot be read, is left out, which the log says: pictures are no reason
    to lose a report.

    Args:
        metrics: Decides on the cases.
        images: Cases with their image files, by case id.
        references: Label files by case id.
        predictions: Predicted files by case id.
    """
    shown = []
    for item in choose_shown_cases(metrics):
        try:
            case = images[item.case_id]
            shown.append(_read(case, references[item.case_id], predictions[item.case_id]))
        except KeyError:
            get_logger("report").info("%s has no image: not shown", item.case_id)
        except VoxfitError as error:
            get_logger("report").warning("%s is not shown: %s", item.case_id, error)
    return shown


def _read(case: Case, reference_path: Path, prediction_path: Path) -> ReportCase:
    reference, prediction = read_label(reference_path), read_label(prediction_path)
    image = read_case_image(case)
    if not image.grid.is_close(reference.grid):
        image = resample_volume(image, reference.grid)
    return ReportCase(
        case_id=case.case_id,
        image=image.array[0],
        reference=reference.array[0],
        prediction=prediction.array[0],
        spacing=reference.spacing,
    )
