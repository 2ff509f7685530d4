"""Keeps a start of a training within the time that it was given."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytorch_lightning as pl

from pipeline.durations import format_duration
from pipeline.stop_signals import StopNow, StopRequest
from pipeline.training.checkpoints import CheckpointWriter
from pipeline.training.heartbeat import HeartbeatWriter

# Epochs are not all alike, and no clock of a node is that of another.
MARGIN = 1.1
# How many of the newest epochs tell what the next one takes.
NEWEST_EPOCHS = 3


class TimeBudget(pl.Callback):
    """Begins no epoch that would not be finished, validated and saved in time; stands after what it reads.

    The first epoch of a start is always begun, since nothing is known of it: as everywhere, it can be stopped at any
    optimiser step. So is a validation of which one case fits: it goes on case by case. So a start makes some progress
    however little time it has, and one that makes none is an error.

    Args:
        request: Where the time's end is noted.
        heartbeat: Knows what steps and validations take.
        writer: Knows what a save takes.
        seconds: From the moment on that the request was made.
    """

    def __init__(
        self, request: StopRequest, heartbeat: HeartbeatWriter, writer: CheckpointWriter, *, seconds: float
    ) -> None:
        self.request, self.heartbeat, self.writer = request, heartbeat, writer
        self.seconds, self.end = seconds, request.made_at + seconds
        self._rows_before = len(heartbeat.table.rows)

    def on_train_start(self, *_: Any) -> None:
        """From now on there is something that can be saved."""
        self._set_deadline()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin the epoch, or end."""
        self._set_deadline()
        epoch = self._epoch_seconds()
        if epoch is None:
            return
        seconds = MARGIN * (epoch + self._validation_seconds(self.heartbeat.last_step.counts.epoch + 1))
        if monotonic() + seconds > self.request.deadline:
            self._stop(f"no further epoch fits (it would take {format_duration(seconds)})")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the time for one more step and for saving it; begin no validation of which not even a case fits."""
        pace, counts = self.heartbeat.last_step.pace, self.heartbeat.last_step.counts
        if not pace.ends_step(batch_idx):
            return
        self._set_deadline()
        case = MARGIN * self._validation_seconds(counts.epoch + 1) / self._num_cases
        if batch_idx + 1 == pace.passes_per_epoch and case and monotonic() + case > self.request.deadline:
            self._stop(f"no case of the validation fits (one would take {format_duration(case)})")

    def on_fit_end(self, *_: Any) -> None:
        """The final validation comes next, also where a start finds all epochs done."""
        self._set_deadline()

    def _set_deadline(self) -> None:
        self.request.reason = self._reason("it ended")
        self.request.deadline = self.end - 2 * self.writer.save_seconds - 2 * (self.heartbeat.seconds_per_step or 0.0)

    def _stop(self, why: str) -> None:
        self.request.reason = self._reason(why)
        self.request.deadline = monotonic()
        raise StopNow

    def _reason(self, why: str) -> str:
        left = self.heartbeat.seconds_left()
        about = f", about {format_duration(left)} of training are left" if left is not None else ""
        epochs = f"{self.heartbeat.last_step.counts.epoch} of {self.heartbeat.max_epochs} epochs are done"
        return f"max_time {format_duration(self.seconds)} is up: {why}; {epochs}{about}; stopped"

    def _epoch_seconds(self) -> float | None:
        """The longest of the newest epochs of this start; None before the first."""
        rows = self.heartbeat.table.rows[self._rows_before :]
        return max((float(row["seconds"] or 0) for row in rows[-NEWEST_EPOCHS:]), default=None)

    @property
    def _num_cases(self) -> int:
        validation = self.heartbeat.validation
        if validation is None:
            return 1
        # One after the other: ranks have theirs at the same time.
        return max(1, -(-len(validation.validator.case_ids) // validation.validator.ranks.num))

    def _validation_seconds(self, epoch: int) -> float:
        """Of the validation after `epoch`; 0 where there is none, and before the first."""
        validation = self.heartbeat.validation
        due = validation is not None and validation.is_due(epoch)
        return (self.heartbeat.validation_seconds or 0.0) if due else 0.0
