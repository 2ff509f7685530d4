"""Post-processing of a segmentation: spurious components taken away and holes filled, class by class.

Components are connected through faces, edges and corners (26 neighbours), and so holes through faces (6). What is taken
away becomes background, and only background is filled, so no step changes a voxel of another class. All that is to be
taken away goes before anything is filled, and classes are filled in the order of their values: the result does not
depend on the order of the steps, and applying them twice is applying them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.geometry import Spacing
from pipeline.plan import Plan, Record
from pipeline.run_files import RunFiles

StepKind = Literal["keep_largest", "remove_small", "fill_holes"]
Mask = NDArray[np.bool_]

NEIGHBOURS = np.ones((3, 3, 3), bool)
# Volumes are products of rounded voxel sizes: a component of exactly the least volume stays.
VOLUME_SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class Step(Record):
    """One thing done to one class.

    Attributes:
        class_name: The class.
        value: Its value in the segmentation.
        kind: "keep_largest" takes all of it away but its largest component, "remove_small" the components below
            `min_volume_mm3`; "fill_holes" gives it the background that it encloses.
        min_volume_mm3: For "remove_small" only.
    """

    class_name: str
    value: int
    kind: StepKind
    min_volume_mm3: float | None = None

    def __post_init__(self) -> None:
        if self.value == 0:
            raise InputError(f"steps: {self.class_name} has the value 0, which is the background")
        if (self.kind == "remove_small") != (self.min_volume_mm3 is not None):
            raise InputError("steps: min_volume_mm3 belongs to remove_small, which needs it")
        if self.min_volume_mm3 is not None and self.min_volume_mm3 <= 0:
            raise InputError(f"steps: min_volume_mm3 must be positive, got {self.min_volume_mm3}")


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """What was found of the best step of a kind for a class.

    Attributes:
        step: The step.
        num_cases: Cases that have the class in the prediction or the label; the figures are of these.
        dice_before, dice_after: Mean Dice without the step, and with it, by cross-validation over cases.
        num_better, num_worse: Cases whose Dice rises or falls.
        is_accepted: Whether it is one of the chosen steps.
    """

    step: Step
    num_cases: int
    dice_before: float
    dice_after: float
    num_better: int
    num_worse: int
    is_accepted: bool


@dataclass(frozen=True, kw_only=True)
class Postprocessing(Record):
    """The chosen steps and what they were chosen by; `postprocessing.json` of a run folder.

    Attributes:
        schema_version: Version of this file's format.
        steps: What is done to a segmentation; may be edited by hand.
        min_gain: Least gain in a class's mean Dice for a step to be taken.
        case_ids: Cases that it was chosen on.
        trials: For people, nothing depends on them.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    steps: tuple[Step, ...]
    min_gain: float
    case_ids: tuple[str, ...]
    trials: tuple[Trial, ...] = ()


def read_postprocessing(run_dir: Path, plan: Plan) -> Postprocessing:
    """The post-processing that was chosen for a run.

    Raises:
        InputError: None was chosen, the file cannot be read, or a step's class is not one of the plan's.
    """
    path = RunFiles(run_dir).postprocessing
    if not path.is_file():
        raise InputError(
            f"the run has no {path.name}", where=run_dir, fix="Choose one with `voxfit postprocess`, or leave it out"
        )
    found = read_artifact(path, Postprocessing)
    for step in found.steps:
        if plan.labels.get(step.class_name) != step.value:
            raise InputError(f"the plan has no class {step.class_name} with the value {step.value}", where=path)
    return found


def apply_postprocessing(label: NDArray[Any], steps: Sequence[Step], spacing: Spacing) -> NDArray[Any]:
    """Do the steps to a segmentation.

    Beside the result, a class takes one byte per voxel of the volume and up to 7 per voxel of the box around it.

    Args:
        label: (I, J, K) class values; not changed.
        steps: In any order.
        spacing: Voxel size along i, j, k in millimetres.

    Returns:
        A new array of the same shape and dtype.
    """
    result = label.copy()
    for step in sorted(steps, key=lambda step: (step.kind == "fill_holes", step.value)):
        _apply_step(result, step, voxel_mm3=prod(spacing))
    return result


def _apply_step(label: NDArray[Any], step: Step, *, voxel_mm3: float) -> None:
    """Do a step in place."""
    mask = label == step.value
    box = box_of(mask)
    if box is None:
        return
    part, mask = label[box], mask[box]
    if step.kind == "fill_holes":
        part[holes(mask) & (part == 0)] = step.value
    else:
        numbers, sizes = components(mask)
        part[mask & ~kept(sizes, step, voxel_mm3=voxel_mm3)[numbers]] = 0


def box_of(mask: Mask) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds all of a mask (I, J, K), found without a copy of it; None of an empty one."""
    found: list[tuple[slice, slice, slice] | None] = ndimage.find_objects(mask.view(np.uint8), max_label=1)
    return found[0]


def components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number of the component of every voxel (0 outside), and how many voxels each has (0 of number 0)."""
    numbers, count = ndimage.label(mask, structure=NEIGHBOURS)
    return numbers, np.bincount(numbers[mask], minlength=count + 1)


def kept(sizes: NDArray[np.int64], step: Step, *, voxel_mm3: float) -> Mask:
    """Which components a step that takes away leaves.

    Args:
        sizes: Voxels by number of the component, 0 of number 0.
        step: "keep_largest", of which the first of equal ones is kept, or "remove_small".
        voxel_mm3: Volume of a voxel.
    """
    if step.kind == "keep_largest":
        return np.arange(len(sizes)) == np.argmax(sizes)
    assert step.min_volume_mm3 is not None
    return sizes * voxel_mm3 >= step.min_volume_mm3 * (1 - VOLUME_SLACK)


def holes(mask: Mask) -> Mask:
    """Voxels outside a mask that no path through faces leads out from."""
    filled: Mask = ndimage.binary_fill_holes(mask)
    filled &= ~mask
    return filled


def describe_postprocessing(chosen: Postprocessing) -> str:
    """What was tried and taken, a line each."""
    lines = [
        f"{'take' if trial.is_accepted else 'leave'} {describe_step(trial.step)}: mean Dice {trial.dice_before:.4f} ->"
        f" {trial.dice_after:.4f} in {trial.num_cases} cases ({trial.num_better} better, {trial.num_worse} worse)"
        for trial in chosen.trials
    ]
    return "\n".join([*lines, f"{len(chosen.steps)} step(s) chosen on {len(chosen.case_ids)} cases"])


def describe_step(step: Step) -> str:
    """`liver: keep_largest`, for messages."""
    volume = "" if step.min_volume_mm3 is None else f" below {step.min_volume_mm3:g} mm3"
    return f"{step.class_name}: {step.kind}{volume}"
