"""The same cases for every side: any dataset that voxfit reads, as links in nnU-Net's raw layout, and one split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.dataset import read_dataset
from pipeline.datasets.splits import Fold, Splits, make_splits, patients_by_pattern

ENDING = ".nii.gz"
DATASET_NAME = "Dataset001_Peers"
FOLD = 0


@dataclass(frozen=True)
class Cases:
    """What every side trains on and is scored with.

    Attributes:
        source: The dataset as it was given.
        raw: All cases in nnU-Net's raw layout; `held_out` has the held-out ones only.
        splits: voxfit's folds; every side uses the first.
    """

    source: Dataset
    raw: Path
    held_out: Path
    splits: Splits

    @property
    def fold(self) -> Fold:
        """The fold that all sides train."""
        return self.splits.folds[FOLD]

    @property
    def num_classes(self) -> int:
        """Background included."""
        return len(self.source.labels)

    def files_of(self, case_id: str) -> tuple[list[str], str]:
        """Image files, one a channel, and the label file."""
        case = next(each for each in self.source.cases if each.case_id == case_id)
        return [str(path.resolve()) for path in case.images], str(case.label.resolve())


def make_cases(dataset: Path, work: Path, *, seed: int = 0, num_folds: int = 5, pattern: str = "") -> Cases:
    """Read the dataset, divide it as voxfit does, and lay the links."""
    source = read_dataset(dataset)
    _check(source)
    ids = [case.case_id for case in source.cases]
    patients = (
        patients_by_pattern(ids, pattern)
        if pattern
        else {case.case_id: case.patient or case.case_id for case in source.cases}
    )
    splits = make_splits(patients, num_folds=num_folds, seed=seed)
    raw, held_out = work / "raw" / DATASET_NAME, work / "held_out"
    write_raw(source, raw)
    apart = set(splits.folds[FOLD].validation)
    write_raw(replace(source, cases=tuple(case for case in source.cases if case.case_id in apart)), held_out)
    return Cases(source=source, raw=raw, held_out=held_out, splits=splits)


def write_raw(dataset: Dataset, folder: Path) -> None:
    """Lay links to the files of all cases, and write dataset.json."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in dataset.cases:
        for channel, image in enumerate(case.images):
            _link(folder / "imagesTr" / f"{case.case_id}_{channel:04d}{ENDING}", image)
        _link(folder / "labelsTr" / f"{case.case_id}{ENDING}", case.label)
    content = {
        "channel_names": {str(index): name for index, name in enumerate(dataset.channel_names)},
        "labels": dataset.labels,
        "numTraining": len(dataset.cases),
        "file_ending": ENDING,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target.resolve())


def _check(dataset: Dataset) -> None:
    """Refuse what nnU-Net's raw layout cannot hold as links."""
    if sorted(dataset.labels.values()) != list(range(len(dataset.labels))):
        raise SystemExit(f"error: label values must be 0, 1, 2 and so on, {dataset.name} has {dataset.labels}")
    wrong = [case.case_id for case in dataset.cases if not _is_linkable(case, dataset.channel_names)]
    if wrong:
        raise SystemExit(f"error: every case needs a {ENDING} file per channel and a label; not so: {wrong[:5]}")


def _is_linkable(case: Case, channels: Sequence[str]) -> bool:
    files = [*case.images, *([case.label] if case.label else [])]
    return len(files) == len(channels) + 1 and all(path.name.endswith(ENDING) for path in files)
