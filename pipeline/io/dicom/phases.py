"""Frames that lie at the same places: time points, echoes, diffusion weights; told apart by what their headers say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

from pipeline.io.dicom.elements import shown, words
from pipeline.io.dicom.frames import Frame

# Functional group -> keywords, in the order they are tried: what is set on purpose before what merely counts.
_PHASE_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TemporalPositionSequence", ("TemporalPositionIdentifier", "TemporalPositionTimeOffset")),
    ("FrameContentSequence", ("TemporalPositionIndex",)),
    ("MREchoSequence", ("EffectiveEchoTime",)),
    ("MREchoSequence", ("EchoTime", "EchoNumbers")),
    ("MRDiffusionSequence", ("DiffusionBValue", "DiffusionDirectionality")),
    ("MRDiffusionSequence/DiffusionGradientDirectionSequence", ("DiffusionGradientOrientation",)),
    ("MRModifierSequence", ("InversionTimes",)),
    ("MRModifierSequence", ("InversionTime", "TriggerTime", "NominalPercentageOfCardiacPhase")),
    ("CardiacSynchronizationSequence", ("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime")),
    ("MRImageFrameTypeSequence", ("ComplexImageComponent", "FrameType")),
    ("MRTimingAndRelatedParametersSequence", ("FlipAngle",)),
    ("", ("FrameReferenceTime",)),
    ("FrameContentSequence", ("FrameAcquisitionNumber",)),
    ("", ("AcquisitionNumber", "AcquisitionTime")),
)
PHASE_KEYWORDS = tuple(dict.fromkeys(keyword for _, keywords in _PHASE_GROUPS for keyword in keywords))
# Magnitude, phase, real and imaginary part of one acquisition in ImageType; water, fat and their sums, of Dixon's.
_PARTS_TEXT = "M P R I MAGNITUDE PHASE REAL IMAGINARY W F IP OP WATER FAT IN_PHASE OUT_PHASE OPP_PHASE"
_PARTS = frozenset(_PARTS_TEXT.split())
MOST_KEYS = 3
# What one volume has one value of; the others may change from slice to slice, or count the slices.
_NEVER_WITHIN_A_VOLUME = ("EchoTime", "EffectiveEchoTime", "DiffusionBValue", "ComplexImageComponent", "ImageType")
# Scanners write the echo time that a slice really had.
LARGEST_JITTER = 0.01
# Keyword to value.
Told = dict[str, str]


class Division(NamedTuple):
    """Frames by phase, and by place within one; `problem` says why there is none."""

    phases: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()
    problem: str = ""


def phase_of(holder: Callable[[str, str], Any], image_type: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Everything in a frame's header that may tell it from others at its place.

    Args:
        holder: Gives the dataset that holds a keyword of a functional group.
        image_type: Values of ImageType.
    """
    found: dict[str, str] = {}
    for group, keywords in _PHASE_GROUPS:
        for keyword in keywords:
            value = shown("/".join(words(holder(group, keyword), keyword)))
            if value:
                found.setdefault(keyword, value)
    part = next((word.upper() for word in image_type[2:] if word.upper() in _PARTS), "")
    return (*found.items(), *((("ImageType", part),) if part else ()))


def divide(frames: Sequence[Frame], places: Sequence[int]) -> Division:
    """Divide frames into phases that each hold every place once.

    Args:
        frames: All frames of a series.
        places: For each frame, the number of its place along the normal, from 0.

    Returns:
        Indices into `frames`, sorted by place; or the problem, when no element of the headers tells them apart or a
        phase is incomplete.
    """
    num_places = max(places) + 1
    told = [_told(frame) for frame in frames]
    if len(frames) == num_places:
        problem = _mixture(told, range(len(frames)), ())
        return Division(problem=problem) if problem else Division((_by_place(range(len(frames)), places),), ("",))
    if num_places == 1:
        return Division(problem=f"all {len(frames)} slices lie at one place, which is no volume")
    best = ""
    for keys in _candidate_keys(told):
        groups = _groups(told, keys)
        if any(count > 1 for indices in groups.values() for count in Counter(places[i] for i in indices).values()):
            continue
        incomplete = {values: indices for values, indices in groups.items() if len(indices) < num_places}
        if not incomplete:
            order = sorted(groups, key=_sort_key)
            phases = tuple(_by_place(groups[values], places) for values in order)
            mixture = next(filter(None, (_mixture(told, groups[values], keys) for values in order)), "")
            if mixture:
                best = best or mixture
                continue
            return Division(phases, tuple(_name(keys, values) for values in order))
        best = best or _describe_incomplete(keys, groups, incomplete, num_places)
    return Division(problem=best or _describe_doubles(frames, places))


