"""How a training step is run: the network, ways to run its stages, rungs of a ladder, what a probe found of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from pydantic import ConfigDict

from pipeline.errors import InputError
from pipeline.geometry import Shape3, format_shape

NormName = Literal["group", "instance", "batch"]
BlockName = Literal["plain", "residual"]
# What may come of trying a rung. Only "fits" and "out of memory" say something about its memory.
ProbeOutcome = Literal["fits", "out of memory", "error", "died", "timed out", "busy"]


class Record:
    """A dataclass that is read from JSON strictly: no unknown keys, no infinite numbers, no numbers made from text."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class NetworkPlan(Record):
    """The shape of the 3D U-Net; one entry per stage, highest resolution first.

    Attributes:
        features_per_stage: Channels of each stage.
        strides: Down-sampling into each stage along i, j, k; the first is (1, 1, 1).
        kernel_sizes: Convolution kernel of each stage; odd, so that voxels keep their places.
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
        if problems := [*self._number_problems(), *self._stage_problems()]:
            raise InputError("; ".join(f"network.{problem}" for problem in problems))

    def _number_problems(self) -> list[str]:
        numbers = {name: getattr(self, name) for name in ("num_groups", "num_decoder_blocks")}
        for name in ("features_per_stage", "num_blocks_per_stage"):
            numbers |= {f"{name}.{stage}": number for stage, number in enumerate(getattr(self, name))}
        return [f"{name}: must be at least 1, got {number}" for name, number in numbers.items() if number < 1]

    def _stage_problems(self) -> list[str]:
        found = []
        for stage, (stride, kernel) in enumerate(zip(self.strides, self.kernel_sizes, strict=True)):
            if min(stride) < 1 or (stage == 0 and max(stride) > 1):
                found.append(f"strides.{stage}: must be {'at least 1' if stage else '[1, 1, 1]'}, got {list(stride)}")
            if min(kernel) < 1 or not all(size % 2 for size in kernel):
                found.append(f"kernel_sizes.{stage}: must be odd and at least 1, got {list(kernel)}")
        return found

    @property
    def num_stages(self) -> int:
        """Number of resolutions, the bottleneck included."""
        return len(self.features_per_stage)

    @property
    def can_run_in_slabs(self) -> bool:
        """Whether stages may run in slabs: plain blocks with a norm that takes statistics per sample."""
        return self.block == "plain" and self.norm in ("group", "instance")

    @property
    def total_stride(self) -> Shape3:
        """Product of all strides: patch sizes are multiples of it."""
        product = [1, 1, 1]
        for stride in self.strides:
            product = [p * s for p, s in zip(product, stride, strict=True)]
        return product[0], product[1], product[2]

    def patch_problems(self, patch_size: Shape3) -> list[str]:
        """What keeps it from training on patches of `patch_size` voxels."""
        stride, shown = self.total_stride, list(patch_size)
        if any(size < 1 or size % s for size, s in zip(patch_size, stride, strict=True)):
            suitable = [max(1, -(-size // s)) * s for size, s in zip(patch_size, stride, strict=True)]
            multiple = f"is not a multiple of the network's stride {list(stride)}"
            return [f"patch_size: {shown} {multiple}; the next larger that is: {suitable}"]
        voxels = prod(patch_size)
        for stage, (features, steps) in enumerate(zip(self.features_per_stage, self.strides, strict=True), start=1):
            voxels //= prod(steps)
            has_lone_channels = self.norm == "instance" or (self.norm == "group" and self.num_groups >= features)
            if voxels == 1 and has_lone_channels:
                lone = (
                    f"leaves a single voxel in stage {stage}, where {self.norm} norm has no second value of a channel"
                )
                return [f"patch_size: {shown} {lone}; take a larger patch"]
        return []


class Execution(NamedTuple):
    """How the stages of the network are run; all ways compute the same.

    Attributes:
        recompute_stages: Stages, from the highest resolution, whose activations are recomputed.
        slab_stages: Stages, from the highest resolution, that run in slabs instead; they are not recomputed.
        offload_stages: Slab stages, from the highest resolution, whose kept tensors lie in host memory.
    """

    recompute_stages: int = 0
    slab_stages: int = 0
    offload_stages: int = 0

    def __str__(self) -> str:
        """In words, with stages counted from 1, the highest resolution."""
        parts = []
        if self.slab_stages:
            host = f" ({_stages(0, self.offload_stages)} in host memory)" if self.offload_stages else ""
            parts.append(f"slabs {_stages(0, self.slab_stages)}{host}")
        if self.recompute_stages > self.slab_stages:
            parts.append(f"recompute {_stages(self.slab_stages, self.recompute_stages)}")
        return ", ".join(parts) or "plain"

    def problems(self, network: NetworkPlan) -> list[str]:
        """What `network` cannot do of it."""
        stages = network.num_stages
        found = []
        if not 0 <= self.recompute_stages <= stages:
            found.append(f"recompute_stages: must be 0 to {stages}, got {self.recompute_stages}")
        if not 0 <= self.slab_stages <= stages:
            found.append(f"slab_stages: must be 0 to {stages}, got {self.slab_stages}")
        if self.slab_stages and not network.can_run_in_slabs:
            found.append(f"slab_stages: must be 0 with {network.block} blocks and {network.norm} norm")
        if not 0 <= self.offload_stages <= max(0, self.slab_stages):
            limit = f"slab_stages ({self.slab_stages})"
            found.append(f"offload_stages: must be 0 to {limit}, got {self.offload_stages}")
        return found


def _stages(start: int, stop: int) -> str:
    return f"{start + 1}" if stop - start == 1 else f"{start + 1}-{stop}"


@dataclass(frozen=True, kw_only=True)
class Rung(Record):
    """One way to run a training step, and what it takes.

    Attributes:
        patch_size: Training patch along i, j, k.
        batch_size: Patches per device and iteration.
        accumulate_grad_batches: Iterations per optimiser step.
        recompute_stages, slab_stages, offload_stages: As in `Execution`.
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

    @property
    def execution(self) -> Execution:
        """How the network's stages are run."""
        return Execution(self.recompute_stages, self.slab_stages, self.offload_stages)

    @property
    def effective_batch(self) -> int:
        """Patches per optimiser step and device."""
        return self.batch_size * self.accumulate_grad_batches

    @property
    def voxels(self) -> int:
        """Voxels of one iteration."""
        return prod(self.patch_size) * self.batch_size

    def __str__(self) -> str:
        """In words."""
        batch = f"{self.batch_size} x accumulation {self.accumulate_grad_batches}"
        return f"patch {format_shape(self.patch_size)}, batch {batch}, {self.execution}"

    def is_same_step(self, other: Rung) -> bool:
        """Whether both run the same step, whatever is predicted of it."""
        return _step(self) == _step(other)

    def problems(self, network: NetworkPlan) -> list[str]:
        """What is wrong with it for training `network`."""
        return [
            *network.patch_problems(self.patch_size),
            *self.number_problems(),
            *self.execution.problems(network),
        ]

    def number_problems(self) -> list[str]:
        """What is wrong with its numbers of patches and with what is predicted of it."""
        least = {
            "batch_size": 1,
            "accumulate_grad_batches": 1,
            "required_bytes": 0,
            "host_bytes": 0,
            "relative_time": 0,
        }
        return [
            f"{name}: must be at least {number}, got {getattr(self, name)}"
            for name, number in least.items()
            if getattr(self, name) < number
        ]


