"""The predictions of a cross-validation in one folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import atomic_path
from pipeline.evaluation.pairs import list_volumes


def gather_predictions(folders: Sequence[Path], target: Path) -> None:
    """Put the predictions of all folds into one folder, without a copy where the file system can link.

    What lies there of an earlier call and is in none of the folders any more is removed.
    """
    found = {path.name: path for folder in folders for path in list_volumes(folder).values()}
    for name, path in found.items():
        with atomic_path(target / name) as temporary:
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
    for path in list_volumes(target).values():
        if path.name not in found:
            path.unlink()
