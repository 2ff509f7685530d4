"""Options of `voxfit postprocess`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Auto, Checked, as_words, at_least, repeated, within_unit


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig(Checked):
    """Choose the post-processing that improves held-out predictions, and write it into the run folder, or several."""

    run_dir: tuple[str, ...] | str
    """The run folder, or those of all folds: one choice for all, and postprocessing.json is written into each."""
    labels: str
    """Folder of reference labels with the same file names, or the dataset."""
    predictions: str = ""
    """Folder of predicted segmentations, of all runs together; by default validation in each run folder."""
    cases: Literal["held_out", "all"] = "held_out"
    """Which of them: those that the runs held out, or all, where every one was predicted by a run that held it out."""
    min_gain: float = 0.002
    """Least gain in a class's mean Dice, on cases that the choice was not made on, for a step to be taken; it must
    exceed two standard errors as well."""
    num_workers: int | Auto = "auto"
    """Processes that read cases; auto takes the CPUs this job was allotted."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        return repeated(self, "run_dir") + within_unit(self, "min_gain") + at_least(self, 1, "num_workers")

    @property
    def run_dirs(self) -> tuple[str, ...]:
        """All run folders."""
        return as_words(self.run_dir)
