"""Score a folder of predictions against reference labels, case by case in parallel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.errors import InputError, in_words
from pipeline.evaluation.metrics import ClassScores, score_class
from pipeline.evaluation.pairs import Pair, find_references, list_volumes, pair_cases
from pipeline.evaluation.summary import CaseScores, Metrics, make_metrics
from pipeline.geometry import format_shape
from pipeline.io.image_file import read_label
from pipeline.io.volume import Volume
from pipeline.log import track
from pipeline.parallel import Outcome, map_unordered

Labels = NDArray[np.integer[Any]]
Box = tuple[slice, slice, slice]

LISTED_VALUES = 5
# Starting worker processes takes seconds; what is done sooner in this one is done in this one.
SERIAL_SECONDS = 5.0


def evaluate_folder(
    predictions: Path,
    labels: Path,
    *,
    case_ids: Collection[str] | None = None,
    tolerance_mm: float = 1.0,
    num_workers: int = 1,
    patient_pattern: str = "",
    seed: int = 0,
) -> Metrics:
    """Score the predictions in a folder; cases that cannot be scored are in the result's `failures`.

    Args:
        predictions: Folder with a file `<case_id>.nii.gz` per case.
        labels: Folder of labels with the same names, or a dataset.
        case_ids: Cases that must be there. By default all of a label folder, and of a dataset those with a prediction.
        tolerance_mm: Of the normalised surface distance.
        num_workers: Processes.
        patient_pattern: Tells the patient by the case id, as in training; "" leaves it to the dataset.
        seed: Of the intervals of the means.

    Raises:
        InputError: There is no prediction, no label, or none that belong together.
    """
    references = find_references(labels)
    found = list_volumes(predictions)
    if case_ids is None:
        case_ids = references.paths if references.labels is None else set(references.paths) & set(found)
    pairs, missing = pair_cases(found, references.paths, case_ids)
    if not pairs:
        raise InputError(f"no prediction belongs to a label of {labels}", where=predictions, fix="Compare file names")
    patients = references.patients_of([pair.case_id for pair in pairs], patient_pattern)
    return evaluate_pairs(
        pairs,
        labels=references.labels,
        ignore_value=references.ignore_value,
        tolerance_mm=tolerance_mm,
        num_workers=num_workers,
        failures=missing,
        patients=patients,
        seed=seed,
    )


def evaluate_pairs(
    pairs: Sequence[Pair],
    *,
    labels: Mapping[str, int] | None = None,
    ignore_value: int | None = None,
    tolerance_mm: float = 1.0,
    num_workers: int = 1,
    failures: Mapping[str, str] | None = None,
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Metrics:
    """Score pairs of files; a pair that cannot be scored is named in the result's `failures`.

    Args:
        pairs: The cases.
        labels: Value by class name (the background, 0, is never scored). None scores every value that is found.
        ignore_value: Reference voxels of this value are taken out of both masks.
        tolerance_mm: Of the normalised surface distance.
        num_workers: Processes, at most; few small cases are scored in this one.
        failures: Reasons by case id that are known already.
        patients: Patient by case id, where known.
        seed: Of the intervals of the means.
    """
    classes = None if labels is None else {name: value for name, value in labels.items() if value != 0}
    score = partial(_score_pair, classes=classes, ignore_value=ignore_value, tolerance_mm=tolerance_mm)
    failed = dict(failures or {})
    scores: dict[str, dict[int, ClassScores]] = {}
    for outcome in track(_score_all(score, pairs, num_workers), description="evaluate", total=len(pairs)):
        if outcome.error is not None:
            failed[outcome.item.case_id] = in_words(outcome.error)
        elif outcome.result is not None:
            scores[outcome.item.case_id] = outcome.result
    names = classes if classes is not None else _names_of_values(scores.values())
    cases = [_named(case_id, by_value, names) for case_id, by_value in scores.items()]
    return make_metrics(cases, labels=names, tolerance_mm=tolerance_mm, failures=failed, patients=patients, seed=seed)


def _score_all(
    score: Callable[[Pair], dict[int, ClassScores]], pairs: Sequence[Pair], num_workers: int
) -> Iterator[Outcome[Pair, dict[int, ClassScores]]]:
    """Outcomes of all pairs; the first one's time tells whether the others are worth several processes."""
    started = monotonic()
    yield from map_unordered(score, pairs[:1], num_workers=1)
    is_short = (monotonic() - started) * len(pairs) < SERIAL_SECONDS
    yield from map_unordered(score, pairs[1:], num_workers=1 if is_short else num_workers)


