"""Resuming at any finished optimiser step: our own counts decide, and Lightning's loops are set from them.

Lightning's own numbers are not used. What it saves in the middle of an epoch depends on the hook that it was saved
from, and resumes one batch off from some (Lightning issue 19367); it saves nothing of an epoch's sample numbers; and
they are in batches, whose size changes when a training steps down after an out-of-memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl

from pipeline.run_record import Counts
from pipeline.training.optim import steps_per_epoch


class Pace(NamedTuple):
    """How an epoch is cut up.

    An *iteration* takes `batch_size` patches of the run's own options; it is what is counted, from the first epoch to
    the last. A *pass* is what is run: one iteration, or a part of it once the training has stepped down to a smaller
    batch. An optimiser step and an epoch take the same patches whatever the batch. Several ranks share the passes out,
    in turn, so that they take the same patches as one: passes are counted for each rank, iterations over all of them.

    Attributes:
        iterations_per_epoch: Iterations of an epoch.
        iterations_per_step: Iterations of an optimiser step.
        passes_per_iteration: Passes of an iteration.
        num_ranks: Processes that train together; divides both numbers of iterations.
        rank: Which of them this one is.
    """

    iterations_per_epoch: int
    iterations_per_step: int
    passes_per_iteration: int = 1
    num_ranks: int = 1
    rank: int = 0

    @property
    def passes_per_epoch(self) -> int:
        """Passes of a rank in an epoch: Lightning's batches."""
        return self.iterations_per_epoch * self.passes_per_iteration // self.num_ranks

    @property
    def passes_per_step(self) -> int:
        """Passes of a rank in an optimiser step: Lightning's `accumulate_grad_batches`."""
        return self.iterations_per_step * self.passes_per_iteration // self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; the last may be a partial one."""
        return steps_per_epoch(
            iterations_per_epoch=self.iterations_per_epoch, accumulate_grad_batches=self.iterations_per_step
        )

    def counts(self, *, epoch: int, passes: int) -> Counts:
        """Counts after an optimiser step.

        Args:
            epoch: Epochs finished before.
            passes: Passes of a rank in the epoch after them that are done, all of them in finished optimiser steps.
        """
        return Counts(
            epoch=epoch,
            iteration=epoch * self.iterations_per_epoch + passes * self.num_ranks // self.passes_per_iteration,
            optimizer_step=epoch * self.steps_per_epoch + -(-passes // self.passes_per_step),
        )

    def ends_step(self, batch_idx: int) -> bool:
        """Whether pass `batch_idx` (from 0) of an epoch is the last one of an optimiser step, whole or partial."""
        return (batch_idx + 1) % self.passes_per_step == 0 or batch_idx + 1 == self.passes_per_epoch

    def iteration(self, *, epoch: int, batch_idx: int) -> int:
        """Number, from 1 over all epochs, of the iteration that pass `batch_idx` (from 0) of an epoch is part of."""
        number = self.number(batch_idx) // self.passes_per_iteration
        return epoch * self.iterations_per_epoch + number + 1

    def number(self, batch_idx: int) -> int:
        """Number, from 0 over all ranks, of pass `batch_idx` (from 0) of this rank in an epoch."""
        return batch_idx * self.num_ranks + self.rank

    def passes_into_epoch(self, counts: Counts) -> int:
        """Passes of a rank in the epoch after the finished ones; all of them where only its end is missing."""
        done = counts.iteration - counts.epoch * self.iterations_per_epoch
        return done * self.passes_per_iteration // self.num_ranks


class ResumePoint(pl.Callback):
    """Sets the loops of a trainer that resumes from the counts in the checkpoint.

    Args:
        pace: Of the training that resumes, which need not be that of the one that saved.
    """

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the state of the loops anew, before Lightning reads it."""
        counts = Counts(**checkpoint["counts"])
        checkpoint["epoch"], checkpoint["global_step"] = counts.epoch, counts.optimizer_step
        set_loop_state(checkpoint["loops"]["fit_loop"], counts, self.pace)


def set_loop_state(state: dict[str, Any], counts: Counts, pace: Pace) -> None:
    """Overwrite the numbers in a saved state of Lightning's fit loop.

    An epoch that has begun counts as ready and started but not as processed, and every batch of it that was taken as
    completed: so Lightning goes on with the next one, and when there is none, with the end of the epoch.
    """
    passes = pace.passes_into_epoch(counts)
    begun = counts.epoch + (passes > 0)
    _set(state["epoch_progress"], total=begun, current=begun, finished=counts.epoch)
    total = counts.epoch * pace.passes_per_epoch + passes
    _set(state["epoch_loop.batch_progress"], total=total, current=passes)
    state["epoch_loop.batch_progress"]["is_last_batch"] = False
    steps = {"total": counts.optimizer_step, "current": -(-passes // pace.passes_per_step)}
    _set(state["epoch_loop.scheduler_progress"], **steps)
    for progress in state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        _set(progress, **steps)
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = counts.optimizer_step


def _set(progress: dict[str, Any], *, total: int, current: int, finished: int | None = None) -> None:
    """Set both trackers of a progress; `finished` is what of them is through, all by default."""
    for name, begun in (("total", total), ("current", current)):
        for stage in progress[name]:
            through = stage in ("processed", "completed") and finished is not None
            progress[name][stage] = finished if through else begun
