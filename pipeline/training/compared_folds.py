"""The folds in a work folder as one run of a comparison: every case by the training that held it out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.artifacts import read_artifact
from pipeline.datasets.splits import Splits
from pipeline.errors import InputError
from pipeline.evaluation.comparison import ComparedRun, ScoreSource, ScoreTable, mean_known
from pipeline.evaluation.metrics import Score
from pipeline.evaluation.summary import Metrics
from pipeline.run_files import FOLD, RunFiles, WorkFiles
from pipeline.training.compared_run import final_scores, read_run
from pipeline.training.run_splits import common_splits

COUNTS = ("epoch", "iteration", "optimizer_step", "samples")
SUMS = ("train_seconds", "validation_seconds")
PEAKS = ("peak_vram_bytes", "peak_ram_bytes")


def find_folds(folder: Path) -> list[RunFiles]:
    """The run folders of folds that were begun, in order; none where it is no work folder."""
    names = (re.fullmatch(rf"{FOLD}(0|[1-9]\d*)", path.name) for path in folder.glob(f"{FOLD}*"))
    runs = (WorkFiles(folder).run(fold) for fold in sorted(int(name[1]) for name in names if name))
    return [run for run in runs if run.record.is_file()]


def read_folds(folder: Path, folds: Sequence[RunFiles], name: str) -> ComparedRun:
    """The folds of a work folder as one; a single one as it is.

    Args:
        folder: The work folder.
        folds: As `find_folds` gives them, one or more.
        name: In the comparison.

    Raises:
        InputError: They are not the folds of one split, dataset and tolerance, or a file in them cannot be read.
    """
    runs = [read_run(files.path, files.path.name) for files in folds]
    splits = common_splits(folds, fix="Compare the run folders one by one")
    trained = {run.fold for run in runs}
    held_out = {fold: each.validation for fold, each in enumerate(splits.folds) if fold in trained}
    if len(held_out) < len(runs):
        what = "not a fold each: " + ", ".join(f"{run.name} holds out {_fold_text(run)}" for run in runs)
        raise InputError(what, where=folder, fix="Compare the run folders one by one")
    joined = runs[0] if len(runs) == 1 else _join(runs, folder, len(splits.folds))
    joined = replace(joined, name=name, folder=str(folder))
    if "final" in joined.scores or any(run.state != "finished" for run in runs):
        return joined
    own = {case for cases in held_out.values() for case in cases}
    return _with_scores_of_jobs(joined, WorkFiles(folder).scores, folds, splits, own)


def _fold_text(run: ComparedRun) -> str:
    return f"fold {run.fold}" if isinstance(run.fold, int) else "nothing"


def _with_scores_of_jobs(
    run: ComparedRun, path: Path, folds: Sequence[RunFiles], splits: Splits, own: set[str]
) -> ComparedRun:
    """With the scores of the jobs of `voxfit slurm`, where they are of these trainings.

    Args:
        run: The finished folds.
        path: Of the scores.
        folds: The run folders: what was scored before one of them ended is of an earlier training.
        splits: Their folds: a file that is about other cases than those held out is another evaluation.
        own: Cases that the folds held out, all of which must have been tried.
    """
    if not path.is_file() or path.stat().st_mtime < max(each.record.stat().st_mtime for each in folds):
        return run
    metrics = read_artifact(path, Metrics)
    scored = {case.case_id for case in metrics.cases}
    held_out = {case_id for fold in splits.folds for case_id in fold.validation}
    if not (own & scored and own <= scored | set(metrics.failures) <= held_out):
        return run
    final = final_scores(replace(metrics, cases=tuple(case for case in metrics.cases if case.case_id in own)))
    return replace(run, scores={**run.scores, "final": final}, tolerance_mm=metrics.tolerance_mm)


def _join(runs: Sequence[ComparedRun], folder: Path, num_folds: int) -> ComparedRun:
    """Counts are those of the fold that is least far, times add up, of memory the largest counts."""
    first = runs[0]
    for attribute in ("dataset_name", "fingerprint_hash", "class_names"):
        if others := [run.name for run in runs if getattr(run, attribute) != getattr(first, attribute)]:
            what = f"another {attribute} in the plan than {first.name}: {', '.join(others)}"
            raise InputError(what, where=folder, fix="Compare the run folders one by one")
    fullest = max(runs, key=lambda run: run.measured_bytes or 0)
    scores = _scores(runs)
    return replace(
        first,
        num_folds=len(runs),
        state=_state(runs, num_folds),
        fold=", ".join(str(run.fold) for run in runs),
        device=_told(run.device for run in runs),
        precision=_told(run.precision for run in runs),
        max_epochs=first.max_epochs if len({run.max_epochs for run in runs}) == 1 else None,
        best_epoch=None,
        best_dice=_known(fmean, [run.best_dice for run in runs]),
        seconds_per_step=_seconds_per_step(runs),
        wall_seconds=_known(sum, [run.wall_seconds for run in runs]),
        predicted_bytes=fullest.predicted_bytes,
        measured_bytes=fullest.measured_bytes,
        **{name: min(getattr(run, name) for run in runs) for name in COUNTS},
        **{name: sum(getattr(run, name) for run in runs) for name in SUMS},
        **{name: max(getattr(run, name) or 0 for run in runs) or None for name in PEAKS},
        step_downs=tuple(f"in fold {run.fold}, {text}" for run in runs for text in run.step_downs),
        settings=_settings(runs),
        curves=_mean_curves([run.curves for run in runs if run.curves]),
        scores=scores,
        patients={case: patient for run in runs for case, patient in run.patients.items()},
        tolerance_mm=_tolerance(runs, folder) if "final" in scores else None,
    )


def _state(runs: Sequence[ComparedRun], num_folds: int) -> str:
    others = [f"{run.name} {run.state}" for run in runs if run.state != "finished"]
    missing = [str(fold) for fold in range(num_folds) if fold not in [run.fold for run in runs]]
    others += [f"not begun: {', '.join(missing)}"] if missing else []
    finished = sum(run.state == "finished" for run in runs)
    return f"{finished} of {num_folds} folds finished ({'; '.join(others)})" if others else "finished"


def _told(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))


def _known(function: Callable[[list[Any]], float], values: Sequence[float | None]) -> float | None:
    return None if None in values else function(list(values))


def _seconds_per_step(runs: Sequence[ComparedRun]) -> float | None:
    steps = sum(run.optimizer_step for run in runs)
    return sum(run.train_seconds for run in runs) / steps if steps else None


def _settings(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """Those of all folds; where they differ, all values there are. The fold itself is told otherwise."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "option.fold")
    return {key: _told(run.settings.get(key, "not said") for run in runs) for key in keys}


