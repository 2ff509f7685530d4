"""A comparison as tables, for a terminal."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.durations import format_duration
from pipeline.evaluation.comparison import ComparedRun, Comparison, RunPair
from pipeline.sizes import GIB


def describe_comparison(comparison: Comparison) -> Group:
    """A line per run and a line per pair; the page has the rest."""
    headings = (
        "run",
        "state",
        "fold",
        "epochs",
        "optimiser steps",
        "best Dice",
        "time",
        "VRAM, RAM (GiB)",
        "step-downs",
    )
    table = Table(*headings, title=f"scores: {comparison.source}", title_justify="left")
    for run in comparison.runs:
        # As plain text: a folder's name may look like markup.
        table.add_row(Text(run.name), *_run_cells(run))
    return Group(table, *(Text(line) for pair in comparison.pairs for line in _pair_lines(pair)))


def _run_cells(run: ComparedRun) -> tuple[str, ...]:
    peaks = ["-" if size is None else f"{size / GIB:.2f}" for size in (run.peak_vram_bytes, run.peak_ram_bytes)]
    return (
        run.state,
        str(run.fold),
        f"{run.epoch}" if run.max_epochs is None else f"{run.epoch} of {run.max_epochs}",
        str(run.optimizer_step),
        "-" if run.best_dice is None else f"{run.best_dice:.4f}",
        format_duration(run.train_seconds + run.validation_seconds),
        ", ".join(peaks),
        str(len(run.step_downs)),
    )


def _pair_lines(pair: RunPair) -> list[str]:
    return [_pair_line(pair), *(f"  Mind: {text}." for text in (pair.warning, pair.doubt) if text)]


def _pair_line(pair: RunPair) -> str:
    title = f"{pair.second} against {pair.first}"
    if pair.not_paired:
        return f"{title}: not compared case by case, {pair.not_paired}"
    row = pair.metrics["dice"][0]
    if math.isnan(row.difference):
        return f"{title}: {pair.num_common} common cases, none with a class"
    interval = "" if math.isnan(row.interval.low) else f" ({row.interval.low:+.4f} to {row.interval.high:+.4f})"
    return (
        f"{title}: {row.num_cases} common cases, mean Dice {row.difference:+.4f}{interval}, p {row.p:.2g}"
        f" (Holm {row.adjusted_p:.2g}, at least {row.smallest_p:.2g} possible)"
    )
