"""How many epochs fit into a time: measured by training a little, of which nothing is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold
from pipeline.durations import format_duration
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.training.metrics_table import VALIDATION_SECONDS, MetricsTable
from pipeline.training.ranks import Ranks
from pipeline.training.run_folder import RunFolder
from pipeline.training.time_budget import MARGIN

logger = get_logger("train")
# Optimiser steps of an epoch of the rehearsal: one epoch to warm up, one that is timed.
STEPS = 4


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


def rehearse(
    train: Callable[[TrainConfig, Fold], object],
    config: TrainConfig,
    fold: Fold,
    *,
    iterations_per_step: int,
    ranks: Ranks,
) -> Cost:
    """Train two short epochs with one validation case, and see what they took.

    Args:
        train: Trains into the folder that the options name.
        config: Options of the training.
        fold: Its cases.
        iterations_per_step: Iterations of an optimiser step.
        ranks: Who trains.
    """
    logger.info("max_epochs auto: training for a few steps to see how many epochs fit; nothing of it is kept")
    iterations = min(config.iterations_per_epoch, STEPS * iterations_per_step)
    short = {"max_epochs": 2, "iterations_per_epoch": iterations, "validate_every_n_epochs": 1}
    with _shared_folder(config.run_dir, ranks) as path, _quiet():
        train(
            replace(
                config, **short, run_dir=path, stage_to="", max_time="", save_every_minutes=0.0, max_validation_cases=0
            ),
            replace(fold, validation=fold.validation[:1]),
        )
        # The first one writes, and the others wait until it has.
        ranks.meet()
        folder = RunFolder(Path(path))
        row = MetricsTable(folder.metrics, class_names=(), keep_epochs=2).rows[-1]
        # The row is written before the checkpoints, and the heartbeat after them.
        saving = max(0.0, folder.heartbeat.stat().st_mtime - folder.metrics.stat().st_mtime)
        ranks.meet()
    return Cost(iteration=float(row["seconds"]) / iterations, case=float(row[VALIDATION_SECONDS] or 0), saving=saving)


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
