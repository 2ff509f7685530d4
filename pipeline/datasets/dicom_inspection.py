"""A tree of DICOM files for a person and for a program: every series, what labels it, and every problem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.datasets.dicom_cases import case_id_of
from pipeline.datasets.dicom_dataset import WrittenDataset
from pipeline.datasets.dicom_objects import num_in_space, objects_of, unplaced_objects
from pipeline.datasets.dicom_scan import Scan
from pipeline.geometry import axis_codes, format_shape, format_spacing
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.series import Series

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, eq=False)
class DicomInspection:
    """What lies in a tree, and the dataset that was made of it on request.

    Attributes:
        scan: The tree.
        written: The dataset; None when none was asked for.
        as_json: How it is to be shown.
    """

    scan: Scan
    written: WrittenDataset | None = None
    as_json: bool = False


def series_facts(scan: Scan) -> list[dict[str, Any]]:
    """One mapping for each series, of plain values; nothing in it tells a patient."""
    objects, identity = objects_of(scan), scan.identity
    return [_facts(series, objects.get(series.key, ()), scan.root, identity) for series in scan.series]


def inspection_facts(inspection: DicomInspection) -> dict[str, Any]:
    """The whole inspection as plain values."""
    scan, written = inspection.scan, inspection.written
    facts: dict[str, Any] = {
        "series": series_facts(scan),
        "problems": list(tree_problems(scan)),
        "num_other_files": scan.num_other_files,
    }
    if written is not None:
        facts["dataset"] = {
            "path": str(written.path),
            "labels": {label_class.name: label_class.value for label_class in written.classes},
            "num_training": written.num_training,
            "num_test": written.num_test,
            "failures": written.failures,
            "notes": list(written.notes),
        }
    return facts


def _facts(series: Series, labels: Sequence[Header], root: Path, identity: frozenset[str]) -> dict[str, Any]:
    first, stack = series.first, series.stack
    return {
        "case_id": case_id_of(series),
        "folder": hide(_place(first.path.parent, root), identity),
        "number": hide(first.series_number, identity),
        "description": hide(first.description, identity),
        "modality": first.modality,
        "num_files": len(series.headers),
        "size": list(stack.grid.shape) if stack else None,
        "spacing": [round(size, 6) for size in stack.grid.spacing] if stack else None,
        "orientation": axis_codes(stack.grid.affine) if stack else None,
        "transfer_syntaxes": sorted({_syntax_name(header.transfer_syntax) for header in series.headers}),
        "phases": [name for name in stack.phase_names if name] if stack else [],
        "labels": list(dict.fromkeys(hide(name, identity) for label in labels for name in label.structure_names)),
        "left_out": series.left_out,
        "problems": list(series.problems),
        "notes": list(series.notes),
    }


def tree_problems(scan: Scan) -> Iterator[str]:
    """What is wrong beside the series themselves."""
    identity = scan.identity
    for path, reason in scan.unreadable:
        yield f"{hide(_place(path, scan.root), identity)} {reason}"
    for label in unplaced_objects(scan):
        names = ", ".join(hide(name, identity) for name in label.structure_names[:3])
        place = hide(_place(label.path, scan.root), identity)
        several = num_in_space(scan, label)
        why = f"names no series, and {several} lie in its space" if several else "refers to a series that is not here"
        yield f"{place} ({label.modality}: {names}) {why}"


def describe_dicom(inspection: DicomInspection) -> RenderableType:
    """The inspection as a table with the problems below it."""
    from rich.console import Group
    from rich.text import Text

    facts = inspection_facts(inspection)
    # As plain text: what files say may look like markup.
    lines = [Text(line) for line in (*_problem_lines(facts), *_dataset_lines(inspection.written))]
    num_volumes = sum(one["size"] is not None for one in facts["series"])
    text = f"{len(facts['series'])} series, {num_volumes} of them volumes; {facts['num_other_files']} other files"
    return Group(_table(facts["series"]), text, *lines)


def _table(series: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in (
        "case",
        "modality",
        "description",
        "files",
        "size",
        "spacing mm",
        "axes",
        "phases",
        "labels",
        "encoding",
    ):
        table.add_column(column, overflow="fold")
    for one in series:
        cells = (
            one["case_id"].removeprefix("case_"),
            one["modality"],
            one["description"],
            str(one["num_files"]),
            format_shape(one["size"]) if one["size"] else f"({one['left_out'] or 'refused'})",
            format_spacing(one["spacing"]) if one["spacing"] else "",
            one["orientation"] or "",
            str(len(one["phases"])) if one["phases"] else "",
            ", ".join(one["labels"]),
            ", ".join(one["transfer_syntaxes"]),
        )
        table.add_row(*map(Text, cells))
    return table


def _problem_lines(facts: dict[str, Any]) -> list[str]:
    series = facts["series"]
    refused = [
        f"  {one['case_id']} in {one['folder']}: {'; '.join(one['problems'])}" for one in series if one["problems"]
    ]
    noted = [f"  {one['case_id']} in {one['folder']}: {note}" for one in series for note in one["notes"]]
    others = [f"  {problem}" for problem in facts["problems"]]
    return [f"problems: {len(refused) + len(others) or 'none'}", *refused, *others, *noted]


def _dataset_lines(written: WrittenDataset | None) -> list[str]:
    if written is None:
        return []
    classes = ", ".join(f"{label_class.name} = {label_class.value}" for label_class in written.classes)
    head = f"{written.path}: {written.num_training} training cases, {written.num_test} test cases; labels: {classes}"
    return [head, *(f"  {note}" for note in written.notes)]


def _place(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _syntax_name(uid: str) -> str:
    """A short name of a transfer syntax, or its UID where nobody knows it."""
    from pydicom.uid import UID

    name = UID(uid).name if uid else "unknown"
    return name.split(",")[0].split(" (")[0].replace(" Image Compression", "").replace(" Little Endian", " LE")
