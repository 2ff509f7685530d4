"""Which prediction belongs to which reference label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.datasets.dataset import Dataset, is_dataset_folder, read_dataset
from pipeline.datasets.splits import patients_by_pattern
from pipeline.errors import InputError
from pipeline.io.nifti import is_nifti_name, strip_nifti_suffix
from pipeline.log import get_logger

LISTED_CASES = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One case's prediction and reference label."""

    case_id: str
    prediction: Path
    reference: Path


@dataclass(frozen=True, kw_only=True)
class References:
    """Reference labels and what their values mean.

    Attributes:
        paths: Label file by case id.
        labels: Value by class name, background included; None when only the files are known.
        ignore_value: Value of voxels that are not scored.
        patients: Patient by case id, where a dataset tells.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, int] | None = None
    ignore_value: int | None = None
    patients: dict[str, str] = field(default_factory=dict)

    def patients_of(self, case_ids: Collection[str], pattern: str = "") -> dict[str, str]:
        """Patient by case id: by the pattern, as in training, if there is one; otherwise as the dataset tells.

        Raises:
            InputError: The pattern is none, or does not fit every case.
        """
        return patients_by_pattern(sorted(case_ids), pattern) if pattern else self.patients


def find_references(path: Path) -> References:
    """Labels from a folder of NIfTI files named by case, or from a dataset.

    A label folder that lies in a dataset, such as `labelsTr`, takes its class names and its ignore value from there.

    Raises:
        InputError: It is neither.
    """
    if path.is_dir() and not is_dataset_folder(path) and any(is_nifti_name(item.name) for item in path.iterdir()):
        if not (path.resolve().parent / "dataset.json").is_file():
            return References(paths=list_volumes(path))
        around = read_dataset(path.resolve().parent)
        paths, patients = list_volumes(path), _patients(around)
        return References(paths=paths, labels=around.labels, ignore_value=around.ignore_value, patients=patients)
    dataset = read_dataset(path)
    paths = {case.case_id: case.label for case in (*dataset.cases, *dataset.test_cases) if case.label is not None}
    patients = _patients(dataset)
    return References(paths=paths, labels=dataset.labels, ignore_value=dataset.ignore_value, patients=patients)


def _patients(dataset: Dataset) -> dict[str, str]:
    return {case.case_id: case.patient for case in (*dataset.cases, *dataset.test_cases) if case.patient}


def list_volumes(folder: Path) -> dict[str, Path]:
    """NIfTI files of a folder by their name without suffix, sorted.

    Raises:
        InputError: It is no folder, or holds none.
    """
    if not folder.is_dir():
        raise InputError("is no folder", where=folder, fix="Give the folder that holds one NIfTI file per case")
    files = sorted(item for item in folder.iterdir() if is_nifti_name(item.name))
    if not files:
        fix = "Give the folder that holds one per case (of DICOM series predict writes them with --format both)"
        raise InputError("holds no NIfTI file", where=folder, fix=fix)
    return {strip_nifti_suffix(item.name): item for item in files}


def pair_cases(
    predictions: Mapping[str, Path], references: Mapping[str, Path], case_ids: Collection[str]
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of the wanted cases, and why others of them have none.

    Predictions of other cases are not scored, which the log says.
    """
    pairs, missing = [], {}
    for case_id in sorted(case_ids):
        if case_id not in references:
            missing[case_id] = "has no reference label"
        elif case_id not in predictions:
            missing[case_id] = "has no prediction"
        else:
            pairs.append(Pair(case_id=case_id, prediction=predictions[case_id], reference=references[case_id]))
    extra = sorted(set(predictions) - set(case_ids))
    if extra:
        shown = ", ".join(extra[:LISTED_CASES]) + (" ..." if len(extra) > LISTED_CASES else "")
        get_logger("evaluate").info("%d prediction(s) are not scored: %s", len(extra), shown)
    return pairs, missing
