"""Frames of one series in order, as a stack whose geometry can be trusted, or every reason why there is none.

Slices are ordered by their positions along the normal, never by number or name, and the distance between them comes
from the positions, never from a thickness. Nothing is filled in: what does not fit is a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import LPS_TO_RAS, Grid, check_affine, format_spacing
from pipeline.io.dicom.frames import Frame, PixelFormat, Stack
from pipeline.io.dicom.phases import divide

# Directions of one scan repeat to the last digit or so; 1e-4 moves the far corner of a head by 0.03 mm.
DIRECTION_TOLERANCE = 1e-4
# Two slices closer than this share of a pixel are at the same place.
SAME_PLACE_SHARE = 0.02
# A slice may lie this share of the slice distance away from its even place, at least so many millimetres.
PLACE_TOLERANCE_SHARE = 0.02
# Two positions, each rounded to a hundredth of a millimetre along three axes: 2 x 0.005 x the root of 3.
PLACE_TOLERANCE_MM = 0.0175
# The steps of a stack may lean this much against the normal: headers are rounded, and the affine follows the lean.
LARGEST_LEAN_DEGREES = 0.25
MOST_GAPS_NAMED = 3


@dataclass(frozen=True)
class Arrangement:
    """A stack, or the problems that stand against it.

    Attributes:
        stack: None when there are problems.
        problems: Sentences without a full stop.
    """

    stack: Stack | None
    problems: tuple[str, ...]


def arrange(name: str, frames: Sequence[Frame], pixels: PixelFormat, *, allow_tilt: bool = False) -> Arrangement:
    """Put frames in order.

    Args:
        name: Of the series, for messages.
        frames: All of the series, in any order.
        pixels: Their format.
        allow_tilt: Take slices that are shifted evenly against each other (gantry tilt); the affine is sheared.
    """
    problems = _plane_problems(frames)
    if problems:
        return Arrangement(None, problems)
    first = frames[0]
    normal = _unit(np.cross(first.row_direction, first.column_direction))
    positions = np.array([frame.position for frame in frames])
    places, values = _places(positions @ normal, SAME_PLACE_SHARE * min(first.row_spacing, first.column_spacing))
    division = divide(frames, places)
    gaps = _gap_problems(values)
    if division.problem or gaps:
        return Arrangement(None, tuple(filter(None, [division.problem, *gaps])))
    phases = tuple(tuple(frames[index] for index in phase) for phase in division.phases)
    origin, step, drift_problems = _line(phases, normal)
    tilt = _lean_degrees(step, normal)
    if tilt > LARGEST_LEAN_DEGREES and not allow_tilt:
        fix = f"the slices are shifted against each other by a tilt of {tilt:.1f} degrees (--allow_tilt resamples them)"
        drift_problems = (*drift_problems, fix)
    if drift_problems:
        return Arrangement(None, drift_problems)
    grid = _grid(phases[0][0], pixels, origin, step, len(values))
    try:
        check_affine(grid.affine, name)
    except InputError as error:
        return Arrangement(None, (error.what,))
    stack = Stack(name=name, frames=phases, phase_names=division.names, pixels=pixels, grid=grid)
    return Arrangement(stack, ())


def _plane_problems(frames: Sequence[Frame]) -> tuple[str, ...]:
    """Whether all frames lie in parallel planes of equal pixels."""
    directions = np.array([(*frame.row_direction, *frame.column_direction) for frame in frames])
    spacings = np.array([(frame.row_spacing, frame.column_spacing) for frame in frames])
    found = []
    num_orientations = _num_distinct(directions, DIRECTION_TOLERANCE)
    if num_orientations > 1:
        found.append(f"the slices have {num_orientations} different orientations, which are no one volume")
    if np.ptp(spacings, axis=0).max() > 1e-3 * spacings.min():
        sizes = sorted({(round(row, 4), round(column, 4)) for row, column in spacings.tolist()})
        shown = ", ".join(format_spacing(size) for size in sizes[:MOST_GAPS_NAMED])
        found.append(f"the slices have different pixel sizes ({shown} mm)")
    for position, keyword in enumerate(("RescaleSlope", "RescaleIntercept")):
        without = sum(not frame.has_rescale[position] for frame in frames)
        if 0 < without < len(frames):
            found.append(f"{without} of {len(frames)} slices have no {keyword}, which the others have")
    return tuple(found)


def _unit(vector: Any) -> NDArray[np.float64]:
    """`vector` with length 1; headers round."""
    unit: NDArray[np.float64] = np.asarray(vector, float) / np.linalg.norm(vector)
    return unit


def _num_distinct(rows: NDArray[np.float64], tolerance: float) -> int:
    count, left = 0, rows
    while len(left):
        count += 1
        left = left[np.abs(left - left[0]).max(axis=1) > tolerance]
    return count


def _places(along: NDArray[np.float64], tolerance: float) -> tuple[list[int], NDArray[np.float64]]:
    """For each frame the number of its place from the lowest, and the places along the normal in mm."""
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order], prepend=along[order[0]]) > tolerance
    places = np.empty(len(along), int)
    places[order] = np.cumsum(steps)
    values = np.array([along[places == place].mean() for place in range(int(places.max()) + 1)])
    return places.tolist(), values


def _gap_problems(values: NDArray[np.float64]) -> list[str]:
    """Missing slices, or slices at uneven distances."""
    gaps = np.diff(values)
    if len(gaps) < 2:
        return []
    usual = float(np.median(gaps))
    multiples = np.rint(gaps / usual)
    tolerance = _place_tolerance(usual)
    uneven = np.abs(gaps - usual) > tolerance
    if not uneven.any():
        return []
    if (np.abs(gaps - multiples * usual) <= multiples * tolerance).all() and multiples.min() >= 1:
        missing = int((multiples - 1).sum())
        places = _named([f"{values[i]:.2f} and {values[i + 1]:.2f} mm" for i in np.flatnonzero(uneven)])
        verb = "slice is" if missing == 1 else "slices are"
        return [f"{missing} {verb} missing (the others are {usual:.4g} mm apart) between {places} along the normal"]
    low, high = float(gaps.min()), float(gaps.max())
    where = _named([f"{values[i]:.2f} and {values[i + 1]:.2f} mm" for i in np.flatnonzero(uneven)])
    return [
        f"the slices are unevenly spaced, {low:.4g} to {high:.4g} mm apart (tolerance {tolerance:.2g} mm); "
        f"uneven between {where} along the normal"
    ]


def _place_tolerance(spacing: float) -> float:
    """In mm; never so much that a missing slice of a microscope's stack would pass."""
    return max(min(PLACE_TOLERANCE_MM, spacing / 4), PLACE_TOLERANCE_SHARE * spacing)


