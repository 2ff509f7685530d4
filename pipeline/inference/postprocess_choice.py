"""Which post-processing improves predictions of cases that were held out, judged by cross-validation over these cases.

For every class, the ways of taking components away are compared first: all but the largest, or those below one of
several volumes. The better one is chosen on all folds but one and scored on that one; it is taken when the mean Dice of
the class rises by more than a threshold, and by more than two standard errors, over the folds that the choice was not
made on, and by more than the threshold over all cases. Filling holes is tried after it in the same way. As no step
changes a voxel of another class, no other class becomes worse.

A class that neither prediction nor label has counts as a Dice of 1 here, otherwise taking away what is false altogether
would seem to change nothing; `voxfit evaluate` leaves such cases out of its means.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.inference.postprocess import (
    Postprocessing,
    Step,
    Trial,
    apply_postprocessing,
    box_of,
    components,
    describe_step,
    holes,
    kept,
)
from pipeline.io.image_file import read_label
from pipeline.log import get_logger, track
from pipeline.parallel import map_unordered

MIN_CASES, MAX_FOLDS = 4, 5
# Standard errors that a gain must exceed.
NUM_ERRORS = 2.0
# From a few voxels to a lymph node, roughly doubling.
MIN_VOLUMES_MM3 = (10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)

# Dice of a case before any step and after each candidate; None where neither prediction nor label has the class.
CaseDice = NDArray[np.float64] | None


class PredictedCase(Protocol):
    """A case's files."""

    @property
    def case_id(self) -> str:
        """Name of the case."""

    @property
    def prediction(self) -> Path:
        """The segmentation."""

    @property
    def reference(self) -> Path:
        """The label."""


@dataclass(frozen=True)
class _Candidates:
    """The steps that are compared for one class."""

    class_name: str
    value: int

    @property
    def removals(self) -> list[Step]:
        largest = Step(class_name=self.class_name, value=self.value, kind="keep_largest")
        small = [
            Step(class_name=self.class_name, value=self.value, kind="remove_small", min_volume_mm3=volume)
            for volume in MIN_VOLUMES_MM3
        ]
        return [largest, *small]

    @property
    def fills(self) -> list[Step]:
        return [Step(class_name=self.class_name, value=self.value, kind="fill_holes")]


def choose_postprocessing(
    cases: Sequence[PredictedCase],
    labels: Mapping[str, int],
    *,
    ignore_value: int | None = None,
    min_gain: float = 0.002,
    num_workers: int = 1,
) -> Postprocessing:
    """Choose steps by their Dice on predictions of cases that the network was not trained on.

    Args:
        cases: Predictions and labels, in files on the same grids.
        labels: Value by class name; 0 is the background.
        ignore_value: Label voxels of this value take no part in Dice.
        min_gain: Least gain in the mean Dice of a class for a step to be taken.
        num_workers: Processes.

    Raises:
        InputError: There are too few cases, or one cannot be read or has a prediction on another grid than its label.
    """
    if len(cases) < MIN_CASES:
        raise InputError(f"post-processing is chosen by at least {MIN_CASES} held-out cases, got {len(cases)}")
    classes = [_Candidates(name, value) for name, value in labels.items() if value != 0]
    measure = partial(_measure_case, classes=classes, ignore_value=ignore_value)
    by_removal = _measure_all(partial(measure, taken=None), cases, num_workers)
    trials = [
        trial
        for number, of_class in enumerate(classes)
        if (trial := try_steps(of_class.removals, [case[number] for case in by_removal], min_gain=min_gain))
    ]
    taken = tuple(trial.step for trial in trials if trial.is_accepted)
    by_filling = _measure_all(partial(measure, taken=taken), cases, num_workers)
    trials += [
        trial
        for number, of_class in enumerate(classes)
        if (trial := try_steps(of_class.fills, [case[number] for case in by_filling], min_gain=min_gain))
    ]
    for trial in trials:
        if trial.is_accepted:
            get_logger("postprocess").info("%s", describe_step(trial.step))
    return Postprocessing(
        steps=tuple(trial.step for trial in trials if trial.is_accepted),
        min_gain=min_gain,
        case_ids=tuple(sorted(case.case_id for case in cases)),
        trials=tuple(trials),
    )


