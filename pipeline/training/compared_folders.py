"""The folders that `voxfit compare` is given, and where its page may lie; nothing in them is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import InputError
from pipeline.evaluation.comparison import ComparedRun
from pipeline.run_files import WorkFiles
from pipeline.training.compared_folds import find_folds, read_folds
from pipeline.training.compared_run import read_run
from pipeline.training.run_folder import RunFolder

# What every page has, whatever its runs are called.
END_OF_TITLE = "voxfit compare</title>"


def read_compared_runs(folders: Sequence[str]) -> list[ComparedRun]:
    """Every run or cross-validation, under the shortest name that tells it from the others.

    Raises:
        InputError: A folder is given twice, holds no run, or a file in it cannot be read; folds are of other splits.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise InputError("is given twice", where=paths[index], fix="Give each run once")
    return [_read(path, name) for path, name in zip(paths, _short_names(resolved), strict=True)]


def _read(path: Path, name: str) -> ComparedRun:
    folds = [] if RunFolder(path).record.is_file() else find_folds(path)
    return read_folds(path, folds, name) if folds else read_run(path, name)


def check_page_place(out: Path, *, with_json: bool = False) -> None:
    """Refuse to write a page, and JSON of its name, among the files of a run or over files that are something else.

    Args:
        out: The page.
        with_json: Whether there is to be a JSON file beside it.

    Raises:
        InputError: They would lie in a run folder, at any depth, a file of that name is no comparison, or the JSON
            would be taken for the scores of a work folder.
    """
    if any(RunFolder(folder).record.is_file() for folder in out.resolve().parents):
        raise InputError("lies in a run folder", where=f"out {out}", fix="Give a place outside of it")
    if out.exists() and END_OF_TITLE not in out.read_text(encoding="utf-8", errors="replace"):
        raise InputError("is there already and is no comparison", where=out, fix="Give --out another name")
    beside, fix = out.with_suffix(".json"), "Give --out another name: the JSON takes that of the page"
    if with_json and beside.exists() and not _is_comparison(beside):
        raise InputError("is there already and is no comparison", where=beside, fix=fix)
    if with_json and beside.name == WorkFiles(out.parent).scores.name and find_folds(out.parent):
        raise InputError("is the place of the scores of these folds", where=beside, fix=fix)


def _is_comparison(path: Path) -> bool:
    """Whether `voxfit compare` wrote it, in this version or another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"runs", "pairs", "source_note"} <= content.keys()


def _short_names(paths: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as it takes to tell all of them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    for number in range(1, longest):
        names = ["/".join(path.parts[-number:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
