"""What a training came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.run_record import Counts, RunRecord
from pipeline.training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a training came to.

    Attributes:
        run_dir: The run folder.
        best_checkpoint, last_checkpoint: Weights; the same ones when nothing was validated.
        best_dice: Mean Dice of the best weights over classes and validation cases; None without validation.
        counts: Epochs, iterations and optimiser steps done.
    """

    run_dir: Path
    best_checkpoint: Path
    last_checkpoint: Path
    best_dice: float | None
    counts: Counts

    @classmethod
    def of(cls, folder: RunFolder, record: RunRecord) -> FitResult:
        """The result that a finished run's record tells."""
        return cls(
            run_dir=folder.path,
            best_checkpoint=folder.best_checkpoint,
            last_checkpoint=folder.last_checkpoint,
            best_dice=record.best_dice,
            counts=record.counts,
        )