def try_steps(steps: Sequence[Step], dice: Sequence[CaseDice], *, min_gain: float) -> Trial | None:
    """Compare steps for one class by cross-validation over cases.

    Args:
        steps: Candidates; the first of equal ones is preferred.
        dice: By case, without a step and with each of them: (1 + len(steps),); None where a case has nothing of the
            class.
        min_gain: As in `choose_postprocessing`.

    Returns:
        The step that is best on all cases; None where none is better than nothing, or too few cases have the class.
    """
    known = np.array([case for case in dice if case is not None])
    if len(known) < MIN_CASES:
        return None
    gains = known[:, 1:] - known[:, :1]
    best = _best(gains)
    if best is None:
        return None
    held_out = _held_out_gains(gains)
    gain = float(min(held_out.mean(), gains[:, best].mean()))
    # The best of nine by chance passes in a tenth of all tries; of real gains, alike ones in four cases are enough.
    least = NUM_ERRORS * float(held_out.std(ddof=1) / np.sqrt(len(held_out)))
    before = float(known[:, 0].mean())
    return Trial(
        step=steps[best],
        num_cases=len(known),
        dice_before=round(before, 6),
        dice_after=round(before + float(held_out.mean()), 6),
        num_better=int((gains[:, best] > 0).sum()),
        num_worse=int((gains[:, best] < 0).sum()),
        is_accepted=gain > min_gain and float(held_out.mean()) > least,
    )


def _best(gains: NDArray[np.float64]) -> int | None:
    """The candidate of the largest mean gain over cases (N, candidates); None where none has any."""
    means = gains.mean(axis=0)
    return int(np.argmax(means)) if means.max() > 0 else None


def _held_out_gains(gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gain of each case by the candidate that is best on the cases of the other folds."""
    order = list(range(len(gains)))
    random.Random(0).shuffle(order)
    found = np.zeros(len(gains))
    num_folds = min(MAX_FOLDS, len(gains))
    for fold in range(num_folds):
        held_out = order[fold::num_folds]
        best = _best(np.delete(gains, held_out, axis=0))
        if best is not None:
            found[held_out] = gains[held_out, best]
    return found


def _measure_all(
    measure: Callable[[PredictedCase], list[CaseDice]], cases: Sequence[PredictedCase], num_workers: int
) -> list[list[CaseDice]]:
    """What `measure` finds, in the order of the cases' ids: it decides upon the folds."""
    found = {}
    for outcome in track(
        map_unordered(measure, cases, num_workers=num_workers), description="postprocess", total=len(cases)
    ):
        if outcome.error is not None:
            raise InputError(f"cannot be used ({outcome.error})", where=outcome.item.case_id) from outcome.error
        found[outcome.item.case_id] = outcome.result
    return [found[case_id] for case_id in sorted(found)]


def _measure_case(
    case: PredictedCase, *, classes: Sequence[_Candidates], ignore_value: int | None, taken: tuple[Step, ...] | None
) -> list[CaseDice]:
    """Dice by class: of every removal, or after those that were taken of filling."""
    prediction, reference = read_label(case.prediction), read_label(case.reference)
    if not prediction.grid.is_close(reference.grid):
        raise InputError("prediction and label lie on different grids")
    predicted, true = prediction.array[0], reference.array[0]
    counted = None if ignore_value is None else true != ignore_value
    if taken is None:
        voxel_mm3 = prod(prediction.spacing)
        return [_removal_dice(predicted, true, counted, of_class, voxel_mm3) for of_class in classes]
    predicted = apply_postprocessing(predicted, taken, prediction.spacing)
    return [_filling_dice(predicted, true, counted, of_class.value) for of_class in classes]


def _removal_dice(
    predicted: NDArray[Any], true: NDArray[Any], counted: NDArray[Any] | None, of_class: _Candidates, voxel_mm3: float
) -> CaseDice:
    """Dice of every candidate from one labelling: voxels and hits of the components that it keeps, added up."""
    found, wanted = predicted == of_class.value, true == of_class.value
    num_wanted = int(np.count_nonzero(wanted))
    box = box_of(found)
    if box is None:
        return None if num_wanted == 0 else np.zeros(1 + len(of_class.removals))
    numbers, sizes = components(found[box])
    inside = found[box] if counted is None else found[box] & counted[box]
    voxels = np.bincount(numbers[inside], minlength=len(sizes))
    hits = np.bincount(numbers[inside & wanted[box]], minlength=len(sizes))
    masks = [np.ones(len(sizes), bool), *(kept(sizes, step, voxel_mm3=voxel_mm3) for step in of_class.removals)]
    return np.array([_dice(int(hits[mask].sum()), int(voxels[mask].sum()), num_wanted) for mask in masks])


def _filling_dice(predicted: NDArray[Any], true: NDArray[Any], counted: NDArray[Any] | None, value: int) -> CaseDice:
    found, wanted = predicted == value, true == value
    num_wanted = int(np.count_nonzero(wanted))
    box = box_of(found)
    if box is None:
        return None if num_wanted == 0 else np.zeros(2)
    filled = found.copy()
    filled[box] |= holes(found[box]) & (predicted[box] == 0)
    scores = []
    for mask in (found, filled):
        inside = mask if counted is None else mask & counted
        scores.append(_dice(int(np.count_nonzero(inside & wanted)), int(np.count_nonzero(inside)), num_wanted))
    return np.array(scores)


def _dice(num_hits: int, num_found: int, num_wanted: int) -> float:
    total = num_found + num_wanted
    return 2 * num_hits / total if total else 1.0
