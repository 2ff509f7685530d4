"""Cases of a tree of DICOM series: which series are channels of one case, and which structures label it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pipeline.datasets.dicom_objects import objects_of, shared_parts
from pipeline.datasets.dicom_scan import Scan
from pipeline.errors import InputError
from pipeline.geometry import boxes_touch
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.phases import PHASE_KEYWORDS
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.reader import refusal_of
from pipeline.io.dicom.series import MODALITIES, Series

# What people write for DICOM's own words.
MODALITY_WORDS = {"pet": "pt", "mri": "mr"}
# Names of channels that only one modality has.
_MR_WORDS = ("mr", "mri", "t1", "t1w", "t1ce", "t1gd", "t2", "t2w", "flair", "dwi", "adc", "pd")
CHANNEL_MODALITY = dict.fromkeys(_MR_WORDS, "MR") | {"ct": "CT", "pt": "PT", "pet": "PT"}


@dataclass(frozen=True, kw_only=True, eq=False)
class DicomCase:
    """One case.

    Attributes:
        case_id: From the series, so that it stays the same wherever the files lie, and tells nobody's identity.
        series: One per channel; the first gives the grid.
        label_objects: Structure sets and segmentations drawn on the first series.
        patient: Groups cases of a patient, without telling who it is.
    """

    case_id: str
    series: tuple[Series, ...]
    label_objects: tuple[Header, ...]
    patient: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DicomCases:
    """The cases of a tree.

    Attributes:
        channels: What chose the series of each channel.
        cases: That can be read, by id.
        failures: Reason by case id of those that cannot.
        notes: What a person should know of the choice.
    """

    channels: tuple[str, ...]
    cases: tuple[DicomCase, ...]
    failures: dict[str, str]
    notes: tuple[str, ...]


def case_id_of(series: Series) -> str:
    """The id of the case whose first channel a series is."""
    return f"case_{series.key}"


def parse_channels(text: str) -> list[str]:
    """Channels from `CT, PT`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def matches(series: Series, channel: str) -> bool:
    """Whether a series belongs to a channel, by its modality or by a pattern for its description."""
    wanted = channel.strip().casefold()
    modality, description = series.first.modality.casefold(), series.first.description.strip().casefold()
    return MODALITY_WORDS.get(wanted, wanted) == modality or bool(description and fnmatchcase(description, wanted))


def find_dicom_cases(
    scan: Scan, channels: Sequence[str] = (), *, channel_names: Sequence[str] | None = None
) -> DicomCases:
    """Cases of a tree; each series of the first channel makes one.

    Args:
        scan: The tree.
        channels: A modality (CT, MR, PT) or a pattern for SeriesDescription for each; none takes the one modality
            that has the most labels, or the most series where there are none.
        channel_names: Of the network that each case is for: where the phases of a single series are channels, they
            must be as many, and told apart by the same; None takes what most cases have.

    Raises:
        InputError: No series is of the first channel.
    """
    volumes = [series for series in scan.series if not series.left_out]
    objects = objects_of(scan)
    chosen, notes = (tuple(channels), ()) if channels else _default_channel(volumes, objects)
    firsts = [series for series in volumes if matches(series, chosen[0])]
    if not firsts:
        found = ", ".join(sorted({series.first.modality for series in volumes})) or "none"
        fix = f"Name one that is there (modalities found: {found}) with --channels"
        raise InputError(f"holds no series of images for {chosen[0]}", where=shown_root(scan), fix=fix)
    patients = _patients(firsts)
    cases, failures = [], {}
    for first in firsts:
        try:
            series = (first, *(_partner(first, volumes, channel) for channel in chosen[1:]))
            _check_readable(series)
        except InputError as error:
            failures[case_id_of(first)] = error.what
            continue
        own = DicomCase(
            case_id=case_id_of(first),
            series=series,
            label_objects=objects.get(first.key, ()),
            patient=patients[first.key],
        )
        cases.append(own)
    cases.sort(key=lambda case: case.case_id)
    cases, others = _with_equal_channels(cases, channel_names)
    notes = (*notes, *_label_notes(firsts, volumes, objects, chosen[0]))
    return DicomCases(channels=chosen, cases=tuple(cases), failures={**failures, **others}, notes=notes)


def shown_root(scan: Scan) -> str:
    """The name of the folder for messages."""
    return hide(scan.root.name, scan.identity)


def _with_equal_channels(
    cases: Sequence[DicomCase], channel_names: Sequence[str] | None
) -> tuple[list[DicomCase], dict[str, str]]:
    """The cases with the right number of channels, by default that of most, and why the others are none."""
    wanted = len(channel_names) if channel_names is not None else None
    num_phases = {case.case_id: [_num_phases(series) for series in case.series] for case in cases}
    counts = Counter(sum(phases) for phases in num_phases.values())
    usual = wanted or max(counts, key=lambda count: (counts[count], -count), default=0)
    failures = {}
    for case in cases:
        phases = num_phases[case.case_id]
        if len(phases) > 1 and max(phases) > 1:
            name = case.series[phases.index(max(phases))].name
            failures[case.case_id] = f"{name} holds {max(phases)} phases, where one channel is expected"
        elif sum(phases) != usual:
            needed = f"{usual} are needed" if wanted else f"most of the others hold {usual}"
            failures[case.case_id] = f"{case.series[0].name} holds {sum(phases)} channel(s), {needed}"
    same = [case for case in cases if case.case_id not in failures]
    failures |= _with_other_phases(same, _kinds_of(channel_names) if channel_names is not None else None)
    return [case for case in same if case.case_id not in failures], failures


