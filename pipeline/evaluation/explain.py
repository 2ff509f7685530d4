"""Metrics as a table, for a terminal."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.summary import ClassSummary, Metrics

COLUMNS = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95_mm": ("HD95 mm", 2),
    "assd_mm": ("ASSD mm", 2),
    "nsd": ("NSD", 3),
}


def describe_metrics(metrics: Metrics) -> Group:
    """Mean and spread of each class and the means over classes: print it with a rich console."""
    table = Table(title=f"{len(metrics.cases)} cases, NSD at {metrics.tolerance_mm:g} mm", title_justify="left")
    table.add_column("class")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, summary in metrics.by_class.items():
        # As plain text: a name may look like markup.
        table.add_row(Text(name), *_class_cells(summary))
    table.add_section()
    means = [_number(metrics.overall[metric], digits) for metric, (_, digits) in COLUMNS.items()]
    table.add_row("mean over classes", *means, style="bold")
    failures = [Text(f"not scored: {case_id}: {reason}") for case_id, reason in metrics.failures.items()]
    return Group(table, *failures)


def _class_cells(summary: ClassSummary) -> list[str]:
    values = [(summary.metrics[metric], digits) for metric, (_, digits) in COLUMNS.items()]
    return [f"{_number(one.mean, digits)} ± {_number(one.std, digits)}" for one, digits in values]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
