"""The plan: everything that follows from the data and the memory budget, as a file a person can read and edit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from pipeline.errors import InputError
from pipeline.geometry import Shape3, Spacing
from pipeline.rungs import BlockName, Execution, NetworkPlan, NormName, Probe, ProbedRung, ProbeOutcome, Record, Rung

__all__ = [
    "BlockName",
    "ChannelPlan",
    "Code",
    "Execution",
    "MemoryPlan",
    "NetworkPlan",
    "NormName",
    "NormalizationScheme",
    "Plan",
    "Precision",
    "Probe",
    "ProbeOutcome",
    "ProbedRung",
    "Record",
    "Rung",
    "SegmentCode",
]

Precision = Literal["bf16-mixed", "16-mixed", "32-true"]
NormalizationScheme = Literal["ct", "zscore", "none"]


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
class MemoryPlan(Record):
    """What one training step was metered to take, in bytes of tensors plus the stated overhead.

    Attributes:
        budget_bytes: The VRAM budget the plan was made for.
        peak_bytes: Metered peak of one step with the chosen patch, batch, precision and recomputation.
        overhead_bytes: What a device adds (context, convolution workspace, fragmentation); an estimate.
        parts: Bytes at the peak by what holds them; they add up to `peak_bytes`, unless there are none.
        host_bytes: Pinned host memory that the step takes for offloaded tensors.
    """

    budget_bytes: int
    peak_bytes: int
    overhead_bytes: int
    parts: dict[str, int]
    host_bytes: int = 0

    def __post_init__(self) -> None:
        names = ("budget_bytes", "peak_bytes", "overhead_bytes", "host_bytes")
        numbers = {name: getattr(self, name) for name in names}
        numbers |= {f"parts.{part}": number for part, number in self.parts.items()}
        problems = [f"{name}: must be at least 0, got {number}" for name, number in numbers.items() if number < 0]
        total = sum(self.parts.values())
        if self.parts and total != self.peak_bytes:
            problems.append(f"parts: must add up to peak_bytes ({self.peak_bytes}), got {total}")
        if problems:
            raise InputError("; ".join(f"memory.{problem}" for problem in problems))

    @property
    def required_bytes(self) -> int:
        """Tensors and overhead together: what has to fit the budget."""
        return self.peak_bytes + self.overhead_bytes


@dataclass(frozen=True, kw_only=True)
class Code(Record):
    """A term of a coding scheme.

    Attributes:
        value: The code, at most 16 characters, such as "10200004".
        scheme: Who gives it, at most 16 characters: "SCT" is SNOMED CT; private ones begin with "99".
        meaning: For people, at most 64 characters.
    """

    value: str
    scheme: str
    meaning: str

    def problems(self) -> list[str]:
        """What is empty, too long or not storable, by attribute."""
        found = []
        for name, text, largest in (
            ("value", self.value, 16),
            ("scheme", self.scheme, 16),
            ("meaning", self.meaning, 64),
        ):
            if not text.strip():
                found.append(f"{name}: must not be empty")
            elif len(text) > largest:
                found.append(f"{name}: must have at most {largest} characters, got {len(text)}")
            elif "\\" in text or not text.isprintable():
                found.append(f"{name}: must hold no backslash and no control characters")
        return found


@dataclass(frozen=True, kw_only=True)
class SegmentCode(Record):
    """What a class is, in coded terms, for DICOM segmentations.

    Attributes:
        category: Kind of thing, such as an anatomical structure.
        type: The thing, such as the kidney.
        modifier: Which one of them, such as the left; None where there is nothing to tell apart.
    """

    category: Code
    type: Code
    modifier: Code | None = None

    def problems(self) -> list[str]:
        """Problems of the codes, by dotted name."""
        codes = {"category": self.category, "type": self.type, "modifier": self.modifier}
        return [f"{name}.{problem}" for name, code in codes.items() if code is not None for problem in code.problems()]


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """Everything that follows from the data and the budget; written by `voxfit plan`.

    Attributes:
        schema_version: Version of this file's format.
        dataset_name: For people.
        fingerprint_hash: Of the fingerprint that the plan was made from.
        channels: One entry per input channel, in order.
        labels: Value in the label files by class name, background first; position is the class index.
        segment_codes: What the classes are in coded terms, by class name, for DICOM segmentations; edit them freely,
            nothing else depends on them. Classes without one get a private code.
        ignore_value: Label value whose voxels take no part in the loss, or None.
        target_spacing: Voxel size in millimetres along i, j, k that cases are resampled to.
        anisotropic_axis: The axis that is resampled apart from the other two, or None.
        median_shape: Median case at the target spacing, after cropping.
        patch_size: Training patch and inference window along i, j, k.
        mirror_axes: Axes that trainings mirror unless told otherwise: those along which no two classes keep an order.
        batch_size: Patches per device and iteration.
        accumulate_grad_batches: Iterations per optimiser step.
        precision: "auto" lets the device decide at training time (bf16 where it has it).
        recompute_stages: Number of stages, from the highest resolution, whose activations are recomputed.
        slab_stages: Number of stages, from the highest resolution, that run in slabs instead.
        offload_stages: Number of slab stages, from the highest resolution, whose kept tensors lie in host memory.
        optimizer: The optimiser whose state was metered.
        ema: Whether averaged weights were counted.
        network: Shape of the network.
        memory: What the meter said.
        candidates: Rungs that were looked at, the chosen one among them; for people, nothing depends on them. Those of
            other patches may belong to other networks.
        fallbacks: Rungs that take less than the chosen one, in the order in which a training that runs out of memory
            steps down. All of them train the same network with the same effective batch.
        notes: Why the planner chose what it did, a sentence each.
        probe: What real steps on the device took; None where none was run.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    dataset_name: str
    fingerprint_hash: str
    channels: tuple[ChannelPlan, ...]
    labels: dict[str, int]
    segment_codes: dict[str, SegmentCode] = field(default_factory=dict)
    ignore_value: int | None = None
    target_spacing: Spacing
    anisotropic_axis: Literal[0, 1, 2] | None = None
    median_shape: Shape3
    patch_size: Shape3
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 1
    accumulate_grad_batches: int = 1
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    recompute_stages: int = 0
    slab_stages: int = 0
    offload_stages: int = 0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    ema: bool = False
    network: NetworkPlan
    memory: MemoryPlan
    candidates: tuple[Rung, ...] = ()
    fallbacks: tuple[Rung, ...] = ()
    notes: tuple[str, ...] = ()
    probe: Probe | None = None

    def __post_init__(self) -> None:
        problems = [
            *self._own_rung().problems(self.network),
            *self._channel_problems(),
            *self._label_problems(),
            *self._code_problems(),
            *self._rung_problems(),
        ]
        if problems:
            raise InputError("; ".join(problems))

    @property
    def execution(self) -> Execution:
        """How the network's stages are run."""
        return Execution(self.recompute_stages, self.slab_stages, self.offload_stages)

    @property
    def rung(self) -> Rung:
        """The chosen step as a rung, with what is predicted of it."""
        rung = self._own_rung()
        if not self.candidates:
            return rung
        # After an edit by hand the step may be none of those that were looked at; then nothing is known of it.
        unknown = replace(rung, required_bytes=0, host_bytes=0)
        return next((known for known in self.candidates if known.is_same_step(rung)), unknown)

    def _own_rung(self) -> Rung:
        return Rung(
            patch_size=self.patch_size,
            batch_size=self.batch_size,
            accumulate_grad_batches=self.accumulate_grad_batches,
            **self.execution._asdict(),
            required_bytes=self.memory.required_bytes,
            host_bytes=self.memory.host_bytes,
        )

    def optimizer_warning(self, optimizer: str, *, ema: bool) -> str:
        """A sentence where a training's optimiser takes other memory than the metered one, or "".

        Args:
            optimizer: Name of the training's optimiser.
            ema: Whether the training averages weights.
        """
        planned, trained = (_optimizer_words(*pair) for pair in ((self.optimizer, self.ema), (optimizer, ema)))
        if planned == trained:
            return ""
        return f"the plan's memory was metered for {planned}, but the training uses {trained}: plan again to count it"

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

    def _rung_problems(self) -> list[str]:
        """Problems of the rungs: fallbacks are trained with, candidates are only shown."""
        found = self._effective_batch_problems()
        for index, rung in enumerate(self.fallbacks):
            found += [f"fallbacks.{index}.{problem}" for problem in rung.problems(self.network)]
        for index, rung in enumerate(self.candidates):
            if min(rung.patch_size) < 1:
                found.append(f"candidates.{index}.patch_size: must be positive, got {list(rung.patch_size)}")
            found += [f"candidates.{index}.{problem}" for problem in rung.number_problems()]
        return found

    def _effective_batch_problems(self) -> list[str]:
        """One problem for all fallbacks with another effective batch: they follow from one edit."""
        others = {
            index: rung for index, rung in enumerate(self.fallbacks) if rung.effective_batch != self.effective_batch
        }
        if not others:
            return []
        sizes = ", ".join(sorted({str(rung.effective_batch) for rung in others.values()}))
        where = ", ".join(f"fallbacks.{index}" for index in others)
        return [
            f"batch_size x accumulate_grad_batches: must be the same in all rungs, but is {self.effective_batch} at the"
            f" top of the file and {sizes} in {where}; change accumulate_grad_batches as well, or both keys in each, or"
            " delete fallbacks, which leaves nothing to step down to"
        ]

    def _channel_problems(self) -> list[str]:
        found = [] if min(self.target_spacing) > 0 else ["target_spacing: must be positive"]
        if not set(self.mirror_axes) <= {0, 1, 2}:
            found.append(f"mirror_axes: only 0, 1 and 2 exist, got {list(self.mirror_axes)}")
        for index, channel in enumerate(self.channels):
            if channel.std <= 0:
                found.append(f"channels.{index}.std: must be positive, got {channel.std}")
            if channel.lower > channel.upper:
                found.append(f"channels.{index}.lower: {channel.lower} is above upper ({channel.upper})")
        return found

    def _label_problems(self) -> list[str]:
        problems = []
        if len(set(self.labels.values())) != len(self.labels) or len(self.labels) < 2:
            problems.append("labels: at least two classes with different values are needed")
        if self.labels and next(iter(self.labels.values())) != 0:
            problems.append("labels: the first class must be the background with value 0")
        return problems

    def _code_problems(self) -> list[str]:
        found = []
        for name, code in self.segment_codes.items():
            if name not in self.class_names[1:]:
                found.append(f"segment_codes.{name}: must be a class other than the background ({self._foreground()})")
            found += [f"segment_codes.{name}.{problem}" for problem in code.problems()]
        return found

    def _foreground(self) -> str:
        return ", ".join(self.class_names[1:])


def _optimizer_words(name: str, ema: bool) -> str:
    return f"{name} with averaged weights" if ema else name
