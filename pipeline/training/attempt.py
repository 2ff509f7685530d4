"""One attempt at a training: it ends with the record of a finished run, or with a report of how memory ran out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from pipeline.artifacts import write_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError, first_line
from pipeline.log import get_logger
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.out_of_memory import is_out_of_memory, let_go
from pipeline.plan import Plan
from pipeline.run_record import Counts, InitialWeights, RunRecord
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
from pipeline.training.departures import Departure, PeersLeftError, departure_of, own_or_theirs, verdict
from pipeline.training.initial_weights import Beginning, say_what_was_taken
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.module import SegmentationModule
from pipeline.training.processes import torch_threads
from pipeline.training.quiet import quiet_lightning
from pipeline.training.ranks import Ranks
from pipeline.training.recording import finished_record, predicted_bytes, started_record
from pipeline.training.recovery import OutOfMemoryReport, describe_memory
from pipeline.training.run_folder import RunFolder
from pipeline.training.settings import Settings
from pipeline.training.step_down import Standing
from pipeline.training.stops import stops_as_errors
from pipeline.training.trackers import Outcome
from pipeline.training.tracking import Tracking, describe_training, tags_of
from pipeline.training.wall_clock import WallClock

logger = get_logger("train")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same over all attempts at a training.

    Attributes:
        network: Of the user's own, or None for the plan's.
        settings: As resolved for the plan's own step.
        request: Whether to stop.
        ranks: The processes that train together.
        wall_clock: Over all starts.
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
    ranks: Ranks
    wall_clock: WallClock

    @property
    def beginning(self) -> Beginning:
        """What the training begins with."""
        return Beginning(
            plan=self.plan,
            config=self.config,
            validation=self.fold.validation,
            has_own_network=self.network is not None,
        )


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
        except (Exception, PeersLeftError) as error:
            cause = attempt.agree_on(error)
            if cause.kind == "error":
                attempt.say_last("failed")
                raise own_or_theirs(error, cause) from error.__cause__
            if cause.kind == "stop":
                attempt.keep_last_step()
                attempt.say_last("stopped")
                raise own_or_theirs(error, cause) from error.__cause__
        attempt.keep_last_step()
        attempt.say_last("interrupted")
        return attempt.report(cause)


class _Attempt:
    """The parts of a training as they are made; those that say what became of it are there once it can begin."""

    def __init__(self, job: Job, standing: Standing, start: Counts) -> None:
        self.job, self.standing, self.start = job, standing, start
        self.settings = job.settings.at_rung(standing.rung)
        self.trainer: pl.Trainer | None = None
        self.callbacks: Callbacks | None = None
        self.tracking: Tracking | None = None
        self.initial_weights: InitialWeights | None = None

    def run(self) -> RunRecord:
        """Train and write `run.json`, when it begins and when it is done."""
        job, settings = self.job, self.settings
        if not job.folder.record.is_file():
            # An out-of-memory is written into it, however early.
            self._write_record(job.network)
        job.ranks.meet()
        pl.seed_everything(job.config.seed, workers=True, verbose=False)
        network = make_network(job.plan, settings) if job.network is None else job.network
        module = SegmentationModule(network, make_loss(), optim=job.config.optim, total_steps=settings.total_steps)
        found = job.ranks.from_first(find_checkpoint(job.folder, module.state_dict()) if job.ranks.is_first else None)
        self.start = start = found.counts if found is not None else Counts()
        self._begin_with_weights(network, is_new=found is None)
        data = make_data(job.plan, job.store_folder, job.fold, job.config, settings, start=start)
        data.request = job.request
        rows = {"keep_epochs": start.epoch, "is_written": job.ranks.is_first}
        table = MetricsTable(job.folder.metrics, class_names=job.plan.class_names[1:], **rows)
        watched = {"request": job.request, "ranks": job.ranks, "scores_on_host": self.standing.scores_on_host}
        watched["progress"] = self._validation_progress
        validator = make_validator(job.plan, job.store_folder, job.fold.validation, settings, **watched)
        callbacks = make_callbacks(network, data, job.folder, table, validator, job.config, settings, start)
        callbacks.heartbeat.wall_clock = job.wall_clock
        record = self._begin(network)
        self._begin_tracking(record, table, callbacks)
        if found is not None:
            logger.info("going on from %s, after optimiser step %d", found.path.name, start.optimizer_step)
        trainer = make_trainer(job.folder, callbacks.in_order, job.config, settings, job.ranks, start=start)
        self.trainer, self.callbacks = trainer, callbacks
        with stops_as_errors(trainer, job.request):
            try:
                trainer.fit(module, datamodule=data, ckpt_path=str(found.path) if found is not None else None)
            finally:
                data.end_workers()
            callbacks.last_step.phase = "validation"
            # All of them read what the first one has written.
            job.ranks.meet()
            record = finished_record(
                record, trainer=trainer, network=network, validator=validator, writer=callbacks.writer, table=table
            )
        record = replace(record, wall_seconds=job.wall_clock.seconds)
        if job.ranks.is_first:
            write_artifact(job.folder.record, record)
            self.say_last("finished")
            job.folder.previous_checkpoint.unlink(missing_ok=True)
            for path in job.folder.path.glob(f"{job.folder.validation_progress.stem}*.json"):
                path.unlink(missing_ok=True)
        return record

    def _begin_with_weights(self, network: nn.Module, *, is_new: bool) -> None:
        """Weights of another run, the same on all ranks, unless the training goes on; what is frozen is so always."""
        beginning, ranks = self.job.beginning, self.job.ranks
        if is_new:
            self.initial_weights = beginning.load(network)
            hashes = ranks.meet(self.initial_weights.weights_hash if self.initial_weights is not None else "")
            if len(set(hashes)) > 1:
                fix = "Give a run that is finished, in a folder that all nodes share"
                raise InputError("the processes of this training have read other weights", where="init_from", fix=fix)
            if self.initial_weights is not None and ranks.is_first:
                say_what_was_taken(self.initial_weights)
        beginning.freeze(network)

    def _begin_tracking(self, record: RunRecord, table: MetricsTable, callbacks: Callbacks) -> None:
        job = self.job
        if job.config.tracking.name == "none" or not job.ranks.is_first:
            return
        self.tracking = Tracking(job.config.tracking, job.folder.path, table)
        callbacks.in_order.insert(callbacks.in_order.index(callbacks.heartbeat) + 1, self.tracking)
        cases = {"num_training": len(job.fold.train), "num_validation": len(job.fold.validation)}
        self.tracking.begin(describe_training(job.config, job.plan, record), tags_of(record, **cases))

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
            predicted_bytes=predicted_bytes(job.plan, self.settings.rung) if self._is_planned else None,
            max_epochs=job.config.max_epochs,
            initial_weights=self.initial_weights or (before.initial_weights if before is not None else None),
        )
        record = replace(record, wall_seconds=job.wall_clock.before)
        if job.ranks.is_first:
            write_artifact(job.folder.record, record)
        return record

    @property
    def _is_planned(self) -> bool:
        """Whether the step is one that the plan knows: of its own network, all of which is trained."""
        return self.job.network is None and self.job.config.freeze == "none"

    @property
    def _validation_progress(self) -> Path:
        """Of this rank: each keeps the scores of its own cases."""
        path, rank = self.job.folder.validation_progress, self.job.ranks.place.rank
        return path.with_stem(f"{path.stem}_{rank}") if rank else path

    def agree_on(self, error: BaseException) -> Departure:
        """What ended the attempt on all ranks, of which each learns at the same meeting.

        What an out-of-memory keeps alive is let go first of all: the rest needs memory itself.
        """
        own, departures = self._departure(error), getattr(error, "departures", None)
        if own.kind == "memory" or departures is not None:
            let_go(error)
        cause = verdict(departures if departures is not None else self.job.ranks.leave(own))
        if cause.kind == "memory":
            self.job.ranks.go_on()
        return cause

    def _departure(self, error: BaseException) -> Departure:
        # Within an exchange it cannot be told to the others, who therefore cannot step down as well.
        if self.job.ranks.is_cut_off or not isinstance(error, Exception) or not is_out_of_memory(error):
            return departure_of(error)
        callbacks = self.callbacks
        return Departure(
            kind="memory",
            message=first_line(error),
            where=callbacks.last_step.phase if callbacks is not None else "start",
            counts=callbacks.last_step.counts if callbacks is not None else self.start,
            memory=describe_memory(on_gpu=self.settings.device_type == "cuda"),
        )

    def keep_last_step(self) -> None:
        """Save the last finished optimiser step, where memory holds it and has room to, and it passes the guard."""
        if not self.job.ranks.is_first:
            return
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

    def say_last(self, word: Outcome) -> None:
        """Leave a last word in the heartbeat and with the tracker, once there are any."""
        if self.callbacks is not None and word != "interrupted":
            self.callbacks.heartbeat.beat(word)
        if self.tracking is not None:
            self.tracking.end(word)

    def report(self, cause: Departure) -> OutOfMemoryReport:
        """What an out-of-memory came to, once everything that is to be kept is on disk.

        Args:
            cause: As all ranks have agreed on.
        """
        # It calls a part of this attempt, all of which is to go.
        self.job.request.while_checking = None
        saved = self.callbacks.writer.saved if self.callbacks is not None else self.start
        return OutOfMemoryReport(
            where=cause.where,
            counts=cause.counts,
            continues_from=self.job.ranks.from_first(saved),
            on_gpu=self.settings.device_type == "cuda",
            memory=cause.memory,
            error=cause.message,
        )
