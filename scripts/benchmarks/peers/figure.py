"""Dice over training time, a line per side."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from peers.sides import LONGER, UNMIRRORED

SIDES = {
    "voxfit": ("voxfit", "#0072b2", "o", "-"),
    LONGER: ("voxfit, for long trainings", "#0072b2", "D", ":"),
    "nnunet": ("nnU-Net", "#d55e00", "s", "-"),
    f"nnunet{UNMIRRORED}": ("nnU-Net, no mirroring", "#d55e00", "s", ":"),
    "monai": ("MONAI", "#767676", "^", "-"),
    f"monai{UNMIRRORED}": ("MONAI, no mirroring", "#767676", "^", ":"),
}


def points_of(cells: list[dict[str, Any]], side: str) -> list[tuple[float, float]]:
    """Minutes that trainings really took and Dice of their best way to predict, means over seeds, by rising budget."""
    by_budget: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for cell in cells:
        if cell["side"] == side and cell["predictions"]:
            dice = max(each["dice"] for each in cell["predictions"].values())
            by_budget[cell["minutes"]].append((cell["training_seconds"] / 60, dice))
    return [
        (sum(minutes for minutes, _ in found) / len(found), sum(dice for _, dice in found) / len(found))
        for _, found in sorted(by_budget.items())
    ]


def draw_accuracy(cells: list[dict[str, Any]], path: Path) -> None:
    """Write the figure; text stays text in an SVG, which keeps it small and legible to a screen reader."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "voxfit"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for side, (name, color, marker, line) in SIDES.items():
            points = points_of(cells, side)
            if points:
                # A single point has no line that tells it from others.
                face = "white" if side == LONGER or side.endswith(UNMIRRORED) else color
                style = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": line}
                axes.plot(*zip(*points, strict=True), **style, label=name)
        axes.set_xlabel("training time on the same CPUs (minutes)")
        axes.set_ylabel("mean Dice of held-out cases")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
