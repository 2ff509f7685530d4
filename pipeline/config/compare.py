"""Options of `voxfit compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Checked, at_least


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Checked):
    """Put trainings side by side on one page: curves, options, scores case by case, time and memory."""

    runs: tuple[str, ...]
    """Run folders of `voxfit train`, or work folders of `voxfit run` or `voxfit slurm`, whose folds count as one run;
    the others are compared with the first."""
    out: str = "compare.html"
    """Where the page is written."""
    json: bool = False
    """Write the figures as JSON beside the page as well, as NAME.json."""
    scores: Literal["auto", "final", "training"] = "auto"
    """Scores to compare: final ones of predictions on native grids (validation/metrics.json), or those of the training
    (Dice on the grid of the store); auto takes the final ones where every run has them."""
    seed: int = 0
    """Seed of the bootstrap."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = [] if self.runs else ["runs: give one run folder or more"]
        found += [] if self.out.endswith(".html") else [f"out: must end in .html, got {self.out}"]
        return found + at_least(self, 0, "seed")
