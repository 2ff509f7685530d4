"""Says while a training runs how far it is, in a small file that `voxfit status` reads."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as pl
import torch

from pipeline.artifacts import write_artifact
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.status import HEARTBEAT_SECONDS, Heartbeat
from pipeline.training.epoch_report import peak_ram_bytes
from pipeline.training.last_step import LastStep
from pipeline.training.metrics_table import VALIDATION_SECONDS, MetricsTable
from pipeline.training.validation import WholeVolumeValidation
from pipeline.training.wall_clock import WallClock

# Weight of the newest step in the time of a step: follows within some ten steps.
NEWEST = 0.1


class HeartbeatWriter(pl.Callback):
    """Writes `heartbeat.json` every few seconds, after the last step of every epoch and at its end.

    Args:
        path: The file.
        last_step: Knows counts and phase.
        table: Times of earlier validations.
        validation: When validations are due; None without one.
        max_epochs: Epochs in all.

    Attributes:
        seconds_per_step: Of late, data included; None until two steps of an epoch followed each other in this start.
        wall_clock: Of the whole training; of this object's time alone until it is given another.
    """

    def __init__(
        self,
        path: Path,
        last_step: LastStep,
        *,
        table: MetricsTable,
        validation: WholeVolumeValidation | None,
        max_epochs: int,
    ) -> None:
        self.path, self.last_step, self.table = path, last_step, table
        self.validation, self.max_epochs = validation, max_epochs
        self.seconds_per_step: float | None = None
        self.wall_clock = WallClock(monotonic())
        self._last_beat = self._last_end = -float("inf")
        self._on_gpu = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A training begins, or goes on."""
        self._on_gpu = pl_module.device.type == "cuda"
        self.beat()

    def on_train_epoch_start(self, *_: Any) -> None:
        """The first step of an epoch starts workers and takes other things."""
        self._last_end = -float("inf")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time of a finished step."""
        if self.last_step.pace.ends_step(batch_idx):
            seconds, self._last_end = monotonic() - self._last_end, monotonic()
            if seconds < float("inf"):
                before = self.seconds_per_step if self.seconds_per_step is not None else seconds
                self.seconds_per_step = (1 - NEWEST) * before + NEWEST * seconds
        if batch_idx + 1 == self.last_step.pace.passes_per_epoch:
            # What follows, such as a validation, may take long, or end the process.
            self.beat()
        self.beat_if_due()

    def on_train_epoch_end(self, *_: Any) -> None:
        """An epoch is done."""
        self.beat()

    def beat_if_due(self) -> None:
        """Write, unless that was done a few seconds ago."""
        if monotonic() - self._last_beat >= HEARTBEAT_SECONDS:
            self.beat()

    def beat(self, phase: str = "") -> None:
        """Write; `phase` in place of the training's own for a last word. That it cannot be written ends nothing."""
        self._last_beat = monotonic()
        if not self.table.is_written:
            return
        try:
            write_artifact(self.path, self._heartbeat(phase or self.last_step.phase))
        except InputError as error:
            get_logger("train").debug("%s", error)

    def _heartbeat(self, phase: str) -> Heartbeat:
        counts, total = self.last_step.counts, self.max_epochs * self.last_step.pace.steps_per_epoch
        return Heartbeat(
            phase=phase,
            epoch=counts.epoch,
            max_epochs=self.max_epochs,
            iteration=counts.iteration,
            optimizer_step=counts.optimizer_step,
            total_steps=total,
            seconds_per_step=self.seconds_per_step,
            eta_seconds=self.seconds_left(),
            wall_seconds=self.wall_clock.seconds,
            peak_ram_bytes=peak_ram_bytes(),
            peak_vram_bytes=torch.cuda.max_memory_allocated() if self._on_gpu else 0,
        )

    def seconds_left(self) -> float | None:
        """What the remaining steps and validations will take; None before that is known."""
        counts, pace = self.last_step.counts, self.last_step.pace
        steps = self.max_epochs * pace.steps_per_epoch - counts.optimizer_step
        if self.seconds_per_step is None:
            return None if steps else 0.0
        remaining = range(counts.epoch + 1, self.max_epochs + 1)
        validations = sum(self.validation.is_due(epoch) for epoch in remaining) if self.validation is not None else 0
        return steps * self.seconds_per_step + validations * (self.validation_seconds or 0.0)

    @property
    def validation_seconds(self) -> float | None:
        """What the newest validation took; None before the first."""
        known = [float(row[VALIDATION_SECONDS]) for row in self.table.rows if row.get(VALIDATION_SECONDS)]
        return known[-1] if known else None
