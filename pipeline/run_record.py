"""What a training leaves behind of itself in `run.json`: what ran, on what, how far it came, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.plan import Record, Rung
from pipeline.run_files import RunFiles

# What a training is doing.
Phase = Literal["start", "data", "forward", "backward", "optimiser", "validation", "report"]


@dataclass(frozen=True, kw_only=True)
class Counts(Record):
    """How far a training is; three counts that are easily taken for one another.

    Attributes:
        epoch: Epochs finished, validation included.
        iteration: Batches done, of the batch size that the run began with, in finished optimiser steps.
        optimizer_step: Optimiser steps finished.
    """

    epoch: int = 0
    iteration: int = 0
    optimizer_step: int = 0


@dataclass(frozen=True, kw_only=True)
class StepDown(Record):
    """An out-of-memory that a training went on from in a leaner way.

    Attributes:
        where: What the training was doing.
        counts: As of the last finished optimiser step before it.
        continued_from: What was gone on from: the same, or an earlier checkpoint where the step was left half done.
        from_rung, to_rung: How a step was run before and after.
        fallback: Number of `to_rung` among the plan's fallbacks, from 1; 0 is the plan's own step.
        scores_on_host: Whether validations from here on add up their scores in host memory.
        error: The error's first line.
    """

    where: Phase
    counts: Counts
    continued_from: Counts
    from_rung: Rung
    to_rung: Rung
    fallback: int
    scores_on_host: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class InitialWeights(Record):
    """What a training with `init_from` began with.

    Attributes:
        checkpoint: The file that was read.
        weights_hash: Of what was in it.
        epoch: Epochs that it was trained for.
        averaged: Whether its averaged weights were taken.
        num_tensors: How many tensors were taken.
        new: Tensors that began anew, each with the shapes there and here.
        left_out: Tensors there that have no place here.
        differences: What is otherwise than in the plan of the source, a sentence each.
    """

    checkpoint: str
    weights_hash: str
    epoch: int
    averaged: bool
    num_tensors: int
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """`run.json`: what ran, on what, and what came of it.

    Attributes:
        status: "running" from the first start on, "finished" once everything is done.
        fold: Of the split, or "all".
        max_epochs: Epochs in all, as decided at the first start; None in records of earlier versions.
        splits_hash: Of the folds; "" in records of earlier versions.
        versions: Of the software that matters.
        device: The GPU's name, or "cpu".
        precision, precision_reason: What was computed in, and why.
        num_threads, num_workers: Processes as they were resolved.
        patch_size, batch_size, accumulate_grad_batches: As they were resolved, after the last step down. The patch is
            None in records of earlier versions.
        num_ranks: Processes that train together; batch x accumulation x processes is the effective batch.
        step_downs: Every out-of-memory that the training went on from.
        num_parameters: Of the network.
        initial_weights: What it began with; None for random weights.
        counts: Where the training ended.
        best_epoch, best_dice: The best validation during training (mean over classes and cases); none without one.
        validation: Dice of the best weights on every validation case: class by case, None where there is none.
        train_seconds, validation_seconds: Sums over all epochs of `metrics.csv`.
        wall_seconds: What all starts of the training took, saves and validations and what lies between included; while
            it runs, the starts before the newest. None where one of them was of an earlier version.
        predicted_bytes: What the plan predicts that the GPU is to hold for the step that was trained with, context
            included; None on a CPU, and for a step or a network that the plan does not know.
        measured_bytes: Most that was held: on a GPU by the allocator (reserved) and the context together, on a CPU by
            the processes. None before the training ended.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    status: Literal["running", "finished"] = "running"
    fold: int | Literal["all"]
    max_epochs: int | None = None
    splits_hash: str = ""
    versions: dict[str, str]
    device: str
    precision: str
    precision_reason: str
    num_threads: int
    num_workers: int
    patch_size: Shape3 | None = None
    batch_size: int
    accumulate_grad_batches: int
    num_ranks: int = 1
    step_downs: tuple[StepDown, ...] = ()
    num_parameters: int
    initial_weights: InitialWeights | None = None
    counts: Counts = field(default_factory=Counts)
    best_epoch: int | None = None
    best_dice: float | None = None
    validation: dict[str, dict[str, float | None]] = field(default_factory=dict)
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    wall_seconds: float | None = None
    predicted_bytes: int | None = None
    measured_bytes: int | None = None


def known_record(run: RunFiles) -> RunRecord | None:
    """The record of a run that is asked for what it would be good to know; None where it has none that can be read."""
    try:
        return read_artifact(run.record, RunRecord)
    except InputError:
        return None
