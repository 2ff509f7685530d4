"""Read every case once: what is wrong with it, and the figures that a plan is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.case_checks import (
    Findings,
    Problem,
    grids_agree,
    image_is_usable,
    label_has_classes,
    try_image,
    try_label,
)
from pipeline.datasets.label_values import count_values
from pipeline.datasets.measurement import Measured, measure_case
from pipeline.datasets.workers import sensible_workers
from pipeline.errors import in_words
from pipeline.log import get_logger, track
from pipeline.parallel import map_unordered

__all__ = ["Examined", "Problem", "examine_case", "examine_cases", "hash_voxels"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examined:
    """What one reading of a case found.

    Attributes:
        case_id: The case.
        problems: Everything wrong with it that can be seen without other cases.
        notes: What is worth a line in the log, such as a channel on another grid.
        measured: None when image or label cannot be used.
        image_hash, label_hash: Of the voxels in RAS order; "" for what is missing or empty.
    """

    case_id: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    measured: Measured | None = None
    image_hash: str = ""
    label_hash: str = ""


def examine_cases(dataset: Dataset, *, num_workers: int) -> tuple[Examined, ...]:
    """Read every training case once, find what is wrong with it, and measure it.

    Small datasets are read in this process, and workers are fewer where memory would not hold so many of the largest
    case.

    Args:
        dataset: The dataset; its test cases are not read.
        num_workers: At most so many processes.

    Returns:
        One for each training case, sorted by case id.
    """
    examine = partial(
        examine_case,
        num_channels=len(dataset.channel_names),
        labels=dataset.labels,
        ignore_value=dataset.ignore_value,
    )
    files = [path for case in dataset.cases for path in (*case.images, case.label) if path is not None]
    outcomes = map_unordered(examine, dataset.cases, num_workers=sensible_workers(files, num_workers))
    examined = [
        outcome.result or _failed(outcome.item, outcome.error)
        for outcome in track(outcomes, description="examine cases", total=len(dataset.cases))
    ]
    examined.sort(key=lambda one: one.case_id)
    for one in examined:
        for note in one.notes:
            get_logger().info("%s: %s", one.case_id, note)
    return tuple(examined)


def _failed(case: Case, error: Exception | None) -> Examined:
    reason = "" if error is None else in_words(error)
    return Examined(case_id=case.case_id, problems=(Problem(case_id=case.case_id, kind="failed", message=reason),))


def examine_case(case: Case, *, num_channels: int, labels: Mapping[str, int], ignore_value: int | None) -> Examined:
    """Read one case once; whatever a file can be wrong in becomes a problem, not an error.

    Args:
        case: The case.
        num_channels: Channels that the dataset declares.
        labels: Value by class name, as the dataset declares them.
        ignore_value: Value of ignored voxels.
    """
    findings = Findings(case.case_id)
    image, notes = try_image(case, findings)
    label = try_label(case, findings)
    usable = image is not None and image_is_usable(image, num_channels, findings)
    counts = count_values(label.array) if label is not None else {}
    has_foreground = label is not None and label_has_classes(counts, labels, ignore_value, findings)
    measured = None
    if image is not None and label is not None and grids_agree(image, label, findings) and usable:
        measured = measure_case(case, image, label, tuple(labels.values()), ignore_value, counts)
    return Examined(
        case_id=case.case_id,
        problems=tuple(findings.problems),
        notes=notes,
        measured=measured,
        image_hash=hash_voxels(image.array) if image is not None else "",
        # Empty labels of one shape are all alike, and are a problem already.
        label_hash=hash_voxels(label.array) if label is not None and has_foreground else "",
    )


def hash_voxels(array: NDArray[Any]) -> str:
    """A hash of shape and voxels; labels of equal values have equal types, the smallest that holds them.

    Args:
        array: (C, I, J, K) in RAS order.
    """
    digest = hashlib.sha256(repr(array.shape).encode())
    for channel in array:
        for slab in channel:
            digest.update(np.ascontiguousarray(slab).data)
    return digest.hexdigest()
