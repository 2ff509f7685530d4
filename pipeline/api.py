"""Every command as a function: the one module that joins the layers, and the Python interface.

Each function takes its config dataclass from `pipeline.config` and does what `voxfit COMMAND` does.
Heavy libraries are imported when a function needs them, so that importing this module is cheap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pipeline.allocation import resolve_num_workers
from pipeline.artifacts import content_hash, read_artifact, to_json, write_artifact
from pipeline.config import (
    EvaluateConfig,
    InspectConfig,
    PlanConfig,
    PredictConfig,
    PreprocessConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.errors import CasesFailedError, InputError
from pipeline.log import get_logger, log_to_file
from pipeline.plan import Plan
from pipeline.saved_config import find_changes, write_config

if TYPE_CHECKING:
    from rich.console import Group
    from torch import nn

    from pipeline.datasets.dataset import Dataset
    from pipeline.datasets.inspection import Inspection
    from pipeline.datasets.splits import Splits
    from pipeline.evaluation.slices import ReportCase
    from pipeline.evaluation.summary import Metrics
    from pipeline.store import CaseStore
    from pipeline.training.trainer import FitResult

Result = TypeVar("Result")
# What may change between two calls of `run` in one folder: another fold is a run of its own, and the rest decides how
# the work is done, not what comes of it.
HOW_ONLY = ("num_workers", "skip_bad_cases", "train.validate_every_n_epochs", "train.hardware.")
FREE_TO_CHANGE = ("work_dir", "fold", *HOW_ONLY)


# ---- inspect


def inspect(config: InspectConfig) -> Inspection:
    """Read a dataset and check every case; problems are part of the result, not errors."""
    from pipeline.datasets.inspection import inspect_dataset

    return inspect_dataset(config.path, num_workers=resolve_num_workers(config.num_workers), as_json=config.json)


# ---- plan


def plan(config: PlanConfig) -> Plan:
    """Check the dataset, measure it, and write `plan.json` and `fingerprint.json`.

    Raises:
        InputError: The dataset has problems and `skip_bad_cases` is off, or nothing fits the budget.
        CasesFailedError: The plan was made without bad cases.
    """
    made, left_out = _plan(config)
    return _finish(made, left_out, done=f"{config.out} was written")


def _plan(config: PlanConfig) -> tuple[Plan, dict[str, str]]:
    from pipeline.datasets.dataset import read_dataset
    from pipeline.datasets.examination import examine_cases
    from pipeline.datasets.fingerprint import make_fingerprint
    from pipeline.datasets.inspection import find_bad_cases
    from pipeline.planning.planner import make_plan

    budget = _budget(config)
    dataset = read_dataset(config.dataset)
    num_workers = resolve_num_workers(config.num_workers)
    examined = examine_cases(dataset, num_workers=num_workers)
    left_out = find_bad_cases(dataset, examined, num_workers=num_workers, skip=config.skip_bad_cases)
    fingerprint = make_fingerprint(dataset, num_workers=num_workers, leave_out=left_out, examined=examined)
    made = make_plan(fingerprint, config, budget_bytes=budget[0], budget_note=budget[1])
    write_artifact(Path(config.out).with_name("fingerprint.json"), fingerprint)
    write_artifact(Path(config.out), made)
    return made, left_out


def _budget(config: PlanConfig) -> tuple[int, str]:
    """The memory budget in bytes and, where the machine decided, a sentence about it."""
    from pipeline.planning.budget import budget_from_device, parse_vram

    return budget_from_device() if config.vram == "auto" else (parse_vram(config.vram), "")


# ---- preprocess


def preprocess(config: PreprocessConfig) -> CaseStore:
    """Bring the store up to date with the dataset and the plan, case by case.

    Raises:
        CasesFailedError: Some cases were left out or failed; with `skip_bad_cases` off nothing is started
            when a case has problems.
    """
    from pipeline.store import CaseStore

    failures = _preprocess(config)
    return _finish(CaseStore(Path(config.store)), failures, done=f"{config.store} was filled")


def _preprocess(config: PreprocessConfig) -> dict[str, str]:
    from pipeline.datasets.dataset import read_dataset
    from pipeline.preprocessing.preprocess import preprocess_dataset

    dataset = read_dataset(config.dataset)
    made = read_artifact(Path(config.plan), Plan)
    left_out = _left_out_by_plan(made, dataset, config)
    failures = preprocess_dataset(dataset, made, Path(config.store), num_workers=config.num_workers, leave_out=left_out)
    if failures and not config.skip_bad_cases:
        raise CasesFailedError({**left_out, **failures}, done=f"{config.store} was filled")
    return {**left_out, **failures}


def _left_out_by_plan(made: Plan, dataset: Dataset, config: PreprocessConfig) -> dict[str, str]:
    """Cases that the plan was made without; a plan without its fingerprint is checked against the dataset anew."""
    from pipeline.datasets.fingerprint import Fingerprint
    from pipeline.datasets.inspection import find_bad_cases

    path = Path(config.plan).with_name("fingerprint.json")
    if path.is_file():
        fingerprint = read_artifact(path, Fingerprint)
        if content_hash(to_json(fingerprint)) == made.fingerprint_hash:
            if fingerprint.left_out:
                get_logger("preprocess").info("cases that the plan was made without stay out; plan again to use them")
            return dict(fingerprint.left_out)
    num_workers = resolve_num_workers(config.num_workers)
    return find_bad_cases(dataset, num_workers=num_workers, skip=config.skip_bad_cases)


# ---- train


def train(config: TrainConfig, *, network: nn.Module | None = None) -> FitResult:
    """Train one fold, or all cases, into `run_dir`; the same call again resumes.

    Args:
        config: Options.
        network: Any network that maps (B, C, I, J, K) to logits (B, classes, I, J, K), or to a list of them from the
            highest resolution down, instead of the plan's U-Net. `replace_batchnorm` makes it fit for batch size 1.
    """
    from pipeline.store import CaseStore
    from pipeline.training.trainer import fit_fold

    made = read_artifact(Path(config.plan), Plan)
    store = CaseStore(Path(config.store))
    store.check_plan(made)
    splits = _splits(store, config)
    with log_to_file(Path(config.run_dir) / "log.txt"):
        return fit_fold(made, Path(config.store), splits, config, network=network)


def _splits(store: CaseStore, config: TrainConfig) -> Splits:
    """The run's folds: those saved in it, else new ones; checked against the store either way."""
    from pipeline.datasets.splits import Splits, check_splits, make_splits, patients_by_pattern

    if config.patient_pattern:
        patients = patients_by_pattern(store.case_ids, config.patient_pattern)
    else:
        patients = {case_id: store.record(case_id).patient or case_id for case_id in store.case_ids}
    saved = Path(config.run_dir) / "splits.json"
    if saved.is_file():
        splits = read_artifact(saved, Splits)
    else:
        splits = make_splits(patients, num_folds=config.num_folds, seed=config.seed)
    check_splits(splits, patients)
    return splits


