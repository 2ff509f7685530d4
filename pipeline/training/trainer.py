"""The training of one fold, wired together: read `fit_fold` from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from torch import nn

from pipeline.artifacts import write_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError, StoppedError
from pipeline.log import get_logger
from pipeline.losses.segmentation_loss import make_loss
from pipeline.plan import Plan
from pipeline.store import CaseStore
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
from pipeline.training.out_of_memory import first_line, is_out_of_memory, let_go
from pipeline.training.processes import keep_freed_memory, torch_threads
from pipeline.training.quiet import quiet_lightning
from pipeline.training.recovery import OutOfMemoryReport, describe_memory, free_memory, go_down
from pipeline.training.run_folder import Counts, RunFolder, RunRecord
from pipeline.training.run_lock import run_lock
from pipeline.training.run_record import finished_record, predicted_bytes, started_record
from pipeline.training.settings import Settings, resolve_settings
from pipeline.training.step_down import Standing
from pipeline.training.stops import stops_as_errors

logger = get_logger("train")


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


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What stays the same over all attempts at a training.

    Attributes:
        network: Of the user's own, or None for the plan's.
        settings: As resolved for the plan's own step.
    """

    plan: Plan
    store_folder: Path
    splits: Splits
    fold: Fold
    config: TrainConfig
    folder: RunFolder
    settings: Settings
    network: nn.Module | None


def fit_fold(
    plan: Plan, store_folder: Path, splits: Splits, config: TrainConfig, *, network: nn.Module | None = None
) -> FitResult:
    """Train one fold, or all cases, into `config.run_dir`, or go on with what is there.

    A run that was stopped at any moment goes on from its newest checkpoint and ends with the same weights as one that
    was not (exactly on a CPU with the same number of threads): patches and random numbers are functions of the seed
    and the iteration, and everything else is in the checkpoint. A run that runs out of memory steps down the plan's
    ladder and goes on in the same way, from the last finished optimiser step.

    Args:
        plan: The plan the store was made with.
        store_folder: The store.
        splits: Folds; `config.fold` says which one.
        config: Options.
        network: Trained instead of the plan's U-Net, see `pipeline.api.train`.

    Raises:
        InputError: Options do not fit the plan, the machine or the run found in the folder; cases are missing in the
            store; another process trains in the folder; memory ran out at the end of the ladder.
        StoppedError: Ctrl-C or SIGTERM; the same call goes on.
        TrainingDivergedError: The loss is NaN or infinite.
    """
    folder, settings = RunFolder(Path(config.run_dir)), resolve_settings(plan, config)
    fold = select_fold(splits, config.fold)
    _check_cases(store_folder, fold)
    with run_lock(folder.path):
        folder.begin(plan, splits, config)
        record = folder.read_record()
        if record is not None and record.status == "finished":
            logger.info("%s is finished; give another --run_dir to train anew", folder.path)
            return FitResult.of(folder, record)
        job = _Job(
            plan=plan,
            store_folder=store_folder,
            splits=splits,
            fold=fold,
            config=config,
            folder=folder,
            settings=settings,
            network=network,
        )
        step_downs = record.step_downs if record is not None else ()
        standing = Standing.of(plan, config, settings, step_downs, has_own_network=network is not None)
        while isinstance(ended := _train(job, standing), OutOfMemoryReport):
            free_memory(network)
            standing = go_down(folder, plan, config, standing, ended)
        return FitResult.of(folder, ended)


