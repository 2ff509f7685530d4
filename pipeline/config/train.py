"""Options of `voxfit train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.checks import Auto, Checked, at_least, within_unit
from pipeline.config.groups import AugmentationConfig, HardwareConfig, OptimConfig, TrackingConfig
from pipeline.durations import epoch_problems, time_problems


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Checked):
    """How to train, whatever the data and the fold."""

    num_folds: int = 5
    """Folds of the seeded split."""
    patient_pattern: str = ""
    """Regular expression on the case id whose first group is the patient; cases of a patient stay together."""
    iterations_per_epoch: int = 240
    """Training iterations (forward and backward passes) that make an epoch; processes share them evenly."""
    batch_size: int | Auto = "auto"
    """Patches per device and iteration; auto is the plan's."""
    effective_batch: int | Auto = "auto"
    """Patches per optimiser step, reached by accumulation; auto is the plan's."""
    foreground_fraction: float = 0.33
    """Share of patches that are centred on a foreground voxel."""
    validate_every_n_epochs: int = 10
    """Epochs between whole-volume validations; the last epoch is always validated."""
    max_validation_cases: int = 0
    """Cases of a validation during training; 0 takes all. The final one always takes all."""
    save_every_minutes: float = 10.0
    """Minutes between saves within an epoch, at an optimiser step; 0 saves at the end of epochs only."""
    max_time: str = ""
    """Time that this start of the training may take, such as 90m, 11h30m or 2-03:00:00: it begins no epoch that would
    not be finished, validated and saved by then, and ends with exit code 75; the same command goes on."""
    stage_to: str = ""
    """Folder on the node's own disk, such as $TMPDIR: the cases of the fold are copied there first and read from there;
    what is there already, whole and unchanged, is kept. For stores on a shared file system."""
    init_from: str = ""
    """Run folder whose best weights the training begins with, or a checkpoint; a new head where classes are others."""
    freeze: Literal["none", "encoder"] = "none"
    """What of the weights of init_from is kept as it is."""
    seed: int = 0
    """Seed of the split, the weights, the patches and the augmentation."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = at_least(self, 1, "iterations_per_epoch", "batch_size", "effective_batch", "validate_every_n_epochs")
        found += at_least(self, 0, "max_validation_cases", "seed", "save_every_minutes")
        found += time_problems(self.max_time)
        if "$" in self.stage_to:
            found.append(f"stage_to: variables are filled in by the shell only, got {self.stage_to}")
        if self.freeze != "none" and not self.init_from:
            found.append(f"freeze: {self.freeze} goes with init_from: random weights would stay as they are")
        return found + at_least(self, 2, "num_folds") + within_unit(self, "foreground_fraction")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """Train one fold, or all, into a run folder; the same command again resumes."""

    plan: str
    """plan.json."""
    store: str
    """Folder of the store that `voxfit preprocess` filled."""
    run_dir: str
    """The run's own folder: same folder and same options resume."""
    fold: int | Literal["all"] = 0
    """Fold held out for validation; "all" trains on every case and validates on none."""
    max_epochs: int | Auto = 100
    """Epochs, over which the learning rate falls; auto takes as many as fit into max_time by a rehearsal of a few
    steps. It is decided at the first start and kept when the run goes on."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        found = super().problems() + at_least(self, 1, "max_epochs") + fold_problems(self.fold, self.num_folds)
        return found + epoch_problems(self.max_epochs, self.max_time)


def fold_problems(fold: int | str, num_folds: int) -> list[str]:
    """A problem where the option is no fold of that many."""
    if isinstance(fold, str) or 0 <= fold < num_folds:
        return []
    return [f"fold: must be 0 to {num_folds - 1} with num_folds {num_folds}, got {fold}"]