# ---- predict


def predict(
    config: PredictConfig, *, network: nn.Module | None = None, case_ids: Collection[str] | None = None
) -> list[Path]:
    """Segment what `input` names with a trained run, one file per case in `output`.

    Args:
        config: Options.
        network: The network of one's own that the run was trained with.
        case_ids: Only these cases of the input.

    Raises:
        CasesFailedError: Some cases failed; the rest is written.
    """
    from pipeline.inference.inputs import find_inputs
    from pipeline.inference.predictor import Predictor

    cases = find_inputs(Path(config.input), case_ids=case_ids)
    predictor = Predictor.from_run(
        Path(config.run_dir),
        checkpoint=config.checkpoint,
        accelerator=config.accelerator,
        num_threads=config.num_threads,
        overlap=config.overlap,
        tta=config.tta,
        network=network,
    )
    return predictor.predict_files(cases, Path(config.output), overwrite=config.overwrite)


# ---- evaluate


def evaluate(
    config: EvaluateConfig, *, case_ids: Collection[str] | None = None, facts: Mapping[str, str] | None = None
) -> Metrics:
    """Score a folder of predictions; writes JSON, CSV and, on request, the report.

    Args:
        config: Options.
        case_ids: Cases that must be there; by default those that have a prediction.
        facts: What the report says at its top, in order.

    Raises:
        CasesFailedError: Some cases could not be scored; the rest is written.
    """
    from pipeline.evaluation.evaluate import evaluate_folder
    from pipeline.evaluation.summary import write_metrics

    metrics = evaluate_folder(
        Path(config.predictions),
        Path(config.labels),
        case_ids=case_ids,
        tolerance_mm=config.tolerance_mm,
        num_workers=resolve_num_workers(config.num_workers),
    )
    write_metrics(Path(config.out), metrics)
    if config.report:
        _write_report(config, metrics, facts)
    return _finish(metrics, metrics.failures, done=f"{len(metrics.cases)} case(s) evaluated")


def _write_report(config: EvaluateConfig, metrics: Metrics, facts: Mapping[str, str] | None) -> None:
    from pipeline.evaluation.report import write_report

    curves = Path(config.run_dir) / "metrics.csv" if config.run_dir else None
    facts = {"predictions": Path(config.predictions).name, **(facts or {})}
    cases = _shown_cases(config, metrics) if config.images else []
    title = facts.get("dataset", "Evaluation")
    write_report(Path(config.report), metrics, title=title, facts=facts, curves_csv=curves, cases=cases)
    get_logger("evaluate").info("report: %s", config.report)


def _shown_cases(config: EvaluateConfig, metrics: Metrics) -> list[ReportCase]:
    """The volumes that the report shows."""
    from pipeline.evaluation.pairs import find_references, list_volumes
    from pipeline.evaluation.shown_cases import read_shown_cases
    from pipeline.inference.inputs import find_inputs

    return read_shown_cases(
        metrics,
        images={case.case_id: case for case in find_inputs(Path(config.images))},
        references=find_references(Path(config.labels)).paths,
        predictions=list_volumes(Path(config.predictions)),
    )


# ---- run