def _mean_curves(curves: Sequence[Mapping[str, tuple[Score, ...]]]) -> dict[str, tuple[Score, ...]]:
    """Means over the folds that have a value, as far as all that have begun have come.

    Not all have one everywhere: the noise scale is not always known, and a rare class may be in no case of a fold.
    """
    if not curves:
        return {}
    epochs = sorted(set.intersection(*(set(each["epoch"]) for each in curves)))
    rows = [[each["epoch"].index(epoch) for epoch in epochs] for each in curves]
    means = {}
    for name in (name for name in curves[0] if all(name in each for each in curves)):
        columns = [[each[name][at] for at in row] for each, row in zip(curves, rows, strict=True)]
        means[name] = tuple(map(mean_known, zip(*columns, strict=True)))
    return means


def _scores(runs: Sequence[ComparedRun]) -> dict[ScoreSource, ScoreTable]:
    """Those of all folds together; final ones where every fold that has scores has them."""
    scored = [run for run in runs if run.scores]
    found: dict[ScoreSource, ScoreTable] = {}
    sources: tuple[ScoreSource, ...] = ("final", "training")
    for source in sources:
        tables = [run.scores[source] for run in scored if source in run.scores]
        if tables and (source == "training" or len(tables) == len(scored)):
            found[source] = {
                metric: {case: scores for table in tables for case, scores in table[metric].items()}
                for metric in tables[0]
            }
    return found


def _tolerance(runs: Sequence[ComparedRun], folder: Path) -> float | None:
    known = {run.name: run.tolerance_mm for run in runs if run.tolerance_mm is not None}
    if len(set(known.values())) > 1:
        what = "NSD at other tolerances: " + ", ".join(f"{name} {value:g} mm" for name, value in known.items())
        raise InputError(what, where=folder, fix="Evaluate the folds alike")
    return next(iter(known.values()), None)
