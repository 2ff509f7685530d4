"""The report of an evaluation, with what its options name: curves of a run, volumes of the cases that are shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import EvaluateConfig
from pipeline.log import get_logger

if TYPE_CHECKING:
    from pipeline.evaluation.slices import ReportCase
    from pipeline.evaluation.summary import Metrics


def write_evaluation_report(config: EvaluateConfig, metrics: Metrics, facts: Mapping[str, str] | None = None) -> None:
    """Write `config.report`.

    Args:
        config: The evaluation's options.
        metrics: What it found.
        facts: What the report says at its top, in order.
    """
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
