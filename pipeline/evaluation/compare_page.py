"""The page of a comparison: one HTML file with curves, options, scores case by case, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import write_text
from pipeline.durations import format_duration
from pipeline.evaluation.bootstrap import FEW_UNITS
from pipeline.evaluation.compare_figures import MOST_FOREST_ROWS, draw_differences, draw_run_curves
from pipeline.evaluation.comparison import MEAN_ROW, ComparedRun, Comparison, Difference, RunMeans, RunPair, mean_known
from pipeline.evaluation.figures import class_colors
from pipeline.evaluation.metrics import NAN
from pipeline.evaluation.page import Cell, number_cell, render_page
from pipeline.sizes import GIB

# Heading, digits after the point, whether more is better.
METRICS = {"dice": ("Dice", 3, True), "nsd": ("NSD", 3, True), "hd95_mm": ("HD95 (mm)", 2, False)}
# Classes with rows of their own in the table of cases; with more, that table would be of no use to anybody.
MOST_CASE_CLASSES = 8


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page as one self-contained HTML file, atomically."""
    runs = comparison.runs
    colors = class_colors([run.name for run in runs])
    html = render_page(
        "compare.html.j2",
        comparison=comparison,
        colors=colors,
        run_rows=[_run_row(run) for run in runs],
        unfinished=[run for run in runs if run.state != "finished"],
        curves=draw_run_curves(runs, colors),
        metrics=METRICS,
        scores=_score_tables(comparison),
        pairs=[_pair_view(pair, comparison, colors) for pair in comparison.pairs],
        case_headings=["case", "class", *(run.name for run in runs), *(f"{run.name} − first" for run in runs[1:])],
        case_rows=_case_rows(comparison),
        most_case_classes=MOST_CASE_CLASSES,
        settings=list(comparison.different_settings.items()),
        few_units=FEW_UNITS,
    )
    write_text(path, html)


def _run_row(run: ComparedRun) -> dict[str, Any]:
    """The lines of a run in the first two tables."""
    epochs = f"{run.epoch} of {run.max_epochs}" if run.max_epochs is not None else str(run.epoch)
    seconds = run.train_seconds + run.validation_seconds
    progress = [
        Cell(epochs, run.epoch),
        Cell(str(run.optimizer_step), run.optimizer_step),
        Cell(str(run.samples), run.samples),
        number_cell(NAN if run.best_dice is None else run.best_dice, 3),
        Cell("–", NAN) if run.best_epoch is None else Cell(str(run.best_epoch), run.best_epoch),
    ]
    costs = [
        Cell(format_duration(seconds), seconds),
        Cell(format_duration(run.validation_seconds), run.validation_seconds),
        Cell("–", NAN) if run.wall_seconds is None else Cell(format_duration(run.wall_seconds), run.wall_seconds),
        number_cell(NAN if run.seconds_per_step is None else run.seconds_per_step, 3),
        *map(_gib, (run.peak_vram_bytes, run.peak_ram_bytes, run.predicted_bytes, run.measured_bytes)),
        _ratio(run.measured_bytes, run.predicted_bytes),
        Cell(str(len(run.step_downs)), len(run.step_downs)),
    ]
    return {"run": run, "progress": progress, "costs": costs}


def _gib(size: int | None) -> Cell:
    return number_cell(NAN if size is None else size / GIB, 2)


def _ratio(measured: int | None, predicted: int | None) -> Cell:
    return number_cell(measured / predicted if measured and predicted else NAN, 2)


def _score_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """Per metric, a row for the mean and for each class with every run's mean and interval."""
    tables = []
    for metric in METRICS:
        means = [comparison.means.get(run.name, {}).get(metric) for run in comparison.runs]
        if not any(each is not None and each.num_cases for each in means):
            continue
        names = dict.fromkeys([MEAN_ROW, *(name for each in means if each for name in each.means)])
        rows = [(name, [_with_interval(each, name, METRICS[metric][1]) for each in means]) for name in names]
        tables.append({"metric": metric, "rows": rows, "numbers": [each.num_cases if each else 0 for each in means]})
    return tables