@dataclass(frozen=True)
class RunResult:
    """What `voxfit run` made: the scores of the validation fold, and the page that shows them."""

    metrics: Metrics
    report: Path


def run(config: RunConfig, *, network: nn.Module | None = None) -> RunResult:
    """Plan, preprocess, train, predict the validation fold, evaluate, report; resumes where it was.

    Raises:
        CasesFailedError: Everything is done, without the cases that it lists.
    """
    work_dir = Path(config.work_dir)
    _keep_config(work_dir / "config.yaml", config)
    with log_to_file(work_dir / "log.txt"):
        failures = _prepare(config, work_dir)
        run_dir = work_dir / f"fold_{config.fold}"
        paths = {"plan": str(work_dir / "plan.json"), "store": str(work_dir / "store"), "run_dir": str(run_dir)}
        options = {**_values(config.train), **paths, "fold": config.fold, "max_epochs": config.max_epochs}
        fit = train(TrainConfig(**options), network=network)
        result, failed = _assess(config, fit, network)
        return _finish(result, {**failures, **failed}, done=f"{run_dir} is finished")


def describe_run(result: RunResult) -> Group:
    """The table of scores and where the report is."""
    from rich.console import Group
    from rich.text import Text

    from pipeline.evaluation.explain import describe_metrics

    return Group(describe_metrics(result.metrics), Text(f"report: {result.report}"))


def _keep_config(path: Path, config: RunConfig) -> None:
    """Save the options, or refuse to continue a folder in which a plan was made with others."""
    changes = []
    if path.is_file() and path.with_name("plan.json").is_file():
        changes = find_changes(path, config, harmless=FREE_TO_CHANGE)
    if changes:
        fix = "Put them back to continue, or give another --work_dir"
        raise InputError(f"was made with other options: {'; '.join(changes)}", where=path.parent, fix=fix)
    write_config(path, config)


def _prepare(config: RunConfig, work_dir: Path) -> dict[str, str]:
    """The plan, unless it is there already (and perhaps edited), and the store; reasons of cases left out."""
    plan_path = work_dir / "plan.json"
    common: dict[str, Any] = {name: getattr(config, name) for name in ("dataset", "num_workers", "skip_bad_cases")}
    if not plan_path.is_file():
        _plan(PlanConfig(**_values(config.plan), **common, out=str(plan_path), vram=config.vram))
    return _preprocess(PreprocessConfig(**common, plan=str(plan_path), store=str(work_dir / "store")))


def _assess(config: RunConfig, fit: FitResult, network: nn.Module | None) -> tuple[RunResult, dict[str, str]]:
    """Predict the held-out cases on their own grids, score them, write the report; with the cases that failed."""
    from pipeline.datasets.splits import Splits

    run_dir, hardware = fit.run_dir, config.train.hardware
    held_out = read_artifact(run_dir / "splits.json", Splits).folds[config.fold].validation
    predictions, report = run_dir / "validation", run_dir / "report.html"
    prediction = PredictConfig(
        run_dir=str(run_dir),
        input=config.dataset,
        output=str(predictions),
        tta=config.tta,
        accelerator=hardware.accelerator,
        num_threads=hardware.num_threads,
    )
    evaluation = EvaluateConfig(
        predictions=str(predictions),
        labels=config.dataset,
        images=config.dataset,
        out=str(predictions / "metrics.json"),
        report=str(report),
        run_dir=str(run_dir),
        num_workers=config.num_workers,
    )
    _, failed = _collect(predict, prediction, network=network, case_ids=held_out)
    facts = _facts(config, run_dir)
    metrics, not_scored = _collect(evaluate, evaluation, case_ids=held_out, facts=facts)
    return RunResult(metrics, report), {**not_scored, **failed}


def _collect(command: Callable[..., Result], config: Any, **options: Any) -> tuple[Result, dict[str, str]]:
    """What a command gives, and the cases that it failed for, which do not end the chain."""
    try:
        return command(config, **options), {}
    except CasesFailedError as error:
        return cast(Result, error.result), error.failures


def _facts(config: RunConfig, run_dir: Path) -> dict[str, str]:
    """What the report says of data, plan and run."""
    from pipeline.geometry import format_shape, format_spacing

    made, record = read_artifact(run_dir / "plan.json", Plan), json.loads((run_dir / "run.json").read_text())
    return {
        "dataset": made.dataset_name,
        "fold": f"{config.fold} of {config.train.num_folds}",
        "spacing": f"{format_spacing(made.target_spacing)} mm",
        "patch": f"{format_shape(made.patch_size)} voxels, batch {record['batch_size']}",
        "training": f"{config.max_epochs} epochs, {record['counts']['optimizer_step']} optimiser steps",
        "precision": f"{record['precision']} on {record['device']}",
        "mirroring": config.tta,
    }


def _finish(result: Result, failures: Mapping[str, str], *, done: str) -> Result:
    """Give back the result, or raise it together with the cases that are not in it."""
    if failures:
        raise CasesFailedError(failures, done=done, result=result)
    return result


def _values(config: Any) -> dict[str, Any]:
    """The fields of a config by name, groups as they are."""
    return {item.name: getattr(config, item.name) for item in fields(config)}
