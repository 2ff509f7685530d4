"""The plan: everything that follows from the data and the memory budget, as a file a person can read and edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.errors import InputError
from pipeline.geometry import Shape3, Spacing

GIB = 1024**3

Precision = Literal["bf16-mixed", "16-mixed", "32-true"]
NormalizationScheme = Literal["ct", "zscore", "none"]
NormName = Literal["group", "instance", "batch"]
BlockName = Literal["plain", "residual"]


class Record:
    """A dataclass that is read from JSON strictly: unknown keys are errors, numbers are not made from text."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class ChannelPlan(Record):
    """How one input channel is normalised.

    Attributes:
        name: The channel's name in the dataset, such as "CT" or "T1".
        scheme: "ct" clips to [lower, upper] and divides by the dataset's `std` after subtracting its `mean`;
            "zscore" uses each case's own mean and standard deviation; "none" leaves the values.
        lower, upper: 0.5 and 99.5 percentile of foreground voxels over the dataset (used by "ct" only).
        mean, std: of foreground voxels over the dataset (used by "ct" only).
        use_body_mask: Take mean and standard deviation over the body alone, the voxels that are not 0 in some channel
            with holes filled; the others stay 0 (used by "zscore" only). One choice for the whole dataset.
    """

    name: str
    scheme: NormalizationScheme
    lower: float = 0.0
    upper: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    use_body_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class NetworkPlan(Record):
    """The shape of the 3D U-Net; one entry per stage, highest resolution first.

    Attributes:
        features_per_stage: Channels of each stage.
        strides: Down-sampling into each stage along i, j, k; the first is (1, 1, 1).
        kernel_sizes: Convolution kernel of each stage.
        num_blocks_per_stage: Convolution blocks of each encoder stage; the decoder uses the plan's
            `num_decoder_blocks` in each.
        num_decoder_blocks: Convolution blocks of each decoder stage.
        block: "plain" (convolution, norm, activation) or "residual".
        norm: Normalisation; "group" does not depend on the batch size.
        num_groups: Groups of the group norm, clipped to a divisor of the channels. 32 is the figure of its authors
            (Wu and He 2018); few groups learn far more slowly here, see docs/benchmarks.md.
        deep_supervision: Whether lower decoder stages get a loss of their own.
    """

    features_per_stage: tuple[int, ...]
    strides: tuple[Shape3, ...]
    kernel_sizes: tuple[Shape3, ...]
    num_blocks_per_stage: tuple[int, ...]
    num_decoder_blocks: int = 2
    block: BlockName = "plain"
    norm: NormName = "group"
    num_groups: int = 32
    deep_supervision: bool = True

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in ("features_per_stage", "strides", "kernel_sizes", "num_blocks_per_stage")
        }
        if len(set(lengths.values())) != 1:
            raise InputError(f"network: one entry per stage is needed, got {lengths}")
        if self.num_stages < 2:
            raise InputError("network.features_per_stage: at least two stages are needed")

    @property
    def num_stages(self) -> int:
        """Number of resolutions, the bottleneck included."""
        return len(self.features_per_stage)

    @property
    def total_stride(self) -> Shape3:
        """Product of all strides: patch sizes are multiples of it."""
        product = [1, 1, 1]
        for stride in self.strides:
            product = [p * s for p, s in zip(product, stride, strict=True)]
        return product[0], product[1], product[2]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Record):
    """What one training step was metered to take, in bytes of tensors plus the stated overhead.

    Attributes:
        budget_bytes: The VRAM budget the plan was made for.
        peak_bytes: Metered peak of one step with the chosen patch, batch, precision and recomputation.
        overhead_bytes: What a device adds (context, convolution workspace, fragmentation); an estimate.
        parts: Bytes at the peak by what holds them; they add up to `peak_bytes`.
    """

    budget_bytes: int
    peak_bytes: int
    overhead_bytes: int
    parts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Rung(Record):
    """One way to run a training step, and what it takes.

    Attributes:
        patch_size: Training patch along i, j, k.
        batch_size: Patches per device and iteration.
        accumulate_grad_batches: Iterations per optimiser step.
        recompute_stages: Stages, from the highest resolution, whose activations are recomputed.
        slab_stages: Stages, from the highest resolution, that run in slabs instead; they are not recomputed.
        offload_stages: Slab stages, from the highest resolution, whose kept tensors lie in host memory.
        required_bytes: Predicted memory of the device, overhead included.
        host_bytes: Predicted pinned host memory.
        relative_time: Time per voxel against the plain step (no recomputation, no slabs), estimated.
    """

    patch_size: Shape3
    batch_size: int = 1
    accumulate_grad_batches: int = 1
    recompute_stages: int = 0
    slab_stages: int = 0
    offload_stages: int = 0
    required_bytes: int = 0
    host_bytes: int = 0
    relative_time: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """Everything that follows from the data and the budget; written by `voxfit plan`.

    Attributes:
        schema_version: Version of this file's format.
        dataset_name: For people.
        fingerprint_hash: Of the fingerprint that the plan was made from.
        channels: One entry per input channel, in order.
        labels: Value in the label files by class name, background first; position is the class index.
        ignore_value: Label value whose voxels take no part in the loss, or None.
        target_spacing: Voxel size in millimetres along i, j, k that cases are resampled to.
        anisotropic_axis: The axis that is resampled apart from the other two, or None.
        median_shape: Median case at the target spacing, after cropping.
        patch_size: Training patch and inference window along i, j, k.
        batch_size: Patches per device and iteration.
        accumulate_grad_batches: Iterations per optimiser step.
        precision: "auto" lets the device decide at training time (bf16 where it has it).
        recompute_stages: Number of stages, from the highest resolution, whose activations are recomputed.
        slab_stages: Number of stages, from the highest resolution, that run in slabs instead.
        offload_stages: Number of slab stages, from the highest resolution, whose kept tensors lie in host memory.
        network: Shape of the network.
        memory: What the meter said.
        candidates: Rungs that were looked at, the chosen one among them.
        fallbacks: Rungs that take less than the chosen one, in the order in which a training that runs out of memory
            steps down. All of them train the same network.
        notes: Why the planner chose what it did, a sentence each.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    dataset_name: str
    fingerprint_hash: str
    channels: tuple[ChannelPlan, ...]
    labels: dict[str, int]
    ignore_value: int | None = None
    target_spacing: Spacing
    anisotropic_axis: Literal[0, 1, 2] | None = None
    median_shape: Shape3
    patch_size: Shape3
    batch_size: int = 1
    accumulate_grad_batches: int = 1
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    recompute_stages: int = 0
    slab_stages: int = 0
    offload_stages: int = 0
    network: NetworkPlan
    memory: MemoryPlan
    candidates: tuple[Rung, ...] = ()
    fallbacks: tuple[Rung, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [*self._patch_problems(), *self._count_problems()]
        if problems:
            raise InputError("; ".join(problems))

    @property
    def num_channels(self) -> int:
        """Input channels."""
        return len(self.channels)

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return len(self.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index, background first."""
        return tuple(self.labels)

    @property
    def label_values(self) -> tuple[int, ...]:
        """Values in the label files by class index."""
        return tuple(self.labels.values())

    @property
    def effective_batch(self) -> int:
        """Patches per optimiser step and device."""
        return self.batch_size * self.accumulate_grad_batches

    def _patch_problems(self) -> list[str]:
        stride = self.network.total_stride
        if all(size > 0 and size % s == 0 for size, s in zip(self.patch_size, stride, strict=True)):
            return []
        return [f"patch_size: {list(self.patch_size)} is not a multiple of the network's stride {list(stride)}"]

    def _count_problems(self) -> list[str]:
        problems = [
            f"{name}: must be at least 1, got {getattr(self, name)}"
            for name in ("batch_size", "accumulate_grad_batches")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.recompute_stages <= self.network.num_stages:
            problems.append(f"recompute_stages: must be 0 to {self.network.num_stages}, got {self.recompute_stages}")
        if len(set(self.labels.values())) != len(self.labels) or len(self.labels) < 2:
            problems.append("labels: at least two classes with different values are needed")
        if self.labels and next(iter(self.labels.values())) != 0:
            problems.append("labels: the first class must be the background with value 0")
        return problems
