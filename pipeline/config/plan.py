"""Options of `voxfit plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.checks import Auto, Checked, at_least, vram_problems


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
        """What is wrong with these values, each as `key: problem`."""
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
        """What is wrong with these values, each as `key: problem`."""
        return super().problems() + at_least(self, 1, "num_workers") + vram_problems(self.vram)
