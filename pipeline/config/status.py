"""Options of `voxfit status`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.checks import Checked


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Checked):
    """Say how far trainings are, and whether they are alive, stopped, finished or gone."""

    path: str
    """A run folder, or a work folder with several folds."""
    json: bool = False
    """Print JSON instead of a table."""
