"""What joins predictions and labels: the report of an evaluation, and the post-processing chosen by held-out cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.allocation import resolve_num_workers
from pipeline.artifacts import check_writable, write_artifact
from pipeline.config import EvaluateConfig, PostprocessConfig
from pipeline.errors import InputError
from pipeline.evaluation.pairs import find_references, list_volumes, pair_cases
from pipeline.evaluation.report import write_report
from pipeline.evaluation.shown_cases import read_shown_cases
from pipeline.evaluation.slices import ReportCase
from pipeline.evaluation.summary import Metrics
from pipeline.inference.inputs import find_inputs
from pipeline.inference.loading import read_held_out, read_plan
from pipeline.inference.postprocess import Postprocessing
from pipeline.inference.postprocess_choice import choose_postprocessing
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.prediction_record import read_records
from pipeline.run_files import RunFiles


def write_evaluation_report(config: EvaluateConfig, metrics: Metrics, facts: Mapping[str, str] | None = None) -> None:
    """Write the report of an evaluation, with slices where its options name the images."""
    curves = RunFiles(Path(config.run_dir)).metrics if config.run_dir else None
    facts = {"predictions": Path(config.predictions).name, **(facts or {})}
    cases = _shown_cases(config, metrics) if config.images else []
    title = facts.get("dataset", "Evaluation")
    records = read_records(Path(config.predictions), [case.case_id for case in metrics.cases])
    write_report(
        Path(config.report), metrics, title=title, facts=facts, curves_csv=curves, cases=cases, records=records
    )
    get_logger("evaluate").info("report: %s", config.report)


def _shown_cases(config: EvaluateConfig, metrics: Metrics) -> list[ReportCase]:
    """The volumes that the report shows."""
    return read_shown_cases(
        metrics,
        images={case.case_id: case for case in find_inputs(Path(config.images))},
        references=find_references(Path(config.labels)).paths,
        predictions=list_volumes(Path(config.predictions)),
    )


def postprocess_runs(config: PostprocessConfig) -> Postprocessing:
    """Choose by the held-out cases of all runs together, and write the choice into every one of their folders.

    Raises:
        InputError: The runs have different classes, a case has several predictions, there are too few cases, or a
            folder cannot be written to.
    """
    run_dirs = [Path(folder) for folder in config.run_dirs]
    plan = _common_plan(run_dirs)
    for run_dir in run_dirs:
        # All or none: a choice that only some of the runs have is used by none of them.
        check_writable(run_dir, fix="Check its permissions")
    found = list_volumes(Path(config.predictions)) if config.predictions else _own_predictions(run_dirs)
    references = find_references(Path(config.labels)).paths
    wanted = set(found) & set(references)
    if config.cases == "held_out":
        wanted &= {case_id for run_dir in run_dirs for case_id in read_held_out(run_dir)}
    chosen = choose_postprocessing(
        pair_cases(found, references, wanted)[0],
        plan.labels,
        ignore_value=plan.ignore_value,
        min_gain=config.min_gain,
        num_workers=resolve_num_workers(config.num_workers),
    )
    for run_dir in run_dirs:
        write_artifact(RunFiles(run_dir).postprocessing, chosen)
    return chosen


def _common_plan(run_dirs: Sequence[Path]) -> Plan:
    first, *others = [read_plan(run_dir) for run_dir in run_dirs]
    for run_dir, plan in zip(run_dirs[1:], others, strict=True):
        if (plan.labels, plan.ignore_value) != (first.labels, first.ignore_value):
            raise InputError(f"has other classes than {run_dirs[0]}", where=run_dir, fix="Take runs of one dataset")
    return first


def _own_predictions(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """The predictions in the run folders, of which each case has one."""
    found: dict[str, Path] = {}
    for run_dir in run_dirs:
        for case_id, path in list_volumes(RunFiles(run_dir).held_out_predictions).items():
            if case_id in found:
                what = f"{case_id} is predicted in {found[case_id].parent} as well"
                raise InputError(what, where=path.parent, fix="Give a folder of predictions with --predictions")
            found[case_id] = path
    return found
