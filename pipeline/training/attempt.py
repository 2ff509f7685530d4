"""One attempt at a training: it ends with the record of a finished run, or with a report of how memory ran out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from pipeline.artifacts import write_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import StoppedError
from pipeline.log import get_logger
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.out_of_memory import first_line, is_out_of_memory, let_go
from pipeline.plan import Plan
from pipeline.stop_signals import StopRequest
from pipeline.training.assembly import (
    Callbacks,
    make_callbacks,
    make_data,
    make_network,
    make_trainer,
    make_validator,
)
from pipeline.training.checkpoints import find_checkpoint
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.module import SegmentationModule
from pipeline.training.processes import torch_threads
from pipeline.training.quiet import quiet_lightning
from pipeline.training.recovery import OutOfMemoryReport, describe_memory
from pipeline.training.run_folder import Counts, RunFolder, RunRecord
from pipeline.training.run_record import finished_record, predicted_bytes, started_record
from pipeline.training.settings import Settings
from pipeline.training.step_down import Standing
from pipeline.training.stops import stops_as_errors

logger = get_logger("train")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same over all attempts at a training.

    Attributes:
        network: Of the user's own, or None for the plan's.
        settings: As resolved for the plan's own step.
        request: Whether to stop.
    """

    plan: Plan
    store_folder: Path
    splits: Splits
    fold: Fold
    config: TrainConfig
    folder: RunFolder
    settings: Settings
    network: nn.Module | None
    request: StopRequest


def train_once(job: Job, standing: Standing, start: Counts) -> RunRecord | OutOfMemoryReport:
    """Train to the end, from the newest checkpoint on, or until memory runs out, wherever that is.

    Everything that is made here is gone on return, so that what comes next finds the memory free.

    Args:
        job: What to train.
        standing: How.
        start: What the newest checkpoint holds, as far as that is known before it is read.
    """
    attempt = _Attempt(job, standing, start)
    with torch_threads(attempt.settings.processes.num_threads), quiet_lightning():
        try:
            return attempt.run()
        except StoppedError:
            attempt.keep_last_step()
            attempt.say_last("stopped")
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                attempt.say_last("failed")
                raise
            message = first_line(error)
            # First of all: the rest needs memory itself.
            let_go(error)
        attempt.keep_last_step()
        return attempt.report(message)


class _Attempt:
    """The parts of a training as they are made; those that say what became of it are there once it can begin."""

    def __init__(self, job: Job, standing: Standing, start: Counts) -> None:
        self.job, self.standing, self.start = job, standing, start
        self.settings = job.settings.at_rung(standing.rung)
        self.trainer: pl.Trainer | None = None
        self.callbacks: Callbacks | None = None

    def run(self) -> RunRecord:
        """Train and write `run.json`, when it begins and when it is done."""
        job, settings = self.job, self.settings
        if not job.folder.record.is_file():
            # An out-of-memory is written into it, however early.
            self._write_record(job.network)
        pl.seed_everything(job.config.seed, workers=True, verbose=False)
        network = make_network(job.plan, settings) if job.network is None else job.network
        module = SegmentationModule(network, make_loss(), optim=job.config.optim, total_steps=settings.total_steps)
        found = find_checkpoint(job.folder, module.state_dict())
        self.start = start = found.counts if found is not None else Counts()
        data = make_data(job.plan, job.store_folder, job.fold, job.config, settings, start=start)
        data.request = job.request
        table = MetricsTable(job.folder.metrics, class_names=job.plan.class_names[1:], keep_epochs=start.epoch)
        watched = {"request": job.request, "scores_on_host": self.standing.scores_on_host}
        validator = make_validator(job.plan, job.store_folder, job.fold.validation, settings, **watched)
        callbacks = make_callbacks(network, data, job.folder, table, validator, job.config, settings, start)
        record = self._begin(network)
        if found is not None:
            logger.info("going on from %s, after optimiser step %d", found.path.name, start.optimizer_step)
        trainer = make_trainer(job.folder, callbacks.in_order, job.config, settings, start=start)
        self.trainer, self.callbacks = trainer, callbacks
        with stops_as_errors(trainer, job.request):
            try:
                trainer.fit(module, datamodule=data, ckpt_path=str(found.path) if found is not None else None)
            finally:
                data.end_workers()
            callbacks.last_step.phase = "validation"
            record = finished_record(
                record, trainer=trainer, network=network, validator=validator, writer=callbacks.writer, table=table
            )
        write_artifact(job.folder.record, record)
        callbacks.heartbeat.beat("finished")
        job.folder.previous_checkpoint.unlink(missing_ok=True)
        return record

    def _begin(self, network: nn.Module) -> RunRecord:
        """Write down and say what is trained."""
        job = self.job
        record = self._write_record(network)
        cases = (len(job.fold.train), len(job.fold.validation))
        logger.info("%d training and %d validation cases; %s", *cases, self.settings.describe())
        if warning := job.plan.optimizer_warning(job.config.optim.name, ema=job.config.optim.ema_decay > 0):
            logger.info(warning)
        return record

    def _write_record(self, network: nn.Module | None) -> RunRecord:
        job, before = self.job, self.job.folder.read_record()
        record = started_record(
            self.settings,
            job.config.fold,
            network,
            splits=job.splits,
            step_downs=before.step_downs if before is not None else (),
            predicted_bytes=predicted_bytes(job.plan, self.settings.rung) if job.network is None else None,
            max_epochs=job.config.max_epochs,
        )
        write_artifact(job.folder.record, record)
        return record

    def keep_last_step(self) -> None:
        """Save the last finished optimiser step, where memory holds it and has room to, and it passes the guard."""
        if self.trainer is None or self.callbacks is None or not self.callbacks.last_step.is_current:
            return
        if self.callbacks.last_step.counts == self.callbacks.writer.saved:
            return
        try:
            self.callbacks.guard.check(self.trainer, self.trainer.lightning_module)
            self.callbacks.writer.save_last(self.trainer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # What is on disk is older, and whole.
            let_go(error)

    def say_last(self, word: str) -> None:
        """Leave a last word in the heartbeat, once there is one."""
        if self.callbacks is not None:
            self.callbacks.heartbeat.beat(word)

    def report(self, error: str) -> OutOfMemoryReport:
        """What an out-of-memory came to, once everything that is to be kept is on disk.

        Args:
            error: Its first line.
        """
        callbacks, on_gpu = self.callbacks, self.settings.device_type == "cuda"
        # It calls a part of this attempt, all of which is to go.
        self.job.request.while_checking = None
        return OutOfMemoryReport(
            where=callbacks.last_step.phase if callbacks is not None else "start",
            counts=callbacks.last_step.counts if callbacks is not None else self.start,
            continues_from=callbacks.writer.saved if callbacks is not None else self.start,
            on_gpu=on_gpu,
            memory=describe_memory(on_gpu=on_gpu),
            error=error,
        )
