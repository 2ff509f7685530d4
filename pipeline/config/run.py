"""Options of `voxfit run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import Auto, Checked, at_least, vram_problems
from pipeline.config.plan import PlanOptions
from pipeline.config.train import TrainOptions, fold_problems
from pipeline.durations import epoch_problems


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Plan, preprocess, train, predict, evaluate and report; the same command again continues where it was."""

    dataset: str
    """A dataset: MSD or nnU-Net folder, dataset.json, CSV or JSON list."""
    work_dir: str
    """Folder for everything that is made."""
    vram: str = "auto"
    """Memory budget such as 24GiB; auto takes the GPU's, or 8GiB where there is none."""
    fold: int | Literal["all"] = 0
    """Fold held out for validation, prediction and the report; "all" trains every fold, one after the other, and pools
    their held-out cases on one page (of `voxfit train`, "all" is one training on every case instead)."""
    max_epochs: int | Auto = 100
    """Epochs, over which the learning rate falls; auto takes as many as fit into max_time by a rehearsal of a few
    steps. It is decided at the first start and kept when the run goes on."""
    tta: Literal["none", "mirror"] = "none"
    """Test-time augmentation of the prediction."""
    skip_bad_cases: bool = False
    """Leave out cases with problems instead of stopping at them (exit code 3)."""
    num_workers: int | Auto = "auto"
    """Processes that read, preprocess and evaluate cases; auto takes the CPUs this job was allotted."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    train: TrainOptions = field(default_factory=TrainOptions)

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = at_least(self, 1, "max_epochs", "num_workers") + vram_problems(self.vram)
        found += epoch_problems(self.max_epochs, self.train.max_time)
        return found + fold_problems(self.fold, self.train.num_folds)