def _with_other_phases(cases: Sequence[DicomCase], wanted: tuple[str, ...] | None) -> dict[str, str]:
    """Cases whose channels are told apart by something else than is wanted, or than those of most."""
    kinds = {case.case_id: _phase_kinds(case.series[0]) for case in cases if len(case.series) == 1}
    usual = max(Counter(kinds.values()).items(), key=lambda item: item[1], default=((), 0))[0]
    expected, whose = (wanted, "those of the network are told apart") if wanted else (usual, "most of the others")
    return {
        case.case_id: f"{case.series[0].name} holds phases by {', '.join(kinds[case.case_id]) or 'nothing'}, "
        f"{whose} by {', '.join(expected) or 'nothing'}"
        for case in cases
        if case.case_id in kinds and kinds[case.case_id] != expected
    }


def _kinds_of(names: Sequence[str]) -> tuple[str, ...]:
    """What tells phases apart by their names, such as EchoTime of "EchoTime 2.4"; nothing of other names."""
    kinds = {tuple(part.split(" ")[0] for part in name.split(", ")) for name in names}
    known = {*PHASE_KEYWORDS, "ImageType"}
    return next(iter(kinds)) if len(kinds) == 1 and all(kind in known for kind in next(iter(kinds))) else ()


def _phase_kinds(series: Series) -> tuple[str, ...]:
    """What tells the phases of a series apart, such as EchoTime."""
    return _kinds_of(series.stack.phase_names) if series.stack is not None else ()


def _num_phases(series: Series) -> int:
    return len(series.stack.frames) if series.stack is not None else 0


def _label_notes(
    firsts: Sequence[Series], volumes: Sequence[Series], objects: Mapping[str, Sequence[Header]], channel: str
) -> tuple[str, ...]:
    """What a person should know of labels: those that are united, and those that are left aside."""
    used = {series.key for series in firsts}
    notes = [
        f"{case_id_of(series)}: {len(objects[series.key])} structure sets or segmentations are taken together"
        for series in firsts
        if len(objects.get(series.key, ())) > 1
    ]
    elsewhere = Counter(series.first.modality for series in volumes if series.key not in used and series.key in objects)
    if elsewhere:
        counts = " and ".join(f"{count} {modality}" for modality, count in sorted(elsewhere.items()))
        text = f"labels of {counts} series are not used, as cases are made of {channel}"
        notes.append(f"{text}; name the series that labels were drawn on first in --channels")
    patients, studies = ({getattr(one.first, key) for one in firsts} for key in ("patient_id", "study_uid"))
    if len(studies) > 1 and len(patients) == 1 and "" not in patients:
        text = "all cases carry the id of one patient"
        notes.append(f"{text}: if they are several patients, remove `patient` from the dataset")
    return tuple(notes)


def _default_channel(
    volumes: Sequence[Series], objects: Mapping[str, Sequence[Header]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The modality to take, and a note about the others."""
    labelled = [series for series in volumes if objects.get(series.key)]
    counts = Counter(series.first.modality for series in labelled or volumes)
    order = {modality: place for place, modality in enumerate(MODALITIES)}
    ranked = sorted(counts, key=lambda modality: (-counts[modality], order.get(modality, len(order))))
    if not ranked:
        return (MODALITIES[0],), ()
    others = ", ".join(f"{modality} ({counts[modality]} series)" for modality in ranked[1:])
    text = f"{ranked[0]} is taken ({counts[ranked[0]]} series); {others} left out: choose with --channels"
    return (ranked[0],), ((text,) if others else ())


def _partner(first: Series, volumes: Sequence[Series], channel: str) -> Series:
    """The series of another channel that lies in the same space as the first: same frame of reference, same study.

    Raises:
        InputError: There is none, or there are several.
    """
    if not first.first.frame_of_reference:
        raise InputError(f"{first.name} has no frame of reference, so no other series is known to lie where it does")
    same_space = [
        series
        for series in volumes
        if series is not first and matches(series, channel) and _is_same_space(series, first)
    ]
    if not same_space:
        raise InputError(f"{first.name}: no series of its study and frame of reference is of channel {channel}")
    if len({series.first.series_uid or series.key for series in same_space}) == 1:
        # Copies of one series.
        return max(same_space, key=lambda series: shared_parts(series.first, first.first))
    if len(same_space) > 1:
        names = ", ".join(series.name for series in same_space[:3])
        fix = "choose one by a pattern for its SeriesDescription"
        raise InputError(f"{first.name}: {len(same_space)} series are of channel {channel} ({names}): {fix}")
    return same_space[0]


def _is_same_space(series: Series, first: Series) -> bool:
    """Whether two series lie in the same space of the same patient and, where it can be told, at the same place."""
    mine, other = first.first, series.first
    if (mine.frame_of_reference, mine.study_uid, mine.patient_id) != (
        other.frame_of_reference,
        other.study_uid,
        other.patient_id,
    ):
        return False
    return first.stack is None or series.stack is None or boxes_touch(first.stack.grid, series.stack.grid)


def _check_readable(series: Sequence[Series]) -> None:
    for one in series:
        if one.stack is None:
            raise InputError(f"{one.name}: {refusal_of(one)}")
        if any(not _is_text(str(path)) for path in one.paths):
            raise InputError(f"{one.name}: the name of a file or folder is not valid text (UTF-8), rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _patients(firsts: Sequence[Series]) -> dict[str, str]:
    """By key of a series: a name for its patient, made of the patient's first series."""
    groups: dict[str, list[str]] = defaultdict(list)
    for series in firsts:
        groups[series.first.patient_id or series.first.study_uid or series.key].append(series.key)
    return {key: f"patient_{min(keys)}" for keys in groups.values() for key in keys}
