"""The classes of a tree of DICOM series: as a person names them, or one for every name of a structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.datasets.class_names import BACKGROUND, IGNORE
from pipeline.datasets.dicom_cases import DicomCase, DicomCases
from pipeline.errors import InputError
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.privacy import HIDDEN, SHORTEST_NUMBER, hide, pattern_without
from pipeline.io.dicom.structures import LabelClass, class_index

CLASSES_FORM = 'Write --classes "tumour=GTV*|Mass,liver=Liver", where * stands for any letters and ? for one'
MOST_NAMES = 10


def parse_classes(text: str) -> tuple[LabelClass, ...]:
    """Classes from `tumour=GTV*|Mass, liver=Liver`; the value of a class is its place in the list.

    Raises:
        InputError: A part has no name or no pattern.
    """
    found = []
    for value, part in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        name, _, patterns = (piece.strip() for piece in part.partition("="))
        names = tuple(filter(None, (pattern.strip() for pattern in patterns.split("|")))) or (name,)
        if not name:
            raise InputError(f"{part!r} has no name", where="classes", fix=CLASSES_FORM)
        if name.casefold() == BACKGROUND:
            fix = "What belongs to no class is background already"
            raise InputError(f"{name} is no class of its own", where="classes", fix=fix)
        found.append(LabelClass(name=name, value=value, patterns=names))
    names_found = [label_class.name.casefold() for label_class in found]
    double = next((name for name in names_found if names_found.count(name) > 1), "")
    if double:
        raise InputError(f"{double} is named twice", where="classes", fix="Separate the patterns of a class with |")
    return tuple(found)


@dataclass(frozen=True)
class StructureName:
    """The name of a structure.

    Attributes:
        shown: Without what tells the patient.
        pattern: That the name fits, and that does not tell the patient either.
    """

    shown: str
    pattern: str


def names_of(found: DicomCases) -> dict[str, StructureName]:
    """Names of structures, by the name in small letters, sorted, without background, outlines of bodies and markers."""
    names: dict[str, StructureName] = {}
    for case in found.cases:
        for label in case.label_objects:
            identity = _telling(case.series[0].identity | label.identity)
            for name in map(str.strip, label.structure_names):
                if name and name.casefold() != BACKGROUND and name not in label.outline_names:
                    names.setdefault(name.casefold(), _structure_name(name, identity))
    return {key: names[key] for key in sorted(names)}


def _telling(identity: frozenset[str]) -> frozenset[str]:
    """Without numbers of few digits: where a patient is number 12, "rib 12" must stay the class that others have."""
    return frozenset(text for text in identity if not (text.isdigit() and len(text) < SHORTEST_NUMBER))


def _structure_name(name: str, identity: frozenset[str]) -> StructureName:
    words = "".join(letter if letter.isprintable() else " " for letter in hide(name, identity)).split()
    return StructureName(" ".join(words), pattern_without(name, identity))


def classes_of(names: Mapping[str, StructureName]) -> tuple[LabelClass, ...]:
    """A class for every name of a structure, in the order of the alphabet; names that differ in case are one.

    Where a name tells the patient, the class goes by what is left of it, and names that leave the same are one class.
    Such classes come last, so that their patterns take no structure of another class.
    """
    patterns: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names.values(), key=lambda name: HIDDEN in name.shown):
        patterns[name.shown].append(name.pattern)
    return tuple(
        LabelClass(name=shown, value=value, patterns=tuple(own))
        for value, (shown, own) in enumerate(patterns.items(), start=1)
    )


def objects_with(case: DicomCase, classes: Sequence[LabelClass]) -> tuple[Header, ...]:
    """The structure sets and segmentations of a case that hold a structure of any of the classes."""
    return tuple(
        label
        for label in case.label_objects
        if any(class_index(name, classes) is not None for name in label.structure_names)
    )


def class_notes(
    found: DicomCases, names: Mapping[str, StructureName], classes: Sequence[LabelClass], *, is_default: bool
) -> tuple[str, ...]:
    """What a person should know: names of no class, classes without a name or in some cases only, and who wins."""
    taken = {name: class_index(name, classes) for name in names}
    left = [names[name].shown for name, index in taken.items() if index is None]
    empty = [one.name for index, one in enumerate(classes) if index not in taken.values()]
    notes = []
    if left:
        notes.append(f"structures of no class, left out: {some(left)}")
    if empty:
        notes.append(f"classes that no structure belongs to: {some(empty)}")
    if any(HIDDEN in one.name for one in classes):
        notes.append(f"what tells a patient in the name of a structure is {HIDDEN} in the name of its class")
    if any(one.name.casefold() == IGNORE for one in classes):
        notes.append("voxels of the class ignore are neither trained on nor scored")
    if is_default and len(classes) > 1:
        notes.append("where classes overlap the smaller one wins; --classes in an order lets the later one win")
    return (*notes, *_absence_notes(found, classes))


def _absence_notes(found: DicomCases, classes: Sequence[LabelClass]) -> list[str]:
    """Classes that some labels do not hold: there their voxels count as background, whether they were drawn or not."""
    labelled = [objects_with(case, classes) for case in found.cases]
    held = [
        {class_index(name, classes) for label in labels for name in label.structure_names}
        for labels in labelled
        if labels
    ]
    absent = [
        f"{one.name} in {count} of {len(held)}"
        for index, one in enumerate(classes)
        if 0 < (count := sum(index in own for own in held)) < len(held)
    ]
    return [f"classes that not every label holds, elsewhere they are background: {some(absent)}"] if absent else []


def some(names: Sequence[str]) -> str:
    """The first of many names, for messages."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
