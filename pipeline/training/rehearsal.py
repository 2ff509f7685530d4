"""What a training takes: measured by training a little, of which nothing is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pipeline.artifacts import read_artifact
from pipeline.config import TrackingConfig, TrainConfig
from pipeline.datasets.splits import Fold
from pipeline.durations import format_duration
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.run_record import RunRecord
from pipeline.training.metrics_table import VALIDATION_SECONDS, MetricsTable
from pipeline.training.ranks import Ranks
from pipeline.training.run_folder import RunFolder
from pipeline.training.time_budget import MARGIN

logger = get_logger("train")
# Optimiser steps of an epoch of the rehearsal: one epoch to warm up, one that is timed.
STEPS = 4


class Parts(NamedTuple):
    """Seconds of a whole training, by what it does."""

    training: float
    validation: float
    saving: float

    @property
    def total(self) -> float:
        """Of all of it."""
        return self.training + self.validation + self.saving


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that parts of a training take.

    Attributes:
        iteration: One, data included.
        case: Validating one.
        saving: Writing the checkpoints of an epoch and its record.
    """

    iteration: float
    case: float
    saving: float

    def seconds_of(self, epochs: int, config: TrainConfig, *, num_cases: int) -> Parts:
        """What a whole training takes, with its validations and the final one, without a margin."""
        seen = min(config.max_validation_cases or num_cases, num_cases)
        every = config.validate_every_n_epochs
        validations = epochs // every + (epochs % every > 0)
        # All cases are scored at the end where only some were before.
        cases = seen * validations + (num_cases if seen < num_cases else 0)
        return Parts(
            training=epochs * config.iterations_per_epoch * self.iteration,
            validation=cases * self.case,
            saving=epochs * self.saving,
        )

    def epochs_within(self, seconds: float, config: TrainConfig, *, num_cases: int) -> int:
        """Most epochs that fit, with their validations and the final one.

        Raises:
            InputError: Not even one fits.
        """
        seen = min(config.max_validation_cases or num_cases, num_cases)
        epoch = MARGIN * (config.iterations_per_epoch * self.iteration + self.saving)
        validation = MARGIN * seen * self.case
        # The last epoch is validated in any case, and all cases are scored at the end where only some were before.
        left = seconds - validation - (MARGIN * num_cases * self.case if seen < num_cases else 0)
        epochs = int(left / (epoch + validation / config.validate_every_n_epochs))
        if epochs < 1:
            fix = "Give more time, or fewer iterations_per_epoch or max_validation_cases, or max_epochs as a number"
            raise InputError(
                f"one epoch with its validation takes {format_duration(epoch + seconds - left)}, "
                f"{format_duration(seconds)} are left",
                where="max_time",
                fix=fix,
            )
        return epochs


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a rehearsal came to.

    Attributes:
        cost: Seconds.
        iterations: That were timed.
        data_wait_share: Share of their seconds that was spent waiting for data.
        peak_ram_bytes, peak_vram_bytes: Of the processes, and of tensors on the GPU.
        checkpoint_bytes: Of one checkpoint.
        record: As of any run: device, precision, processes, what memory was predicted, how it ran out.
    """

    cost: Cost
    iterations: int
    data_wait_share: float
    peak_ram_bytes: int
    peak_vram_bytes: int
    checkpoint_bytes: int
    record: RunRecord


Train = Callable[[TrainConfig, Fold], object]


def rehearse(train: Train, config: TrainConfig, fold: Fold, *, iterations_per_step: int, ranks: Ranks) -> Rehearsal:
    """Train two short epochs with one validation case, beside what is in the run folder, and see what they took.

    Args:
        train: Trains into the folder that the options name.
        config: Options of the training.
        fold: Its cases.
        iterations_per_step: Iterations of an optimiser step.
        ranks: Who trains.
    """
    logger.info("max_epochs auto: training for a few steps to see how many epochs fit; nothing of it is kept")
    with _shared_folder(config.run_dir, ranks) as path, _quiet():
        iterations = _run_short(Path(path), train, config, fold, iterations_per_step)
        # The first one has written what it came to, which others may not see yet.
        return ranks.from_first(_read(Path(path), iterations) if ranks.is_first else None)


def rehearse_in(folder: Path, train: Train, config: TrainConfig, fold: Fold, *, iterations_per_step: int) -> Rehearsal:
    """The same in a folder of the caller's, who finds there how far it came when it fails."""
    return _read(folder, _run_short(folder, train, config, fold, iterations_per_step))


def _run_short(folder: Path, train: Train, config: TrainConfig, fold: Fold, iterations_per_step: int) -> int:
    """Train; the iterations of an epoch."""
    iterations = min(config.iterations_per_epoch, STEPS * iterations_per_step)
    short = {"max_epochs": 2, "iterations_per_epoch": iterations, "validate_every_n_epochs": 1}
    train(
        replace(
            config,
            **short,
            run_dir=str(folder),
            stage_to="",
            max_time="",
            save_every_minutes=0.0,
            max_validation_cases=0,
            tracking=TrackingConfig(),
        ),
        replace(fold, validation=fold.validation[:1]),
    )
    return iterations


def _read(folder: Path, iterations: int) -> Rehearsal:
    run = RunFolder(folder)
    row = MetricsTable(run.metrics, class_names=(), keep_epochs=2).rows[-1]
    # The row is written before the checkpoints, and the heartbeat after them.
    saving = max(0.0, run.heartbeat.stat().st_mtime - run.metrics.stat().st_mtime)
    seconds = {"iteration": float(row["seconds"] or 0) / iterations, "case": float(row[VALIDATION_SECONDS] or 0)}
    return Rehearsal(
        cost=Cost(**seconds, saving=saving),
        iterations=iterations,
        data_wait_share=float(row["data_wait_share"] or 0),
        peak_ram_bytes=int(row["peak_ram_bytes"] or 0),
        peak_vram_bytes=int(row["peak_vram_bytes"] or 0),
        checkpoint_bytes=run.last_checkpoint.stat().st_size,
        record=read_artifact(run.record, RunRecord),
    )


@contextmanager
def _shared_folder(parent: str, ranks: Ranks) -> Iterator[str]:
    """A folder of the first rank that all of them know, gone afterwards."""
    if not ranks.is_first:
        yield ranks.from_first()
        return
    with TemporaryDirectory(prefix=".rehearsal.", dir=parent) as path:
        yield ranks.from_first(path)


@contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
