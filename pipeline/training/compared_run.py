"""A run folder as `voxfit compare` needs it: read strictly, finished or not, and nothing in it touched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.artifacts import read_artifact, to_json
from pipeline.config import StatusConfig
from pipeline.datasets.splits import Splits, patients_by_pattern
from pipeline.errors import InputError
from pipeline.evaluation.comparison import ComparedRun, ScoreSource, ScoreTable
from pipeline.evaluation.figures import Curves, read_curves
from pipeline.evaluation.metrics import NAN
from pipeline.evaluation.summary import Metrics
from pipeline.geometry import format_shape
from pipeline.plan import Plan
from pipeline.run_record import RunRecord, StepDown
from pipeline.status import read_status
from pipeline.store import CaseStore
from pipeline.training.run_folder import SAID_ONLY, WHERE_ONLY, RunFolder
from pipeline.training.wall_clock import read_wall_seconds

# Of `run.json`: what "auto" came to, and what it ran with.
RESOLVED = (
    *("device", "precision", "patch_size", "batch_size", "accumulate_grad_batches", "num_ranks", "num_threads"),
    *("num_workers", "num_parameters", "max_epochs", "versions"),
)
PLAN_LEFT_OUT = (*SAID_ONLY, "schema_version", "fallbacks")
FINAL_METRICS = ("dice", "nsd", "hd95_mm")
SECONDS_PER_HOUR = 3600.0
FIX = "Give run folders of `voxfit train`, or work folders of `voxfit run` or `voxfit slurm`"


def read_run(path: Path, name: str) -> ComparedRun:
    """A training, finished or not.

    Raises:
        InputError: There is none, or a file in the folder cannot be read.
    """
    folder = RunFolder(path)
    record = folder.read_record() if path.is_dir() else None
    if record is None:
        raise InputError("holds no run (there is no run.json in it)", where=path, fix=FIX)
    plan = read_artifact(folder.plan, Plan)
    options = _read_options(folder.config)
    curves = _with_axes(read_curves(folder.metrics), record) if folder.metrics.is_file() else {}
    scores, tolerance_mm = _read_scores(folder, record)
    held_out = set(_held_out_by(folder, record))
    return ComparedRun(
        name=name,
        folder=str(path),
        state=_state(path, record),
        dataset_name=plan.dataset_name,
        fingerprint_hash=plan.fingerprint_hash,
        fold=record.fold,
        device=record.device,
        precision=record.precision,
        max_epochs=record.max_epochs,
        best_epoch=record.best_epoch if record.best_epoch is not None else _best(curves)[0],
        best_dice=record.best_dice if record.best_dice is not None else _best(curves)[1],
        **_progress(curves),
        wall_seconds=read_wall_seconds(folder, record),
        **_peaks(curves),
        predicted_bytes=record.predicted_bytes,
        measured_bytes=record.measured_bytes,
        step_downs=tuple(map(_describe_step_down, record.step_downs)),
        class_names=plan.class_names[1:],
        settings=dict(_settings(options, plan, record)),
        curves={key: tuple(map(float, values)) for key, values in curves.items()},
        scores=scores,
        patients=_patients(options, {case for table in scores.values() for case in table["dice"]} | held_out),
        tolerance_mm=tolerance_mm,
    )


def _held_out_by(folder: RunFolder, record: RunRecord) -> tuple[str, ...]:
    """The cases that a run was not trained on; none where it was trained on all, or its folds are gone."""
    if not isinstance(record.fold, int) or not folder.splits.is_file():
        return ()
    folds = read_artifact(folder.splits, Splits).folds
    return folds[record.fold].validation if record.fold < len(folds) else ()


def _read_options(path: Path) -> dict[str, Any]:
    """The options that a run was started with, nested as in the file."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read ({' '.join(str(error).split())})", where=path, fix=FIX) from error
    if not isinstance(options, dict):
        raise InputError("holds no options of a training", where=path, fix=FIX)
    return options


def _state(path: Path, record: RunRecord) -> str:
    """How far it is, in a word of `voxfit status`."""
    if record.status == "finished":
        return "finished"
    (run,) = read_status(StatusConfig(path=str(path))).runs
    return run.state