def _step(rung: Rung) -> tuple[object, ...]:
    return rung.patch_size, rung.batch_size, rung.accumulate_grad_batches, rung.execution


@dataclass(frozen=True, kw_only=True)
class ProbedRung(Record):
    """What came of running a rung's step for real, in a process of its own.

    Attributes:
        rung: That was run.
        outcome: "fits" and "out of memory" answer the question. "error" is any other error of the step; "died" a
            process that a signal ended, "timed out" one that took too long, and "busy" a device that others held so
            much memory of that the budget could not be tried.
        measured_bytes: Most that was held: on a GPU by the allocator (reserved) and the context together, on a CPU by
            the process beyond what it held before the step. Of an out-of-memory, what was held before it.
        allocated_bytes: Most that tensors held on the GPU; 0 on a CPU.
        message: What happened, where it does not fit.
    """

    rung: Rung
    outcome: ProbeOutcome
    measured_bytes: int = 0
    allocated_bytes: int = 0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe(Record):
    """Real steps of a plan's rungs under its budget.

    Attributes:
        device: The GPU's name, or "cpu".
        budget_bytes: That the steps were held to.
        tried: Every rung that was run, in that order.
    """

    device: str
    budget_bytes: int
    tried: tuple[ProbedRung, ...]

    @property
    def fitting(self) -> ProbedRung | None:
        """The first of the ladder that ran and fitted: the last to fit, as the search goes up from its first fit."""
        return next((each for each in reversed(self.tried) if each.outcome == "fits"), None)
