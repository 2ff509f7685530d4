"""A dataset and what is wrong with it, for a person, for a program, and for a command that must decide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import InspectConfig
from pipeline.datasets.case import Dataset
from pipeline.datasets.dataset import LOOKED_FOR, TABLE_SUFFIXES, read_dataset
from pipeline.datasets.dicom_cases import parse_channels
from pipeline.datasets.dicom_classes import parse_classes
from pipeline.datasets.dicom_dataset import is_made_from_dicom, write_dicom_dataset
from pipeline.datasets.dicom_inspection import DicomInspection, describe_dicom, inspection_facts
from pipeline.datasets.dicom_scan import is_volume_dataset, scan_folder
from pipeline.datasets.examination import Examined
from pipeline.datasets.integrity import Problem, find_problems
from pipeline.datasets.msd import DATASET_FILE
from pipeline.errors import CasesFailedError, InputError
from pipeline.log import get_logger

if TYPE_CHECKING:
    from rich.console import RenderableType

MAX_CASES_SHOWN = 40
REPAIR_FIX = "Repair them, or leave them out with --skip_bad_cases"
DECLARED_FIX = "These are all cases: look first at what the dataset declares (channels, labels, file names)"


@dataclass(frozen=True)
class Inspection:
    """What a dataset holds and what is wrong with it.

    Attributes:
        dataset: As read.
        problems: All of them, by case id.
        as_json: How `describe_inspection` shows it.
    """

    dataset: Dataset
    problems: tuple[Problem, ...]
    as_json: bool = False

    @property
    def exit_code(self) -> int:
        """Of the command: 3 where cases have problems that keep them from being used."""
        return CasesFailedError.exit_code if any(not problem.is_warning for problem in self.problems) else 0


def inspect_path(config: InspectConfig, *, num_workers: int) -> Inspection | DicomInspection:
    """Look at a dataset, or at a folder of DICOM files.

    Raises:
        InputError: It is neither, or `write_dataset` is asked of a dataset.
    """
    path = Path(config.path)
    # A dataset that was written into the tree that it is made of is written anew.
    is_tree = bool(config.write_dataset) and is_made_from_dicom(path / DATASET_FILE)
    is_listed = is_volume_dataset(path) or path.suffix.lower() in (".json", *TABLE_SUFFIXES)
    if (is_listed and not is_tree) or not path.exists():
        if config.write_dataset:
            raise InputError("is a dataset already", where=path, fix="--write_dataset takes a folder of DICOM files")
        return inspect_dataset(config.path, num_workers=num_workers, as_json=config.json)
    return _inspect_dicom(path, config, num_workers=num_workers)


def _inspect_dicom(path: Path, config: InspectConfig, *, num_workers: int) -> DicomInspection:
    for name in ("channels", "classes"):
        if getattr(config, name) and not config.write_dataset:
            raise InputError(
                "says what goes into a dataset", where=name, fix="Give --write_dataset dataset.json as well"
            )
    classes = parse_classes(config.classes)
    scan = scan_folder(path, num_workers=num_workers, allow_tilt=config.allow_tilt)
    if not (scan.series or scan.label_objects or scan.unreadable):
        raise InputError("holds neither a dataset nor DICOM files", where=path, fix=LOOKED_FOR)
    if not config.write_dataset:
        return DicomInspection(scan, as_json=config.json)
    written = write_dicom_dataset(
        scan,
        Path(config.write_dataset),
        channels=parse_channels(config.channels),
        classes=classes,
        threshold=config.threshold,
        allow_tilt=config.allow_tilt,
    )
    return DicomInspection(scan, written, as_json=config.json)


def inspect_dataset(path: str, *, num_workers: int, as_json: bool = False) -> Inspection:
    """Read a dataset and check every case in `num_workers` processes."""
    dataset = read_dataset(path)
    return Inspection(dataset, find_problems(dataset, num_workers=num_workers), as_json)


def describe_inspection(inspection: Inspection | DicomInspection) -> str | RenderableType:
    """The inspection as text or a table for a person, or as JSON for a program."""
    if isinstance(inspection, DicomInspection):
        return json.dumps(inspection_facts(inspection), indent=1) if inspection.as_json else describe_dicom(inspection)
    return _describe_dataset(inspection)


def _describe_dataset(inspection: Inspection) -> str:
    dataset, problems = inspection.dataset, inspection.problems
    if inspection.as_json:
        facts = {"name": dataset.name, "channels": dataset.channel_names, "labels": dataset.labels}
        cases = [case.case_id for case in dataset.cases]
        return json.dumps({**facts, "cases": cases, "problems": [asdict(problem) for problem in problems]}, indent=1)
    lines = [
        f"{dataset.name}: {len(dataset.cases)} training cases, {len(dataset.test_cases)} test cases",
        f"channels: {', '.join(dataset.channel_names)}",
        f"labels: {', '.join(f'{name} = {value}' for name, value in dataset.labels.items())}",
        f"problems: {len(problems) or 'none'}",
    ]
    return "\n".join([*lines, *(f"  {_describe_problem(problem)}" for problem in problems)])


def _describe_problem(problem: Problem) -> str:
    return f"{problem.case_id}: {problem.message}{' (a warning)' if problem.is_warning else ''}"


def find_bad_cases(
    dataset: Dataset, examined: Sequence[Examined] | None = None, *, num_workers: int, skip: bool
) -> dict[str, str]:
    """Reasons by case id, all problems of a case in one line; what is only a warning goes to the log.

    Args:
        dataset: The dataset.
        examined: What `examine_cases` found already; the cases are read when it is left out.
        num_workers: Processes.
        skip: Whether the caller goes on without bad cases.

    Raises:
        InputError: There are bad cases and `skip` is off; all are listed.
    """
    reasons: dict[str, str] = {}
    for problem in find_problems(dataset, num_workers=num_workers, examined=examined):
        if problem.is_warning:
            get_logger("inspect").warning("%s: %s", problem.case_id, problem.message)
            continue
        reasons[problem.case_id] = "; ".join(filter(None, [reasons.get(problem.case_id), problem.message]))
    if reasons and not skip:
        shown = "".join(f"\n  {case}: {reason}" for case, reason in list(reasons.items())[:MAX_CASES_SHOWN])
        more = len(reasons) - MAX_CASES_SHOWN
        rest = f"\n  and {more} more: see `voxfit inspect`" if more > 0 else ""
        raise InputError(
            f"{len(reasons)} case(s) have problems:{shown}{rest}",
            where=dataset.name,
            fix=REPAIR_FIX if len(reasons) < len(dataset.cases) else DECLARED_FIX,
        )
    return reasons
