"""Options of every command: the single truth behind flags, YAML files and Python calls.

Precedence: flag > YAML > plan > default. "auto" means that the plan, or the machine, decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from pipeline.durations import epoch_problems, time_problems
from pipeline.option_checks import Auto, Checked, at_least, parse_share, share_problems, vram_problems, within_unit
from pipeline.option_groups import AugmentationConfig, HardwareConfig, OptimConfig, TrackingConfig


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Checked):
    """Show what a dataset or a tree of DICOM files holds and every problem found in it."""

    path: str
    """A dataset (MSD or nnU-Net folder, dataset.json, CSV or JSON list), or a folder with DICOM series at any depth."""
    json: bool = False
    """Print JSON instead of a table."""
    num_workers: int | Auto = "auto"
    """Processes that read cases; auto takes the CPUs this job was allotted."""
    write_dataset: str = ""
    """Make the DICOM series a dataset: the dataset.json to write; references to the series lie beside it."""
    channels: str = ""
    """Series of each channel: CT, MR, PT or patterns for SeriesDescription, as in "CT,PT"; by default one modality."""
    classes: str = ""
    """Structures of each class, as in "tumour=GTV*|Mass,liver=Liver"; by default every name is a class."""
    threshold: float = 0.5
    """Fraction from which on a voxel of a fractional DICOM segmentation is inside."""
    allow_tilt: bool = False
    """Resample DICOM series whose slices are shifted by a tilted gantry, instead of refusing them."""

    def problems(self) -> list[str]:
        wrong = not 0 < self.threshold <= 1
        return [f"threshold: must be above 0 and at most 1, got {self.threshold}"] if wrong else []


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Checked):
    """What a person may decide instead of the planner."""

    patch_size: tuple[int, int, int] | Auto = "auto"
    """Patch along i, j, k; auto takes the largest that fits the budget."""
    target_spacing: tuple[float, float, float] | Auto = "auto"
    """Voxel size in millimetres along i, j, k; auto follows the data."""
    batch_size: int | Auto = 1
    """Patches per device and iteration; auto fills the budget once the patch covers the volume."""
    effective_batch: int | Auto = "auto"
    """Patches per optimiser step, accumulated; auto is 2, or batch_size above that. A number bounds batch_size auto."""
    block: Literal["plain", "residual"] = "plain"
    """Convolution block of the U-Net."""
    norm: Literal["group", "instance", "batch"] = "group"
    """Normalisation; group does not depend on the batch size."""
    num_groups: int = 32
    """Groups of the group norm; a divisor of the channels is taken where they are not a multiple."""
    base_features: int = 32
    """Channels of the highest-resolution stage."""
    max_features: int = 320
    """Largest number of channels of any stage."""
    deep_supervision: bool = True
    """Give lower decoder stages a loss of their own."""
    normalization: Literal["auto", "ct", "zscore", "none"] = "auto"
    """Intensity normalisation; auto decides per channel from its name."""
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    """Training precision; auto takes bf16 where the device has it."""
    max_relative_time: float = 1.75
    """Most that a voxel may take, against the plain step, for a larger field of view; 1 allows the plain step only."""
    offload: Literal["auto", "off"] = "auto"
    """Whether kept tensors may lie in pinned host memory; auto only where nothing else fits the same patch."""
    probe: Literal["auto", "off"] = "auto"
    """Run the chosen step on the GPU and step down until one fits; auto does where there is a GPU."""

    def problems(self) -> list[str]:
        found = at_least(self, 1, "batch_size", "effective_batch", "base_features", "num_groups", "max_relative_time")
        batch, effective = self.batch_size, self.effective_batch
        if isinstance(batch, int) and isinstance(effective, int) and batch > 0 and effective % batch:
            found.append(f"effective_batch: {effective} is not a multiple of batch_size {batch}")
        if self.max_features < self.base_features:
            found.append(f"max_features: {self.max_features} is below base_features {self.base_features}")
        return found


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanOptions):
    """Make plan.json from a dataset and a memory budget."""

    dataset: str
    """A dataset: MSD or nnU-Net folder, dataset.json, CSV or JSON list."""
    out: str = "plan.json"
    """Where the plan is written; fingerprint.json is written beside it."""
    vram: str = "auto"
    """Memory budget such as 24GiB; auto takes the GPU's, or 8GiB where there is none."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser whose state is counted; `voxfit run` takes that of its training."""
    ema: bool = False
    """Count averaged weights as well; `voxfit run` does where its training averages them."""
    skip_bad_cases: bool = False
    """Leave out cases with problems instead of stopping at them (exit code 3)."""
    num_workers: int | Auto = "auto"
    """Processes that read cases; auto takes the CPUs this job was allotted."""

    def problems(self) -> list[str]:
        return super().problems() + at_least(self, 1, "num_workers") + vram_problems(self.vram)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Checked):
    """Crop, resample and normalise every case into the store."""

    dataset: str
    """The dataset that the plan was made from."""
    plan: str
    """plan.json."""
    store: str
    """Folder of the store; finished cases in it are kept."""
    shard: str = ""
    """Make one share only, as in 3/16: jobs on any number of nodes fill one store, and --verify is the last of them."""
    verify: bool = False
    """Make nothing; name the cases that the store lacks (exit code 3), and remove what does not belong to it."""
    num_workers: int | Auto = "auto"
    """Processes; auto takes the CPUs this job was allotted, fewer where memory is short."""
    skip_bad_cases: bool = False
    """Leave out cases that fail instead of stopping at them (exit code 3)."""

    @property
    def share(self) -> tuple[int, int] | None:
        """Number and count of the shares in `shard`; None without."""
        return parse_share(self.shard)

    def problems(self) -> list[str]:
        found = at_least(self, 1, "num_workers") + share_problems(self.shard)
        if self.shard and self.verify:
            found.append("verify: looks at the whole store, so it goes without shard")
        return found


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
        found = super().problems() + at_least(self, 1, "max_epochs") + _fold_problems(self.fold, self.num_folds)
        return found + epoch_problems(self.max_epochs, self.max_time)