def _told(frame: Frame) -> Told:
    """What a frame's header says, numbers in one spelling: 2.4 and 2.40 are one echo."""
    return {keyword: "/".join(map(_spelled, value.split("/"))) for keyword, value in frame.phase}


def _spelled(value: str) -> str:
    try:
        return f"{float(value):.7g}"
    except ValueError:
        return value


def _mixture(told: Sequence[Told], indices: Sequence[int], keys: tuple[str, ...]) -> str:
    """Whether slices of one phase differ in what cannot change within a volume."""
    for keyword in _NEVER_WITHIN_A_VOLUME:
        values = sorted({told[index].get(keyword, "") for index in indices}, key=lambda value: _sort_key((value,)))
        if keyword not in keys and len(values) > 1 and not _is_close(values):
            counts = Counter(told[index].get(keyword, "") for index in indices)
            shown = ", ".join(f"{value or 'none'} in {counts[value]}" for value in values[:MOST_KEYS])
            return f"slices of one volume differ in {keyword} ({shown})"
    return ""


def _is_close(values: Sequence[str]) -> bool:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return max(numbers) - min(numbers) <= LARGEST_JITTER * max(map(abs, numbers))


def _candidate_keys(told: Sequence[Told]) -> Iterator[tuple[str, ...]]:
    """Keywords that take several values over the series: each alone, then together."""
    values: dict[str, set[str]] = defaultdict(set)
    for own in told:
        for keyword, value in own.items():
            values[keyword].add(value)
    keys = [keyword for keyword in (*PHASE_KEYWORDS, "ImageType") if len(values[keyword]) > 1]
    partial = [key for key in (*PHASE_KEYWORDS, "ImageType") if key not in keys and _is_partial(told, key)]
    usable = [*keys, *partial]
    yield from chain.from_iterable(combinations(usable, count) for count in range(1, MOST_KEYS + 1))


def _is_partial(told: Sequence[Told], keyword: str) -> bool:
    return 0 < sum(keyword in own for own in told) < len(told)


def _groups(told: Sequence[Told], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[int]]:
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, own in enumerate(told):
        groups[tuple(own.get(key, "") for key in keys)].append(index)
    return groups


def _by_place(indices: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(indices, key=lambda index: places[index]))


def _sort_key(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Numbers by size, anything else by its letters."""
    keyed = []
    for value in values:
        try:
            keyed.append((float(value), ""))
        except ValueError:
            keyed.append((float("-inf") if not value else 0.0, value))
    return keyed


def _name(keys: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ", ".join(f"{key} {value or 'none'}" for key, value in zip(keys, values, strict=True))


def _describe_incomplete(
    keys: tuple[str, ...],
    groups: dict[tuple[str, ...], list[int]],
    incomplete: dict[tuple[str, ...], list[int]],
    num_places: int,
) -> str:
    worst = min(incomplete, key=lambda values: (len(incomplete[values]), _sort_key(values)))
    return (
        f"{len(groups)} phases by {' and '.join(keys)} lie at the same places, but {len(incomplete)} of them are "
        f"incomplete ({_name(keys, worst)} has {len(incomplete[worst])} of {num_places} slices)"
    )


def _describe_doubles(frames: Sequence[Frame], places: Sequence[int]) -> str:
    counts = Counter(places)
    doubled = sorted(place for place, count in counts.items() if count > 1)
    numbers = [f.instance_number for f, place in zip(frames, places, strict=True) if place == doubled[0]]
    shown = ", ".join("?" if number is None else str(number) for number in numbers[:5])
    return (
        f"{len(doubled)} of {len(counts)} places hold more than one slice and nothing tells them apart "
        f"(first at place {doubled[0]}: InstanceNumber {shown})"
    )
