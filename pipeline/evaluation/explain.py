"""Metrics as a table, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.summary import ClassSummary, Metrics

COLUMNS = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95_mm": ("HD95 mm", 2),
    "assd_mm": ("ASSD mm", 2),
    "nsd": ("NSD", 3),
}


def describe_metrics(metrics: Metrics) -> Group:
    """Mean and spread of each class, the interval of its Dice, and the means over classes, for a rich console."""
    table = Table(title=_title(metrics), title_justify="left")
    table.add_column("class")
    for heading in _headings():
        table.add_column(heading, justify="right")
    for name, summary in metrics.by_class.items():
        # As plain text: a name may look like markup.
        table.add_row(Text(name), *_class_cells(summary))
    table.add_section()
    interval = _span(metrics.overall_intervals.get("dice", Interval()))
    table.add_row("mean over classes", *_with_interval(_means(metrics.overall), interval), style="bold")
    if metrics.folds:
        table.add_section()
    for name, fold in metrics.folds.items():
        table.add_row(f"{name}, {fold.num_cases} cases", *_with_interval(_means(fold.overall), ""))
    failures = [Text(f"not scored: {case_id}: {reason}") for case_id, reason in metrics.failures.items()]
    return Group(table, *failures)


def _title(metrics: Metrics) -> str:
    title = f"{len(metrics.cases)} cases, NSD at {metrics.tolerance_mm:g} mm"
    if metrics.intervals is None:
        return title
    return (
        f"{title}, 95 % intervals of the mean by bootstrap over {metrics.intervals.num_units} {metrics.intervals.unit}s"
    )


def _headings() -> list[str]:
    first, *others = (heading for heading, _ in COLUMNS.values())
    return [first, f"{first} 95 %", *others]


def _with_interval(cells: list[str], interval: str) -> list[str]:
    """The cells of a row with that of the interval after the first, Dice."""
    return [cells[0], interval, *cells[1:]]


def _means(values: Mapping[str, float]) -> list[str]:
    return [_number(values[metric], digits) for metric, (_, digits) in COLUMNS.items()]


def _span(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"{interval.low:.3f}-{interval.high:.3f}"


def _class_cells(summary: ClassSummary) -> list[str]:
    values = [(summary.metrics[metric], digits) for metric, (_, digits) in COLUMNS.items()]
    cells = [f"{_number(one.mean, digits)} ± {_number(one.std, digits)}" for one, digits in values]
    return _with_interval(cells, _span(summary.metrics["dice"].interval))


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