def _fold_problems(fold: int | str, num_folds: int) -> list[str]:
    if isinstance(fold, str) or 0 <= fold < num_folds:
        return []
    return [f"fold: must be 0 to {num_folds - 1} with num_folds {num_folds}, got {fold}"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """Score predictions against labels, per case and class."""

    predictions: str
    """Folder of predicted segmentations."""
    labels: str
    """Folder of reference labels with the same file names, or a dataset."""
    out: str = "metrics.json"
    """Where the metrics are written, as JSON; NAME_cases.csv lies beside it with a row per case and class."""
    report: str = ""
    """Write a self-contained HTML report here as well."""
    images: str = ""
    """Folder of images, or a dataset, for the slices in the report."""
    run_dir: str = ""
    """A run folder whose training curves go into the report."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface distance."""
    patient_pattern: str = ""
    """Regular expression on the case id whose first group is the patient, as in training; by default the dataset tells.
    Cases of a patient are drawn together for the intervals of the means."""
    seed: int = 0
    """Seed of these intervals (bootstrap)."""
    num_workers: int | Auto = "auto"
    """Processes; auto takes the CPUs this job was allotted."""

    def problems(self) -> list[str]:
        found = [] if self.out.endswith(".json") else [f"out: must end in .json, got {self.out}"]
        return found + at_least(self, 0, "tolerance_mm", "seed") + at_least(self, 1, "num_workers")


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
        found = at_least(self, 1, "max_epochs", "num_workers") + vram_problems(self.vram)
        found += epoch_problems(self.max_epochs, self.train.max_time)
        return found + _fold_problems(self.fold, self.train.num_folds)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested values for YAML and JSON."""
    plain: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        plain[item.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return plain
