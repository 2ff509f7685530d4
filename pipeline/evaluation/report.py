"""The report: one HTML file with curves, tables, distributions and slices that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_text
from pipeline.evaluation.bootstrap import FEW_UNITS, Interval
from pipeline.evaluation.figures import class_colors, draw_curves, draw_distributions, read_curves
from pipeline.evaluation.page import Cell, number_cell, render_page
from pipeline.evaluation.shown_cases import choose_shown_cases, mean_over_classes
from pipeline.evaluation.slices import ReportCase, draw_slices
from pipeline.evaluation.summary import Metrics
from pipeline.prediction_record import MANY_SEAMS, PredictionRecord

TEMPLATE = "report.html.j2"
# Name in the metrics, heading, digits after the point.
COLUMNS = (
    ("dice", "Dice", 3),
    ("iou", "IoU", 3),
    ("nsd", "NSD", 3),
    ("hd95_mm", "HD95 (mm)", 2),
    ("assd_mm", "ASSD (mm)", 2),
    ("relative_volume_error", "rel. volume error", 3),
)
MOST_CLASS_COLUMNS = 8


def write_report(
    path: Path,
    metrics: Metrics,
    *,
    title: str = "Evaluation",
    facts: Mapping[str, str] | None = None,
    curves_csv: Path | None = None,
    cases: Sequence[ReportCase] = (),
    records: Mapping[str, PredictionRecord] | None = None,
) -> None:
    """Write the report as one self-contained HTML file, atomically.

    Args:
        path: The file, `.html`.
        metrics: From `evaluate_folder`.
        title: Heading, such as the dataset's name.
        facts: What to say of dataset, plan and run, in order.
        curves_csv: A run's `metrics.csv`.
        cases: Volumes of `choose_shown_cases(metrics)`; those that are not given are not shown.
        records: How cases were segmented, by case id; shares of seams are shown where they were counted.

    Raises:
        InputError: `curves_csv` cannot be read, or the report cannot be written.
    """
    colors = class_colors(list(metrics.labels))
    records = records or {}
    seams = _seam_shares(metrics, records)
    html = render_page(
        TEMPLATE,
        title=title,
        facts=dict(facts or {}),
        metrics=metrics,
        colors=colors,
        headline=[
            (
                heading,
                number_cell(metrics.overall[name], digits).text,
                _span(metrics.overall_intervals.get(name), digits),
            )
            for name, heading, digits in COLUMNS[:5]
        ],
        few_units=FEW_UNITS,
        fold_rows=_fold_rows(metrics),
        fold_headings=_case_headings(metrics),
        columns=[heading for _, heading, _ in COLUMNS],
        class_rows=_class_rows(metrics),
        case_headings=[*_case_headings(metrics), *(["seams"] if seams else [])],
        many_seams={name: f"{share:.0%}" for name, share in seams.items() if records[name].has_many_seams},
        most_seams=f"{MANY_SEAMS:.0%}",
        has_seams=bool(seams),
        case_rows=_case_rows(metrics, seams),
        curves=draw_curves(read_curves(curves_csv), colors) if curves_csv is not None else "",
        distributions=draw_distributions(metrics, colors) if metrics.cases else "",
        slices=_slices(metrics, cases, colors),
    )
    write_text(path, html)


def _span(interval: Interval | None, digits: int) -> str:
    """The interval in words; "" where there is none."""
    if interval is None or isnan(interval.low):
        return ""
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def _fold_rows(metrics: Metrics) -> list[tuple[str, int, list[str]]]:
    """Per fold the number of its cases, and means for the columns of the table of cases."""
    rows: list[tuple[str, int, list[float]]] = []
    for name, fold in metrics.folds.items():
        dice = [fold.overall["dice"], *(fold.dice[each] for each in _class_columns(metrics))]
        rows.append((name, fold.num_cases, [*dice, *(fold.overall[metric] for metric, _, _ in COLUMNS[2:5])]))
    digits = [3] * (1 + len(_class_columns(metrics))) + [each for _, _, each in COLUMNS[2:5]]
    return [
        (name, num, [number_cell(v, d).text for v, d in zip(values, digits, strict=True)]) for name, num, values in rows
    ]


def _class_rows(metrics: Metrics) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, summary in metrics.by_class.items():
        cells = []
        for metric, _, digits in COLUMNS:
            item = summary.metrics[metric]
            mean, std, median = (number_cell(value, digits).text for value in (item.mean, item.std, item.median))
            span = _span(item.interval, digits)
            cells.append((mean, std, f"median {median}" + (f", 95 % interval of the mean {span}" if span else "")))
        dice = _span(summary.metrics["dice"].interval, 3) or "–"
        row = {"name": name, "value": metrics.labels[name], "cells": cells, "dice": dice, "summary": summary}
        rows.append(row)
    return rows


def _class_columns(metrics: Metrics) -> list[str]:
    """Classes with a column of their own in the table of cases: all, or none where they would not fit."""
    return list(metrics.labels) if 1 < len(metrics.labels) <= MOST_CLASS_COLUMNS else []


def _case_headings(metrics: Metrics) -> list[str]:
    dice = ["Dice, mean" if len(metrics.labels) > 1 else "Dice", *(f"Dice, {name}" for name in _class_columns(metrics))]
    return [*dice, *(heading for _, heading, _ in COLUMNS[2:5])]


def _seam_shares(metrics: Metrics, records: Mapping[str, PredictionRecord]) -> dict[str, float]:
    """Share of voxels on which overlapping windows disagree, of the scored cases in which any overlap."""
    shares = {case.case_id: records[case.case_id].seam_share for case in metrics.cases if case.case_id in records}
    return {case_id: share for case_id, share in shares.items() if share is not None}


def _case_rows(metrics: Metrics, seams: Mapping[str, float]) -> list[tuple[str, list[Cell]]]:
    rows = []
    for case in metrics.cases:
        dice = [mean_over_classes(case, "dice"), *(case.classes[name].dice for name in _class_columns(metrics))]
        others = [number_cell(mean_over_classes(case, metric), digits) for metric, _, digits in COLUMNS[2:5]]
        share = [Cell(f"{seams[case.case_id]:.1%}", seams[case.case_id])] if case.case_id in seams else []
        missing = [number_cell(float("nan"), 1)] if seams and not share else []
        rows.append((case.case_id, [*(number_cell(value, 3) for value in dice), *others, *share, *missing]))
    return rows


def _slices(metrics: Metrics, cases: Sequence[ReportCase], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    given = {case.case_id: case for case in cases}
    scores = {case.case_id: case for case in metrics.cases}
    shown: list[dict[str, Any]] = []
    for item in choose_shown_cases(metrics):
        if item.case_id not in given:
            continue
        picture = draw_slices(given[item.case_id], labels=metrics.labels, colors=colors)
        by_class = [(name, number_cell(score.dice, 3).text) for name, score in scores[item.case_id].classes.items()]
        shown.append(
            {"case": item, "dice": number_cell(item.mean_dice, 3).text, "by_class": by_class, "picture": picture}
        )
    return shown
