"""A tree of DICOM series as a dataset: `dataset.json` in Decathlon layout, and a small reference file per series."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.datasets.class_names import BACKGROUND
from pipeline.datasets.dicom_cases import DicomCase, DicomCases, find_dicom_cases
from pipeline.datasets.dicom_scan import Scan
from pipeline.errors import InputError
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.references import (
    SERIES_SUFFIX,
    STRUCTURES_SUFFIX,
    write_series_file,
    write_structures_file,
)
from pipeline.io.dicom.structures import LabelClass, class_index

MADE_FROM = "made_from"
DICOM = "dicom"


@dataclass(frozen=True, kw_only=True)
class WrittenDataset:
    """What became of a tree.

    Attributes:
        path: The `dataset.json`.
        classes: As written.
        num_training, num_test: Cases with and without a label.
        failures: Reason by id of cases that were left out.
        notes: What a person should know of the choices made.
    """

    path: Path
    classes: tuple[LabelClass, ...]
    num_training: int
    num_test: int
    failures: dict[str, str]
    notes: tuple[str, ...]


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
            raise InputError(f"{part!r} has no name", where="classes", fix="Write class=pattern|pattern, class=pattern")
        found.append(LabelClass(name=name, value=value, patterns=names))
    if len({label_class.name for label_class in found}) < len(found):
        raise InputError("a class is named twice", where="classes", fix="Separate its patterns with |")
    return tuple(found)


def write_dicom_dataset(
    scan: Scan,
    path: Path,
    *,
    channels: Sequence[str] = (),
    classes: Sequence[LabelClass] = (),
    threshold: float = 0.5,
    allow_tilt: bool = False,
) -> WrittenDataset:
    """Write a dataset of a tree; series with a label are for training, the others for testing.

    The references lie in the folder `<name>_series` beside the dataset. They hold the places of the files; neither they
    nor any id holds what tells a patient.

    Args:
        scan: The tree.
        path: The `dataset.json` to write.
        channels: See `find_dicom_cases`.
        classes: Which structures make which class; none makes a class of every name that occurs.
        threshold: Fraction from which on a voxel of a fractional segmentation is inside.
        allow_tilt: Resample series whose slices are shifted evenly against each other.

    Raises:
        InputError: There is nothing to write, or something else stands at `path`.
    """
    _check_ours(path)
    found = find_dicom_cases(scan, channels)
    if not found.cases:
        reasons = "; ".join(found.failures.values())
        raise InputError(f"holds no case that can be read ({reasons})", where=scan.root.name)
    chosen = tuple(classes) or _classes_of(found)
    entries = [_write_case(case, path, chosen, threshold, allow_tilt) for case in found.cases]
    training = [entry for entry in entries if "label" in entry]
    if not training:
        raise InputError("holds no case with a label of these classes", where=scan.root.name, fix=_names_found(found))
    tests = [entry for entry in entries if "label" not in entry]
    content = {
        "name": path.stem,
        MADE_FROM: DICOM,
        "channel_names": {str(index): name for index, name in enumerate(_channel_names(found))},
        "labels": {BACKGROUND: 0} | {label_class.name: label_class.value for label_class in chosen},
        "training": training,
        "test": tests,
    }
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return WrittenDataset(
        path=path,
        classes=chosen,
        num_training=len(training),
        num_test=len(tests),
        failures=found.failures,
        notes=found.notes,
    )


def _check_ours(path: Path) -> None:
    """Refuse to replace a dataset file that was not made here."""
    if path.suffix != ".json":
        raise InputError("must end in .json", where=path)
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        content = None
    if not isinstance(content, dict) or content.get(MADE_FROM) != DICOM:
        raise InputError("is another file, which would be lost", where=path, fix="Give another name")


def _classes_of(found: DicomCases) -> tuple[LabelClass, ...]:
    """A class for every name of a structure, in the order of the alphabet; names that differ in case are one."""
    names: dict[str, str] = {}
    for case in found.cases:
        for label in case.label_objects:
            for name in label.structure_names:
                shown = hide(name.strip(), label.identity)
                if shown and shown.casefold() != BACKGROUND:
                    names.setdefault(shown.casefold(), shown)
    ordered = [names[key] for key in sorted(names)]
    return tuple(LabelClass(name=name, value=value, patterns=(name,)) for value, name in enumerate(ordered, start=1))


def _names_found(found: DicomCases) -> str:
    names = [label_class.name for label_class in _classes_of(found)]
    return f"Names found: {', '.join(names[:10])}" if names else "No structure set or segmentation refers to them"


def _channel_names(found: DicomCases) -> tuple[str, ...]:
    """The channels as chosen; the phases of the series where a single one holds several."""
    stack = found.cases[0].series[0].stack
    if len(found.channels) == 1 and stack is not None and len(stack.frames) > 1:
        return tuple(stack.phase_names)
    return found.channels


def _write_case(
    case: DicomCase, path: Path, classes: Sequence[LabelClass], threshold: float, allow_tilt: bool
) -> dict[str, object]:
    """Write the references of a case; returns its entry in the list of cases."""
    folder = path.with_name(f"{path.stem}_series")
    files = [folder / f"{case.case_id}_{index:04d}{SERIES_SUFFIX}" for index in range(len(case.series))]
    for file, series in zip(files, case.series, strict=True):
        write_series_file(file, series.paths, allow_tilt=allow_tilt)
    images = [f"{folder.name}/{file.name}" for file in files]
    entry: dict[str, object] = {"case_id": case.case_id, "patient": case.patient}
    entry["image"] = images if len(images) > 1 else images[0]
    labels = [
        label
        for label in case.label_objects
        if any(class_index(name, classes) is not None for name in label.structure_names)
    ]
    if labels:
        label_file = folder / f"{case.case_id}{STRUCTURES_SUFFIX}"
        objects = [label.path for label in labels]
        write_structures_file(label_file, files[0], objects, classes, threshold=threshold)
        entry["label"] = f"{folder.name}/{label_file.name}"
    return entry
