"""`voxfit run`: every stage one after the other in one work folder, from the dataset to the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pipeline import api
from pipeline.artifacts import read_artifact
from pipeline.config import EvaluateConfig, PlanConfig, PredictConfig, PreprocessConfig, RunConfig, TrainConfig
from pipeline.errors import CasesFailedError, InputError
from pipeline.log import get_logger, log_to_file
from pipeline.plan import Plan
from pipeline.rank_place import find_place
from pipeline.run_files import RunFiles, WorkFiles
from pipeline.run_record import RunRecord
from pipeline.saved_config import find_changes, write_config

if TYPE_CHECKING:
    from rich.console import Group
    from torch import nn

    from pipeline.evaluation.summary import Metrics
    from pipeline.training.fit_result import FitResult

Result = TypeVar("Result")
# What may change between two calls of `run` in one folder: another fold is a run of its own, and the rest decides how
# the work is done, not what comes of it.
HOW_ONLY = ("num_workers", "skip_bad_cases", "plan.probe", "train.validate_every_n_epochs", "train.hardware.")
HOW_TO_TRAIN = ("train.stage_to", "train.max_time", "train.save_every_minutes", "train.tracking.")
FREE_TO_CHANGE = ("work_dir", "fold", *HOW_TO_TRAIN, *HOW_ONLY)


@dataclass(frozen=True)
class RunResult:
    """What `voxfit run` made: the scores of the held-out cases of a fold or of all, and the page that shows them."""

    metrics: Metrics
    report: Path


def run(config: RunConfig, *, network: nn.Module | None = None) -> RunResult:
    """Plan, preprocess, train, predict what was held out, evaluate, report, for one fold or all; resumes where it was.

    Raises:
        CasesFailedError: Everything is done, without the cases that it lists.
        InputError: It was started several times at once, as by `srun` with several tasks.
    """
    if find_place().num_ranks > 1:
        fix = "Start it once, with --train.hardware.devices, or use the separate commands"
        raise InputError("run starts the processes of its training itself", fix=fix)
    work = WorkFiles(Path(config.work_dir))
    folds = range(config.train.num_folds) if config.fold == "all" else [config.fold]
    _check_training(config, folds, network)
    _keep_config(work, config)
    with log_to_file(work.log):
        failures = _prepare(config, work, lambda: _check_training(config, folds, network))
        results: dict[int, RunResult] = {}
        for fold in folds:
            if len(folds) > 1:
                get_logger("run").info("fold %d of %d", fold, len(folds))
            results[fold], failed = _run_fold(replace(config, fold=fold), network)
            failures = {**failures, **failed}
        result = _pool(config, results) if config.fold == "all" else results[config.fold]
        if failures:
            raise CasesFailedError(failures, done=f"{result.report} was written", result=result)
        return result


def _run_fold(config: RunConfig, network: nn.Module | None) -> tuple[RunResult, dict[str, str]]:
    """Train one fold and score what it held out; with the cases that failed."""
    work, fold = WorkFiles(Path(config.work_dir)), int(config.fold)
    paths = {"plan": str(work.plan), "store": str(work.store), "run_dir": str(work.run(fold).path)}
    options = {**_values(config.train), **paths, "fold": fold, "max_epochs": config.max_epochs}
    fit = api.train(TrainConfig(**options), network=network)
    return _assess(config, fit, network)


def describe_run(result: RunResult) -> Group:
    """The table of scores and where the report is."""
    from rich.console import Group
    from rich.text import Text

    from pipeline.evaluation.explain import describe_metrics

    return Group(describe_metrics(result.metrics), Text(f"report: {result.report}"))


def _check_training(config: RunConfig, folds: Iterable[int], network: nn.Module | None) -> None:
    """Find out what would end the trainings at their start, long before: plan, what they begin with, the tracker.

    As far as it can be told: how the weights fit is known once there is a plan.
    """
    from pipeline.training.run_folder import RunFolder
    from pipeline.training.trackers import check_tracker

    check_tracker(config.train.tracking)
    work = WorkFiles(Path(config.work_dir))
    folders = [RunFolder(work.run(fold).path) for fold in folds]
    plan = read_artifact(work.plan, Plan) if work.plan.is_file() else None
    if plan is not None:
        for folder in folders:
            # The store is made anew for a plan that was edited, which would be in vain.
            folder.check_plan(plan)
    new = [folder for folder in folders if not folder.has_checkpoint]
    if config.train.init_from and new:
        from pipeline.training.initial_source import find_source
        from pipeline.training.initial_weights import check_beginning

        find_source(config.train.init_from)
        if plan is not None:
            check_beginning(new[0], plan, config.train, network)


def _keep_config(work: WorkFiles, config: RunConfig) -> None:
    """Save the options, or refuse to continue a folder in which a plan was made with others."""
    changes = []
    if work.config.is_file() and work.plan.is_file():
        changes = find_changes(work.config, config, harmless=FREE_TO_CHANGE)
    if changes:
        fix = "Put them back to continue, or give another --work_dir"
        raise InputError(f"was made with other options: {'; '.join(changes)}", where=work.path, fix=fix)
    write_config(work.config, config)


def _prepare(config: RunConfig, work: WorkFiles, check: Callable[[], None]) -> dict[str, str]:
    """The plan, unless it is there already (and perhaps edited), and the store; reasons of cases left out.

    A plan that is made is checked before the store is.
    """
    common: dict[str, Any] = {name: getattr(config, name) for name in ("dataset", "num_workers", "skip_bad_cases")}
    left_out: dict[str, str] = {}
    if not work.plan.is_file():
        optim: dict[str, Any] = {"optimizer": config.train.optim.name, "ema": config.train.optim.ema_decay > 0}
        plan = {**_values(config.plan), **({"probe": "off"} if config.train.hardware.accelerator == "cpu" else {})}
        options = PlanConfig(**plan, **common, **optim, out=str(work.plan), vram=config.vram)
        _, left_out = _collect(api.plan, options)
        check()
    preprocessing = PreprocessConfig(**common, plan=str(work.plan), store=str(work.store))
    _, failures = _collect(api.preprocess, preprocessing)
    return {**left_out, **failures}


def _assess(config: RunConfig, fit: FitResult, network: nn.Module | None) -> tuple[RunResult, dict[str, str]]:
    """Predict the held-out cases on their own grids, score them, write the report; with the cases that failed."""
    from pipeline.datasets.splits import Splits, select_fold

    files, hardware = RunFiles(fit.run_dir), config.train.hardware
    held_out = select_fold(read_artifact(files.splits, Splits), config.fold).validation
    prediction = PredictConfig(
        run_dir=str(files.path),
        input=config.dataset,
        output=str(files.held_out_predictions),
        tta=config.tta,
        seams=True,
        # Post-processing is chosen by these predictions.
        postprocess="none",
        accelerator=hardware.accelerator,
        num_threads=hardware.num_threads,
    )
    evaluation = EvaluateConfig(
        predictions=str(files.held_out_predictions),
        labels=config.dataset,
        images=config.dataset,
        out=str(files.held_out_scores),
        report=str(files.report),
        run_dir=str(files.path),
        patient_pattern=config.train.patient_pattern,
        num_workers=config.num_workers,
    )
    _, failed = _collect(api.predict, prediction, network=network, case_ids=held_out)
    facts = _facts(config, files)
    metrics, not_scored = _collect(api.evaluate, evaluation, case_ids=held_out, facts=facts)
    return RunResult(metrics, files.report), {**not_scored, **failed}


def _pool(config: RunConfig, results: Mapping[int, RunResult]) -> RunResult:
    """The held-out cases of all folds as one evaluation: predictions, scores and report in `cross_validation`.

    Raises:
        InputError: The folds are not those of one split.
    """
    from pipeline.assessment import write_evaluation_report
    from pipeline.evaluation.pairs import find_references
    from pipeline.evaluation.pooling import gather_predictions
    from pipeline.evaluation.summary import pool_metrics, write_metrics
    from pipeline.training.run_splits import common_splits

    work = WorkFiles(Path(config.work_dir))
    runs = [work.run(fold) for fold in results]
    common_splits(runs, fix="Delete these and run again: they were trained with other cases held out")
    folder = work.cross_validation
    gather_predictions([run.held_out_predictions for run in runs], folder / "predictions")
    by_fold = {f"fold {fold}": result.metrics for fold, result in results.items()}
    scored = [case.case_id for metrics in by_fold.values() for case in metrics.cases]
    patients = find_references(Path(config.dataset)).patients_of(scored, config.train.patient_pattern)
    metrics = pool_metrics(by_fold, patients=patients)
    evaluation = EvaluateConfig(
        predictions=str(folder / "predictions"),
        labels=config.dataset,
        images=config.dataset,
        out=str(folder / "metrics.json"),
        report=str(folder / "report.html"),
    )
    write_metrics(Path(evaluation.out), metrics)
    facts = {**_facts(config, runs[0]), "fold": f"all {len(runs)}, each case by the fold that held it out"}
    write_evaluation_report(evaluation, metrics, facts)
    return RunResult(metrics, Path(evaluation.report))


def _collect(command: Callable[..., Result], config: Any, **options: Any) -> tuple[Result, dict[str, str]]:
    """What a command gives, and the cases that it failed for, which do not end the chain where there is a result."""
    try:
        return command(config, **options), {}
    except CasesFailedError as error:
        if error.result is None:
            raise
        return cast(Result, error.result), error.failures


def _facts(config: RunConfig, files: RunFiles) -> dict[str, str]:
    """What the report says of data, plan and run."""
    from pipeline.geometry import format_shape, format_spacing

    made, record = read_artifact(files.plan, Plan), read_artifact(files.record, RunRecord)
    return {
        "dataset": made.dataset_name,
        "fold": f"{config.fold} of {config.train.num_folds}",
        "spacing": f"{format_spacing(made.target_spacing)} mm",
        "patch": f"{format_shape(record.patch_size or made.patch_size)} voxels, batch {record.batch_size}",
        "training": f"{record.counts.epoch} epochs, {record.counts.optimizer_step} optimiser steps",
        "precision": f"{record.precision} on {record.device}",
        "mirroring": config.tta,
    }


def _values(config: Any) -> dict[str, Any]:
    """The fields of a config by name, groups as they are."""
    return {item.name: getattr(config, item.name) for item in fields(config)}
