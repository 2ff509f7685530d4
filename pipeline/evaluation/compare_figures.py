"""Pictures of a comparison: curves of all runs over whatever they are compared by, and differences case by case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from pipeline.evaluation.comparison import MEAN_ROW, ComparedRun, Difference
from pipeline.evaluation.figures import INK, STYLE, plain, to_svg
from pipeline.sizes import GIB

# What curves may be looked at over: column, name on the button, name at the axis.
AXES = (
    ("epoch", "epochs", "epoch"),
    ("optimizer_step", "optimiser steps", "optimiser step"),
    ("samples", "samples", "patches seen"),
    ("hours", "time", "hours of training and validation"),
)
# Column, title, what it is divided by, whether the axis is logarithmic.
PANELS = (
    ("train_loss", "Training loss", 1.0, False),
    ("val_dice_mean", "Validation Dice, mean", 1.0, False),
    ("lr", "Learning rate", 1.0, False),
    ("noise_scale", "Gradient noise scale (patches)", 1.0, True),
    ("peak_vram_bytes", "GPU memory in an epoch (GiB)", GIB, False),
    ("peak_ram_bytes", "Host memory in an epoch (GiB)", GIB, False),
)
MOST_CLASS_PANELS = 6
NUM_COLUMNS = 3
MOST_FOREST_ROWS = 40


# Where panels lie in figures that were drawn, by the titles of the panels.
_Places = dict[tuple[str, ...], list[Bbox]]


def draw_run_curves(runs: Sequence[ComparedRun], colors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Every panel that some run has values for, over each of `AXES` along which an epoch is done.

    Args:
        runs: Compared.
        colors: By name of a run.

    Returns:
        Column, name on the button, and the figure as a data URI.
    """
    # Finding where panels lie takes nearly half of the time of a figure, and they lie alike over every axis.
    places: _Places = {}
    drawn = [(column, text, _draw_over(column, label, runs, colors, places)) for column, text, label in AXES]
    return [each for each in drawn if each[2]]


def _draw_over(axis: str, label: str, runs: Sequence[ComparedRun], colors: Mapping[str, str], places: _Places) -> str:
    """The figure over one axis, or ""; its panels lie where those of `places` do, or are added to them."""
    panels = [panel for panel in _panels(runs) if any(_points(run, axis, panel[0]) is not None for run in runs)]
    if not panels:
        return ""
    num_rows, titles = -(-len(panels) // NUM_COLUMNS), tuple(title for _, title, *_ in panels)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.4 + 2.7 * num_rows), layout=None if titles in places else "constrained")
        grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, runs, axis, panel, colors)
            axes.set_xlabel(label)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, place in zip(grid, places.get(titles, ()), strict=False):
            axes.set_position(place)
        drawn = to_svg(figure)
        places.setdefault(titles, [axes.get_position() for axes in grid])
        return drawn


def _panels(runs: Sequence[ComparedRun]) -> list[tuple[str, str, float, bool]]:
    classes = list(dict.fromkeys(name for run in runs for name in run.class_names))
    by_class = [(f"val_dice_{name}", f"Validation Dice, {name}", 1.0, False) for name in classes]
    return [*PANELS, *(by_class if 1 < len(classes) <= MOST_CLASS_PANELS else [])]


def _points(run: ComparedRun, axis: str, column: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Known values of a column; a peak of 0 bytes is a device that there was not."""
    if column not in run.curves or axis not in run.curves:
        return None
    x, y = np.array(run.curves[axis]), np.array(run.curves[column])
    known = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not column.endswith("_bytes")))
    return (x[known], y[known]) if known.any() else None


def _draw_panel(
    axes: Axes,
    runs: Sequence[ComparedRun],
    axis: str,
    panel: tuple[str, str, float, bool],
    colors: Mapping[str, str],
) -> None:
    column, title, unit, is_log = panel
    smallest = np.inf
    for run in runs:
        points = _points(run, axis, column)
        if points is None:
            continue
        x, y = points
        smallest = min(smallest, y.min())
        marker = "o" if len(x) < 30 else None
        style = "-" if run.state == "finished" else "--"
        axes.plot(x, y / unit, style, color=colors[run.name], marker=marker, markersize=3, linewidth=1.4)
    axes.set_title(plain(title))
    if is_log and smallest > 0:
        axes.set_yscale("log")
    if column == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if column.endswith("_bytes"):
        axes.set_ylim(bottom=0)


def draw_differences(
    rows: Sequence[Difference], cases: Mapping[str, Sequence[float]], *, label: str, color: str
) -> str:
    """Every case's difference as a point, their mean and its interval, a row per class; as a data URI.

    Args:
        rows: The mean over classes and the classes; the first `MOST_FOREST_ROWS` are drawn.
        cases: Differences by row name.
        label: Of the axis, such as "Dice, second - first".
        color: Of the points.
    """
    shown = list(rows)[:MOST_FOREST_ROWS]
    rng = np.random.default_rng(0)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.0 + 0.34 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#9aa5b1", linewidth=1)
        for height, row in enumerate(shown):
            values = np.array(cases.get(row.name, ()), float)
            jitter = height + rng.uniform(-0.2, 0.2, len(values))
            axes.scatter(values, jitter, s=12, color=color, edgecolors=INK, linewidths=0.3, zorder=3)
            if not np.isnan(row.interval.low):
                axes.plot([row.interval.low, row.interval.high], [height, height], color=INK, linewidth=2)
            if not np.isnan(row.difference):
                axes.plot([row.difference], [height], "D", color=INK, markersize=5, zorder=4)
        axes.set(xlabel=plain(label), yticks=range(len(shown)), ylim=(len(shown) - 0.4, -0.6))
        axes.set_yticklabels([plain(row.name) for row in shown], fontweight="normal")
        for tick, row in zip(axes.get_yticklabels(), shown, strict=True):
            tick.set_fontweight("bold" if row.name == MEAN_ROW else "normal")
        axes.grid(axis="y", visible=False)
        return to_svg(figure)