def _with_interval(means: RunMeans | None, name: str, digits: int) -> tuple[Cell, str]:
    if means is None or name not in means.means:
        return Cell("–", NAN), ""
    interval = means.intervals[name]
    span = "" if np.isnan(interval.low) else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"
    return number_cell(means.means[name], digits), span


def _pair_view(pair: RunPair, comparison: Comparison, colors: Mapping[str, str]) -> dict[str, Any]:
    tables = []
    for metric, rows in pair.metrics.items():
        heading, digits, more_is_better = METRICS[metric]
        cases = _case_differences(comparison, pair, metric)
        label = f"{heading}, {pair.second} − {pair.first}"
        tables.append(
            {
                "metric": metric,
                "rows": [_difference_row(row, digits) for row in rows],
                "picture": draw_differences(rows, cases, label=label, color=colors[pair.second]),
                "left_out": max(0, len(rows) - MOST_FOREST_ROWS),
                "more_is_better": more_is_better,
            }
        )
    rows = pair.metrics.get("dice", ())
    return {"pair": pair, "tables": tables, "num_units": rows[0].num_units if rows else 0}


def _difference_row(row: Difference, digits: int) -> dict[str, Any]:
    low, high = row.interval.low, row.interval.high
    span = "–" if np.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
    return {
        "name": row.name,
        "cells": [
            Cell(str(row.num_cases), row.num_cases),
            number_cell(row.first, digits),
            number_cell(row.second, digits),
            number_cell(row.difference, digits, sign=True),
            Cell(span, low),
            Cell(f"{row.num_higher} / {row.num_lower} / {row.num_equal}", row.num_higher - row.num_lower),
            _p(row.p),
            _p(row.adjusted_p),
            _p(row.smallest_p),
        ],
    }


def _p(value: float) -> Cell:
    return Cell("–" if np.isnan(value) else f"{value:.2g}" if value >= 1e-4 else "< 0.0001", value)


def _case_differences(comparison: Comparison, pair: RunPair, metric: str) -> dict[str, Sequence[float]]:
    """Differences of all cases that both have, by row name."""
    tables = [
        next(run for run in comparison.runs if run.name == name).scores[comparison.source][metric]
        for name in (pair.first, pair.second)
    ]
    common = sorted(set(tables[0]) & set(tables[1]))
    names = [row.name for row in pair.metrics[metric]][1:]
    found: dict[str, Sequence[float]] = {}
    for name in names:
        changes = [tables[1][case].get(name, NAN) - tables[0][case].get(name, NAN) for case in common]
        found[name] = [value for value in changes if not np.isnan(value)]
    means = [
        mean_known(tables[1][case].get(name, NAN) - tables[0][case].get(name, NAN) for name in names) for case in common
    ]
    found[MEAN_ROW] = [value for value in means if not np.isnan(value)]
    return found


def _case_rows(comparison: Comparison) -> list[tuple[str, str, list[Cell]]]:
    """Dice of every case and class (the mean alone with many classes), by run, and differences with the first run.

    Runs on other datasets than the first one's have no value here: their cases are others.
    """
    runs = comparison.runs
    tables = [
        run.scores.get(comparison.source, {}).get("dice", {}) if run.dataset_name == runs[0].dataset_name else {}
        for run in runs
    ]
    rows = []
    for case in sorted(set().union(*tables)):
        known = [table.get(case, {}) for table in tables]
        classes = dict.fromkeys(name for each in known for name in each)
        shown = [MEAN_ROW, *(classes if 1 < len(classes) <= MOST_CASE_CLASSES else ())]
        for name in shown:
            values = [mean_known(each.values()) if name == MEAN_ROW else each.get(name, NAN) for each in known]
            changes = [value - values[0] for value in values[1:]]
            cells = [*(number_cell(v, 3) for v in values), *(number_cell(v, 3, sign=True) for v in changes)]
            rows.append((case, name, cells))
    return rows
