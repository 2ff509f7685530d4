"""Options of `voxfit postprocess`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.option_checks import Auto, Checked, at_least, within_unit


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig(Checked):
    """Choose the post-processing that improves held-out predictions, and write it into the run folder."""

    run_dir: str
    """The run folder; postprocessing.json is written there."""
    labels: str
    """Folder of reference labels with the same file names, or the dataset."""
    predictions: str = ""
    """Folder of predicted segmentations; by default the run folder's validation."""
    cases: Literal["held_out", "all"] = "held_out"
    """Which of them: those that the run held out, or all, where every one was predicted by a run that held it out."""
    min_gain: float = 0.002
    """Least gain in a class's mean Dice, on cases that the choice was not made on, for a step to be taken; it must
    exceed two standard errors as well."""
    num_workers: int | Auto = "auto"
    """Processes that read cases; auto takes the CPUs this job was allotted."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        return within_unit(self, "min_gain") + at_least(self, 1, "num_workers")
