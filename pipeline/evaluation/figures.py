"""Curves and distributions of the report, as SVG pictures that need nothing beside them."""

from __future__ import annotations

import csv
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.evaluation.summary import Metrics

Curves = dict[str, NDArray[np.float64]]

# Okabe and Ito's colours, which stay apart in every common form of colour blindness, without black.
PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#0072b2")
INK, GRID = "#1f2933", "#e4e7eb"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "svg.hashsalt": "voxfit",
    # Letters stay text: a browser has fonts for scripts that matplotlib's has no outlines of.
    "svg.fonttype": "none",
}
DISTRIBUTIONS = (("dice", "Dice"), ("nsd", "NSD"), ("hd95_mm", "HD95 (mm)"))
MOST_LEGEND_ENTRIES = 8
FEW_CLASSES = 12


def class_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour by class name: colour-blind safe up to seven classes, hues spread by the golden ratio beyond."""
    if len(names) <= len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    hues = np.arange(len(names)) * 0.618034 % 1
    rgb = hsv_to_rgb(np.stack([hues, np.full(len(names), 0.75), np.full(len(names), 0.85)], axis=1))
    return {name: to_hex((r, g, b)) for name, (r, g, b) in zip(names, rgb.tolist(), strict=True)}


def data_uri(content: bytes, mime_type: str) -> str:
    """The bytes as an address that holds them."""
    return f"data:{mime_type};base64,{b64encode(content).decode('ascii')}"


def to_svg(figure: Figure) -> str:
    """The figure as a data URI."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def plain(text: str) -> str:
    """A name as matplotlib draws it letter by letter.

    What stands between two dollar signs would be a formula, and bytes of a file name that are no UTF-8 would end it.
    """
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def read_curves(path: Path) -> Curves:
    """The numeric columns of a run's `metrics.csv`; empty or other fields are NaN.

    Raises:
        InputError: The file cannot be read or has no column `epoch`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read ({error})", where=path) from error
    if rows and "epoch" not in rows[0]:
        raise InputError("has no column `epoch`", where=path, fix="Give the metrics.csv of a run folder")
    names = [name for name in (rows[0] if rows else {}) if name]
    return {name: np.array([_to_number(row[name]) for row in rows]) for name in names}


def _to_number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def draw_curves(curves: Curves, colors: Mapping[str, str]) -> str:
    """Training loss, validation Dice and learning rate over epochs, as a data URI; "" when no epoch is done."""
    if not len(curves.get("epoch", ())):
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.0), layout="constrained")
        loss, val_dice, rate = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 0.8])
        _plot(loss, curves, "train_loss", label="training", color=INK)
        _plot(loss, curves, "val_loss", label="validation", color="#d55e00")
        loss.set(title="Loss", xlabel="epoch")
        for name, color in list(colors.items())[:MOST_LEGEND_ENTRIES]:
            _plot(val_dice, curves, f"val_dice_{name}", label=plain(name), color=color, linewidth=1.2)
        _plot(val_dice, curves, "val_dice_mean", label="mean", color=INK, linewidth=2)
        val_dice.set(title="Validation Dice", xlabel="epoch")
        _plot(rate, curves, "lr", label="", color=INK)
        rate.set(title="Learning rate", xlabel="epoch")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        for axes in (loss, val_dice):
            if len(axes.get_lines()) > 1:
                axes.legend(fontsize=8)
        return to_svg(figure)


def _plot(axes: Axes, curves: Curves, name: str, **style: Any) -> None:
    """Plot a column over epochs, through its known values only: validation is not done in every epoch."""
    values = curves.get(name)
    known = np.isfinite(values) if values is not None else np.zeros(0, bool)
    if values is not None and known.any():
        marker = "o" if known.sum() < 30 else None
        axes.plot(curves["epoch"][known], values[known], marker=marker, markersize=3, **style)


def draw_distributions(metrics: Metrics, colors: Mapping[str, str]) -> str:
    """Every case as a point, with quartiles, by class, for Dice, NSD and HD95; as a data URI."""
    names = list(metrics.labels)
    row_inches = 0.42 if len(names) <= FEW_CLASSES else 0.24
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.0 + row_inches * len(names)), layout="constrained")
        for axes, (metric, title) in zip(figure.subplots(1, 3, sharey=True), DISTRIBUTIONS, strict=True):
            values = [[getattr(case.classes[name], metric) for case in metrics.cases] for name in names]
            _draw_rows(axes, [np.array(row)[~np.isnan(row)] for row in values], [colors[name] for name in names])
            axes.set(title=title, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
            axes.set_yticklabels([plain(name) for name in names])
            axes.grid(axis="y", visible=False)
            axes.set_xlim(*((None, 1.01) if metric != "hd95_mm" else (0, None)))
        return to_svg(figure)


def _draw_rows(axes: Axes, rows: Sequence[NDArray[np.float64]], colors: Sequence[str]) -> None:
    rng = np.random.default_rng(0)
    for height, (values, color) in enumerate(zip(rows, colors, strict=True)):
        if not len(values):
            continue
        lower, median, upper = np.percentile(values, [25, 50, 75])
        axes.barh(height, upper - lower, left=lower, height=0.5, color=color, alpha=0.25)
        axes.plot([median, median], [height - 0.25, height + 0.25], color=INK, linewidth=1.6)
        jitter = height + rng.uniform(-0.17, 0.17, len(values))
        axes.scatter(values, jitter, s=12, color=color, edgecolors=INK, linewidths=0.3, zorder=3)
