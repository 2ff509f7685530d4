"""The predictions of a cross-validation in one folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import atomic_path
from pipeline.evaluation.pairs import list_volumes
from pipeline.io.nifti import strip_nifti_suffix
from pipeline.prediction_record import record_path


def gather_predictions(folders: Sequence[Path], target: Path) -> None:
    """Put the predictions of all folds and their records into one folder, without a copy where files can be linked.

    What lies there of an earlier call and is in none of the folders any more is removed.
    """
    found = {path.name: path for folder in folders for path in list_volumes(folder).values()}
    for name, path in found.items():
        _link(path, target / name)
        record = _record_of(path)
        if record.is_file():
            _link(record, _record_of(target / name))
        else:
            _record_of(target / name).unlink(missing_ok=True)
    for path in list_volumes(target).values():
        if path.name not in found:
            path.unlink()
            _record_of(path).unlink(missing_ok=True)


def _record_of(path: Path) -> Path:
    return record_path(path.parent, strip_nifti_suffix(path.name))


def _link(path: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
