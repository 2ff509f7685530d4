"""What one real step of a training is made of, what each part took, and what the whole training would take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Splits
from pipeline.plan import Record

PartName = Literal["read", "sample", "train", "save", "validate"]
PARTS: tuple[PartName, ...] = ("read", "sample", "train", "save", "validate")


@dataclass(frozen=True, kw_only=True)
class Part(Record):
    """A part of a step, as it was measured.

    Attributes:
        name: Which.
        what: What was done, in words.
        seconds: Of one: case, patch, iteration, save, case. None where it was not found out.
        rate: The same as a person thinks of it.
        peak_ram_bytes, peak_vram_bytes: Of all processes until then, and of tensors on the GPU; 0 where that was not
            looked at.
        figures: What else a program may want.
        advice: What could be better.
        problem: Why it failed; "" where it did not.
    """

    name: PartName
    what: str = ""
    seconds: float | None = None
    rate: str = ""
    peak_ram_bytes: int = 0
    peak_vram_bytes: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    advice: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class WholeJob(Record):
    """What the whole training would take, by the steps that were made.

    Attributes:
        epochs: In all.
        training_seconds, validation_seconds, saving_seconds: Sums over all of them.
        ends_within_seconds: What an optimiser step and a save take, which a signal has to leave time for.
        device, precision: Where and in what the network ran.
    """

    epochs: int
    training_seconds: float
    validation_seconds: float
    saving_seconds: float
    ends_within_seconds: float
    device: str
    precision: str

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.training_seconds + self.validation_seconds + self.saving_seconds


@dataclass(frozen=True, kw_only=True)
class ReadRequest(Record):
    """A case of a store that is to be read."""

    store: str
    case_id: str


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Record):
    """A training that is to be tried.

    Attributes:
        config: Its options.
        splits: Its folds.
        typical: The case that stands for those of the validation.
        folder: An empty folder for everything that it writes.
    """

    config: TrainConfig
    splits: Splits
    typical: str
    folder: str


ANSWER: TypeAdapter[Part | WholeJob] = TypeAdapter(Part | WholeJob)