def _named(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MOST_GAPS_NAMED} more" if len(texts) > MOST_GAPS_NAMED else ""
    return ", ".join(texts[:MOST_GAPS_NAMED]) + more


def _line(phases: Sequence[Sequence[Frame]], normal: NDArray[Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """First position and the step to the next, and whether every slice of every phase lies on that line."""
    positions = np.array([[frame.position for frame in phase] for phase in phases])
    origin, last = positions[0, 0], positions[0, -1]
    count = positions.shape[1]
    if count == 1:
        thickness = phases[0][0].thickness
        problem = () if thickness > 0 else ("a single slice without a SliceThickness has no extent along its normal",)
        return origin, normal * thickness, problem
    step = (last - origin) / (count - 1)
    even = origin + np.arange(count)[:, None] * step
    away = np.linalg.norm(positions - even, axis=2).max(axis=0)
    spacing = float(step @ normal)
    tolerance = _place_tolerance(spacing)
    worst = int(away.argmax())
    if away[worst] <= tolerance:
        return origin, step, ()
    number = phases[0][worst].instance_number
    named = f" (InstanceNumber {number})" if number is not None else ""
    text = f"slice {worst + 1} of {count}{named} lies {away[worst]:.3g} mm away from its even place in the stack"
    return origin, step, (f"{text} (tolerance {tolerance:.2g} mm)",)


def _lean_degrees(step: NDArray[Any], normal: NDArray[Any]) -> float:
    along = float(step @ normal)
    return float(np.degrees(np.arctan2(np.linalg.norm(step - along * normal), along)))


def _grid(first: Frame, pixels: PixelFormat, origin: NDArray[Any], step: NDArray[Any], num_slices: int) -> Grid:
    affine = np.eye(4)
    affine[:3, 0] = _unit(first.row_direction) * first.column_spacing
    affine[:3, 1] = _unit(first.column_direction) * first.row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = origin
    rows = first.tile.rows if first.tile else pixels.rows
    columns = first.tile.columns if first.tile else pixels.columns
    return Grid((columns, rows, num_slices), np.diag([*LPS_TO_RAS, 1.0]) @ affine)
