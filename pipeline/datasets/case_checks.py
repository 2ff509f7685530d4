"""The checks that one case can pass or fail on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.datasets.case import Case
from pipeline.datasets.case_reader import grid_mismatch, stack_channels
from pipeline.errors import InputError, name_some
from pipeline.io.image_file import read_label, read_volume
from pipeline.io.volume import Volume
from pipeline.plan import Record

# A healthy patient has no lesion, and a sequence that was not taken is often filled with zeros: such cases are listed,
# and train like any other.
WARNING_KINDS = frozenset({"unlisted_file", "empty_label", "constant_channel"})


@dataclass(frozen=True, kw_only=True)
class Problem(Record):
    """One thing that is wrong with one case.

    Attributes:
        case_id: The case, or the stem of a file that belongs to no case.
        kind: A stable word for programs, such as "missing_label".
        message: A line for people, without the case id.
    """

    case_id: str
    kind: str
    message: str

    @property
    def is_warning(self) -> bool:
        """Whether a person should know, and training goes on all the same."""
        return self.kind in WARNING_KINDS


class Findings:
    """Collects the problems of one case."""

    def __init__(self, case_id: str) -> None:
        self.case_id = case_id
        self.problems: list[Problem] = []

    def add(self, kind: str, message: str) -> None:
        """Note one problem."""
        self.problems.append(Problem(case_id=self.case_id, kind=kind, message=message))


def try_image(case: Case, findings: Findings) -> tuple[Volume | None, tuple[str, ...]]:
    """All channels on one grid, and what was resampled for it; None when any file cannot be used."""
    if not case.images:
        findings.add("missing_image", "has no image")
    volumes = [_try_file(path, read_volume, "image", findings) for path in case.images]
    readable = [volume for volume in volumes if volume is not None]
    if not readable or len(readable) < len(volumes):
        return None, ()
    try:
        return stack_channels(readable, case.case_id)
    except InputError as error:
        findings.add("channel_count", error.what)
        return None, ()


def try_label(case: Case, findings: Findings) -> Volume | None:
    """The label, whatever grid it lies on; None when it cannot be used."""
    if case.label is None:
        findings.add("missing_label", "has no label")
        return None
    return _try_file(case.label, read_label, "label", findings)


def _try_file(path: Path, read: Callable[[Path], Volume], what: str, findings: Findings) -> Volume | None:
    name = "folder" if path.is_dir() else f"file {path.name}"
    if not path.exists():
        findings.add(f"missing_{what}", f"the {what} file {path.name} does not exist")
        return None
    try:
        return read(path)
    except InputError as error:
        findings.add(f"unreadable_{what}", f"the {what} {name} cannot be used: {error.what}")
        return None


def image_is_usable(image: Volume, num_channels: int, findings: Findings) -> bool:
    """Check the number of channels and the voxels of each; False when no figures can be taken from it."""
    if image.num_channels != num_channels:
        findings.add("channel_count", f"has {image.num_channels} channel(s), the dataset declares {num_channels}")
    for index, channel in enumerate(image.array):
        low, high = channel.min(), channel.max()
        # The extremes are NaN or infinite as soon as any voxel is, so a mask is made only for the message.
        if not (np.isfinite(low) and np.isfinite(high)):
            count = channel.size - int(np.count_nonzero(np.isfinite(channel)))
            findings.add("non_finite_image", f"channel {index} has {count} voxel(s) that are NaN or infinite")
        elif low == high:
            kind = "constant_image" if image.num_channels == 1 else "constant_channel"
            findings.add(kind, f"channel {index} is {low:g} everywhere")
    return not {"channel_count", "non_finite_image"} & {problem.kind for problem in findings.problems}


def grids_agree(image: Volume, label: Volume, findings: Findings) -> bool:
    """Check that the label lies on the image's grid."""
    mismatch = grid_mismatch(image.grid, label.grid)
    if mismatch:
        findings.add("shape_mismatch" if image.grid.shape != label.grid.shape else "affine_mismatch", mismatch)
    return not mismatch


def label_has_classes(
    counts: Mapping[int, int], labels: Mapping[str, int], ignore_value: int | None, findings: Findings
) -> bool:
    """Check the values of a label against the declared ones; False when it has no foreground at all.

    Args:
        counts: Voxels by value.
        labels: Value by class name.
        ignore_value: Value of ignored voxels.
        findings: Takes the problems.
    """
    undeclared = sorted(set(counts) - set(labels.values()) - {ignore_value})
    if undeclared:
        values = name_some([f"{value} ({counts[value]} voxels)" for value in undeclared])
        findings.add("undeclared_label", f"the label holds undeclared values: {values}")
    has_foreground = any(value != 0 and value != ignore_value for value in counts)
    if not has_foreground:
        findings.add("empty_label", "the label holds no foreground")
    return has_foreground
