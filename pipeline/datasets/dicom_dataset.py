"""A tree of DICOM series as a dataset: `dataset.json` in Decathlon layout, and a small reference file per series."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import write_text
from pipeline.datasets.class_names import BACKGROUND
from pipeline.datasets.dicom_cases import DicomCase, DicomCases, find_dicom_cases, shown_root
from pipeline.datasets.dicom_classes import (
    CLASSES_FORM,
    StructureName,
    class_notes,
    classes_of,
    names_of,
    objects_with,
    some,
)
from pipeline.datasets.dicom_scan import Scan
from pipeline.errors import InputError
from pipeline.io.dicom.references import (
    SERIES_SUFFIX,
    STRUCTURES_SUFFIX,
    write_series_file,
    write_structures_file,
)
from pipeline.io.dicom.structures import LabelClass

MADE_FROM = "made_from"
DICOM = "dicom"
Overlap = Literal["later", "smaller"]


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
        classes: Which structures make which class, the later one wins where they overlap; none makes a class of every
            name that occurs but for outlines of the body and markers, and the smaller one wins.
        threshold: Fraction from which on a voxel of a fractional segmentation is inside.
        allow_tilt: Resample series whose slices are shifted evenly against each other.

    Raises:
        InputError: There is nothing to write, or something else stands at `path`.
    """
    _check_ours(path)
    found = find_dicom_cases(scan, channels)
    if not found.cases:
        reasons = "; ".join(dict.fromkeys(found.failures.values()))
        raise InputError(f"holds no case that can be read ({reasons})", where=shown_root(scan))
    names = names_of(found)
    chosen = tuple(classes) or classes_of(names)
    overlap: Overlap = "later" if classes else "smaller"
    if not any(objects_with(case, chosen) for case in found.cases):
        what = "holds no case with a label of these classes" if names else "holds no case with a label"
        raise InputError(what, where=shown_root(scan), fix=_help(found, names))
    label_options: dict[str, Any] = {"classes": chosen, "overlap": overlap, "threshold": threshold}
    entries = [_write_case(case, path, label_options, allow_tilt=allow_tilt) for case in found.cases]
    training = [entry for entry in entries if "label" in entry]
    tests = [entry for entry in entries if "label" not in entry]
    content = {
        "name": path.stem,
        MADE_FROM: DICOM,
        "channel_names": {str(index): name for index, name in enumerate(_channel_names(found))},
        "labels": {BACKGROUND: 0} | {label_class.name: label_class.value for label_class in chosen},
        "training": training,
        "test": tests,
    }
    _remove_others(path.with_name(f"{path.stem}_series"), entries)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return WrittenDataset(
        path=path,
        classes=chosen,
        num_training=len(training),
        num_test=len(tests),
        failures=found.failures,
        notes=(*found.notes, *class_notes(found, names, chosen, is_default=not classes)),
    )


def _remove_others(folder: Path, entries: Sequence[Mapping[str, object]]) -> None:
    """Remove references of an earlier tree: they hold the places of files that may be gone for a reason."""
    ids = {str(entry["case_id"]) for entry in entries}
    for item in folder.iterdir():
        for suffix, length in ((SERIES_SUFFIX, len("_0000")), (STRUCTURES_SUFFIX, 0)):
            if item.name.endswith(suffix):
                stem = item.name[: -len(suffix)]
                if stem[: len(stem) - length] not in ids:
                    item.unlink()


def _check_ours(path: Path) -> None:
    """Refuse to replace a dataset file that was not made here."""
    if path.suffix != ".json":
        raise InputError("must end in .json", where=path)
    if path.exists() and not is_made_from_dicom(path):
        raise InputError("is another file, which would be lost", where=path, fix="Give another name")


def is_made_from_dicom(path: Path) -> bool:
    """Whether a file is a dataset that `write_dicom_dataset` has written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(content, dict) and content.get(MADE_FROM) == DICOM


def _help(found: DicomCases, names: Mapping[str, StructureName]) -> str:
    """What there is where no structure is of the classes that are wanted."""
    if names:
        found_names = some(list(dict.fromkeys(name.shown for name in names.values())))
        return f"Names found: {found_names}. {CLASSES_FORM}"
    return ". ".join(("No structure set or segmentation refers to its series", *found.notes))


def _channel_names(found: DicomCases) -> tuple[str, ...]:
    """The channels as chosen; the phases of the series where a single one holds several."""
    stack = found.cases[0].series[0].stack
    if len(found.channels) == 1 and stack is not None and len(stack.frames) > 1:
        return tuple(stack.phase_names)
    return found.channels


def _write_case(
    case: DicomCase, path: Path, label_options: Mapping[str, Any], *, allow_tilt: bool
) -> dict[str, object]:
    """Write the references of a case; returns its entry in the list of cases."""
    folder = path.with_name(f"{path.stem}_series")
    files = [folder / f"{case.case_id}_{index:04d}{SERIES_SUFFIX}" for index in range(len(case.series))]
    for file, series in zip(files, case.series, strict=True):
        write_series_file(file, series.paths, allow_tilt=allow_tilt)
    images = [f"{folder.name}/{file.name}" for file in files]
    entry: dict[str, object] = {"case_id": case.case_id, "patient": case.patient}
    entry["image"] = images if len(images) > 1 else images[0]
    objects = [label.path for label in objects_with(case, label_options["classes"])]
    if objects:
        label_file = folder / f"{case.case_id}{STRUCTURES_SUFFIX}"
        write_structures_file(label_file, files[0], objects, **label_options)
        entry["label"] = f"{folder.name}/{label_file.name}"
    return entry