def _train(job: _Job, standing: Standing) -> RunRecord | OutOfMemoryReport:
    """Train to the end, from the newest checkpoint on, or until memory runs out.

    Everything that is made here is gone on return, so that what comes next finds the memory free.
    """
    plan, config, folder, settings = job.plan, job.config, job.folder, job.settings.at_rung(standing.rung)
    before = folder.read_record()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    network = make_network(plan, settings) if job.network is None else job.network
    module = SegmentationModule(network, make_loss(), optim=config.optim, total_steps=settings.total_steps)
    found = find_checkpoint(folder, module.state_dict())
    start = found.counts if found is not None else Counts()
    data = make_data(plan, job.store_folder, job.fold, config, settings, start=start)
    table = MetricsTable(folder.metrics, class_names=plan.class_names[1:], keep_epochs=start.epoch)
    on_host = standing.scores_on_host
    validator = make_validator(plan, job.store_folder, job.fold.validation, settings, scores_on_host=on_host)
    callbacks = make_callbacks(network, data, folder, table, validator, config, settings, start)
    step_downs = before.step_downs if before is not None else ()
    predicted = predicted_bytes(plan, settings.rung) if job.network is None else None
    record = started_record(
        settings, config.fold, network, splits=job.splits, step_downs=step_downs, predicted_bytes=predicted
    )
    write_artifact(folder.record, record)
    cases = (len(job.fold.train), len(job.fold.validation))
    logger.info("%d training and %d validation cases; %s", *cases, settings.describe())
    if warning := plan.optimizer_warning(config.optim.name, ema=config.optim.ema_decay > 0):
        logger.info(warning)
    if found is not None:
        logger.info("going on from %s, after optimiser step %d", found.path.name, start.optimizer_step)

    if settings.device_type == "cpu":
        keep_freed_memory()
    with torch_threads(settings.processes.num_threads), quiet_lightning():
        trainer = make_trainer(folder, callbacks.in_order, config, settings, start=start)
        try:
            with stops_as_errors(trainer):
                trainer.fit(module, datamodule=data, ckpt_path=str(found.path) if found is not None else None)
            callbacks.last_step.phase = "validation"
            record = finished_record(
                record, trainer=trainer, network=network, validator=validator, writer=callbacks.writer, table=table
            )
        except StoppedError:
            _keep_last_step(trainer, callbacks)
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _recovered(error, trainer, callbacks)
    write_artifact(folder.record, record)
    return record


def _recovered(error: Exception, trainer: pl.Trainer, callbacks: Callbacks) -> OutOfMemoryReport:
    """What an out-of-memory came to, once everything that is to be kept is on disk."""
    device, message = trainer.strategy.root_device, first_line(error)
    memory = describe_memory(device)
    let_go(error)
    try:
        _keep_last_step(trainer, callbacks)
    except Exception as another:
        if not is_out_of_memory(another):
            raise
        # What is on disk is older, and whole.
        let_go(another)
    return OutOfMemoryReport(
        where=callbacks.last_step.phase,
        counts=callbacks.last_step.counts,
        continues_from=callbacks.writer.saved,
        on_gpu=device.type == "cuda",
        memory=memory,
        error=message,
    )


def _keep_last_step(trainer: pl.Trainer, callbacks: Callbacks) -> None:
    """Save the last finished optimiser step, where memory holds it and it has passed the guard."""
    if callbacks.last_step.is_current:
        callbacks.guard.check(trainer, trainer.lightning_module)
        callbacks.writer.save_last(trainer)


def select_fold(splits: Splits, fold: int | str) -> Fold:
    """The fold by number, or all cases for training and none for validation."""
    if fold == "all":
        return Fold(
            train=tuple(sorted({case for each in splits.folds for case in (*each.train, *each.validation)})),
            validation=(),
        )
    if not 0 <= int(fold) < len(splits.folds):
        raise InputError(f"fold: the split has folds 0 to {len(splits.folds) - 1}, got {fold}", where="splits.json")
    return splits.folds[int(fold)]


def _check_cases(store_folder: Path, fold: Fold) -> None:
    missing = sorted({*fold.train, *fold.validation} - set(CaseStore(store_folder).case_ids))
    if missing:
        raise InputError(
            f"{len(missing)} case(s) of the split are not in the store: {', '.join(missing[:10])}",
            where=store_folder,
            fix="Run `voxfit preprocess` for them",
        )