def _with_axes(curves: Curves, record: RunRecord) -> Curves:
    """Columns with what else may be looked at them over; what is infinite is unknown, as no JSON can hold it."""
    if not curves:
        return {}
    known = {key: np.where(np.isfinite(values), values, np.nan) for key, values in curves.items()}
    nothing = np.zeros(len(known["epoch"]))
    # An iteration counts the batch that the run began with, whatever it stepped down to.
    batch = record.step_downs[0].from_rung.batch_size if record.step_downs else record.batch_size
    seconds = np.nan_to_num(known.get("seconds", nothing)) + np.nan_to_num(known.get("validation_seconds", nothing))
    samples = known.get("iteration", nothing + np.nan) * batch * record.num_ranks
    return {**known, "samples": samples, "hours": np.cumsum(seconds) / SECONDS_PER_HOUR}


def _best(curves: Curves) -> tuple[int | None, float | None]:
    dice = curves.get("val_dice_mean")
    if dice is None or not np.isfinite(dice).any():
        return None, None
    row = int(np.nanargmax(dice))
    return int(curves["epoch"][row]), float(dice[row])


def _progress(curves: Curves) -> dict[str, Any]:
    if not curves:
        return {}
    counts = {key: _last(curves, key) for key in ("epoch", "iteration", "optimizer_step", "samples")}
    sums = {
        name: round(float(np.nansum(curves.get(column, np.zeros(0)))), 3)
        for name, column in (("train_seconds", "seconds"), ("validation_seconds", "validation_seconds"))
    }
    steps = counts["optimizer_step"]
    return {**counts, **sums, "seconds_per_step": sums["train_seconds"] / steps if steps else None}


def _last(curves: Curves, key: str) -> int:
    values = curves.get(key)
    return int(values[-1]) if values is not None and np.isfinite(values[-1]) else 0


def _peaks(curves: Curves) -> dict[str, int | None]:
    found = {key: curves.get(key, np.zeros(0)) for key in ("peak_vram_bytes", "peak_ram_bytes")}
    return {key: int(np.nanmax(values)) or None if np.isfinite(values).any() else None for key, values in found.items()}


def _describe_step_down(step: StepDown) -> str:
    before, after = step.from_rung, step.to_rung
    changes = [
        f"{name.replace('_', ' ')} {_shown(getattr(before, name))} to {_shown(getattr(after, name))}"
        for name in ("patch_size", "batch_size", "recompute_stages", "slab_stages", "offload_stages")
        if getattr(before, name) != getattr(after, name)
    ]
    changes += ["scores on the host"] if step.scores_on_host and not changes else []
    return f"in {step.where} after optimiser step {step.counts.optimizer_step}: {', '.join(changes) or 'as before'}"


def _shown(value: Any) -> str:
    return format_shape(value) if isinstance(value, tuple) else str(value)


def _settings(options: Mapping[str, Any], plan: Plan, record: RunRecord) -> Iterator[tuple[str, str]]:
    planned = json.loads(to_json(plan))
    told = json.loads(to_json(record))
    yield from _flat({key: value for key, value in options.items() if key not in (*WHERE_ONLY, "tracking")}, "option.")
    yield from _flat({key: value for key, value in planned.items() if key not in PLAN_LEFT_OUT}, "plan.")
    yield "plan.memory.budget_bytes", str(plan.memory.budget_bytes)
    yield from _flat({key: told[key] for key in RESOLVED}, "run.")


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _read_scores(folder: RunFolder, record: RunRecord) -> tuple[dict[ScoreSource, ScoreTable], float | None]:
    """Scores by where they are from, and the tolerance of the final NSD."""
    scores: dict[ScoreSource, ScoreTable] = {}
    tolerance_mm = None
    if folder.held_out_scores.is_file():
        metrics = read_artifact(folder.held_out_scores, Metrics)
        tolerance_mm = metrics.tolerance_mm
        scores["final"] = final_scores(metrics)
    if record.validation:
        scores["training"] = {
            "dice": {
                case: {name: NAN if value is None else value for name, value in classes.items()}
                for case, classes in record.validation.items()
            }
        }
    return scores, tolerance_mm


def final_scores(metrics: Metrics) -> ScoreTable:
    """Those of an evaluation that are compared."""
    return {
        metric: {
            case.case_id: {name: float(getattr(score, metric)) for name, score in case.classes.items()}
            for case in metrics.cases
        }
        for metric in FINAL_METRICS
    }


def _patients(options: Mapping[str, Any], cases: set[str]) -> dict[str, str]:
    """Patient by case, as the folds were made; nothing where the store is gone and there is no pattern."""
    if pattern := options.get("patient_pattern"):
        return patients_by_pattern(sorted(cases), pattern)
    with suppress(InputError):
        store = CaseStore(Path(str(options.get("store", ""))))
        known = set(store.case_ids) & cases
        return {case: patient for case in sorted(known) if (patient := store.record(case).patient)}
    return {}
