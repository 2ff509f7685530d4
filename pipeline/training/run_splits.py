"""The folds that runs train by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import read_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Splits, check_splits, make_splits, patients_by_pattern
from pipeline.errors import InputError
from pipeline.run_files import RunFiles
from pipeline.store import CaseStore


def splits_of_run(store: CaseStore, config: TrainConfig) -> Splits:
    """The folds saved in the run, else new ones; checked against the store either way.

    Raises:
        InputError: They do not fit the cases of the store, or cannot be made of them.
    """
    if config.patient_pattern:
        patients = patients_by_pattern(store.case_ids, config.patient_pattern)
    else:
        patients = {case_id: store.record(case_id).patient or case_id for case_id in store.case_ids}
    saved = RunFiles(Path(config.run_dir)).splits
    if saved.is_file():
        splits = read_artifact(saved, Splits)
    else:
        splits = make_splits(patients, num_folds=config.num_folds, seed=config.seed)
    check_splits(splits, patients)
    return splits


def common_splits(runs: Sequence[RunFiles], *, fix: str) -> Splits:
    """The folds by which all runs of a work folder are trained.

    Args:
        runs: One or more.
        fix: What to do where they are not the same.

    Raises:
        InputError: Some of them were trained by other folds than the first.
    """
    splits = [read_artifact(run.splits, Splits) for run in runs]
    others = [run.path.name for run, each in zip(runs, splits, strict=True) if each != splits[0]]
    if others:
        raise InputError(
            f"other folds than {runs[0].path.name}: {', '.join(others)}",
            where=runs[0].path.parent,
            fix=fix,
        )
    return splits[0]