def _names_of_values(cases: Collection[Mapping[int, ClassScores]]) -> dict[str, int]:
    return {f"class {value}": value for value in sorted(set().union(*cases))}


def _named(case_id: str, by_value: Mapping[int, ClassScores], names: Mapping[str, int]) -> CaseScores:
    nothing = np.zeros((1, 1, 1), bool)
    absent = score_class(nothing, nothing, spacing=(1.0, 1.0, 1.0))
    return CaseScores(case_id=case_id, classes={name: by_value.get(value, absent) for name, value in names.items()})


def _score_pair(
    pair: Pair, *, classes: Mapping[str, int] | None, ignore_value: int | None, tolerance_mm: float
) -> dict[int, ClassScores]:
    """Scores by class value."""
    prediction, reference = read_label(pair.prediction), read_label(pair.reference)
    _check_grids(prediction, reference)
    predicted, true = prediction.array[0], reference.array[0]
    found = set(np.unique(predicted).tolist()) | set(np.unique(true).tolist()) - {ignore_value}
    values = sorted(found - {0}) if classes is None else sorted(classes.values())
    if classes is not None:
        _check_values(found - {0, *values})
    if ignore_value is not None:
        predicted = np.where(true == ignore_value, 0, predicted)
    scores = {}
    for value, box in _class_boxes(predicted, true, values).items():
        masks = [array[box] == value for array in (predicted, true)]
        scores[value] = score_class(masks[0], masks[1], spacing=reference.spacing, tolerance_mm=tolerance_mm)
    return scores


def _class_boxes(predicted: Labels, true: Labels, values: Sequence[int]) -> dict[int, Box]:
    """For each class value the smallest box that holds both masks: with many classes, most of a volume is none of it.

    Scores do not change by it, because beyond an array there is nothing.
    """
    if min(predicted.min(), true.min()) < 0:
        return dict.fromkeys(values, (slice(None), slice(None), slice(None)))
    found = [ndimage.find_objects(array) for array in (predicted, true)]
    boxes = {}
    for value in values:
        own = [boxes_of[value - 1] for boxes_of in found if value <= len(boxes_of)]
        boxes[value] = _joined([box for box in own if box is not None])
    return boxes


def _joined(boxes: Sequence[Box]) -> Box:
    """The smallest box around all, or a single voxel where there is none."""
    i, j, k = (
        slice(min((box[axis].start for box in boxes), default=0), max((box[axis].stop for box in boxes), default=1))
        for axis in range(3)
    )
    return i, j, k


def _check_grids(prediction: Volume, reference: Volume) -> None:
    ours, theirs = prediction.grid, reference.grid
    if ours.shape != theirs.shape:
        shapes = f"{format_shape(ours.shape)} and {format_shape(theirs.shape)}"
        raise InputError(f"prediction and label differ in shape ({shapes}, both in RAS order)")
    if not ours.is_close(theirs):
        distance = ours.distance_mm(theirs)
        raise InputError(f"prediction and label have the same shape, but lie {distance:.3g} mm apart (affines differ)")


def _check_values(undeclared: set[int]) -> None:
    if undeclared:
        shown = ", ".join(str(value) for value in sorted(undeclared)[:LISTED_VALUES])
        raise InputError(f"prediction or label holds values that are no class: {shown}")
