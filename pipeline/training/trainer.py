"""The training of one fold, wired together: read `fit_fold` from top to bottom."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from pipeline.artifacts import write_artifact
from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold, Splits
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.store import CaseStore
from pipeline.training.checkpoints import AtomicCheckpointIO, CheckpointWriter, FoundCheckpoint, find_checkpoint
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.divergence import SCALER_PATIENCE, DivergenceGuard
from pipeline.training.ema import WeightAverage
from pipeline.training.epoch_report import EpochReport, EpochTimer
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.module import SegmentationModule
from pipeline.training.processes import NICENESS_BESIDE_CPU_NETWORK, keep_freed_memory, torch_threads
from pipeline.training.quiet import quiet_lightning
from pipeline.training.run_folder import Counts, RunFolder, RunRecord
from pipeline.training.run_lock import run_lock
from pipeline.training.run_record import finished_record, started_record
from pipeline.training.seeding import IterationSeed
from pipeline.training.settings import Settings, resolve_settings
from pipeline.training.stops import stops_as_errors
from pipeline.training.validation import Validator, WholeVolumeValidation

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


def fit_fold(
    plan: Plan, store_folder: Path, splits: Splits, config: TrainConfig, *, network: nn.Module | None = None
) -> FitResult:
    """Train one fold, or all cases, into `config.run_dir`, or go on with what is there.

    A run that was stopped at any moment goes on from its last finished epoch and ends with the same weights as one that
    was not (exactly on a CPU with the same number of threads): patches and random numbers are functions of the seed
    and the iteration, and everything else is in the checkpoint.

    Args:
        plan: The plan the store was made with.
        store_folder: The store.
        splits: Folds; `config.fold` says which one.
        config: Options.
        network: Trained instead of the plan's U-Net, see `pipeline.api.train`.

    Raises:
        InputError: Options do not fit the plan, the machine or the run found in the folder; cases are missing in the
            store; another process trains in the folder.
        StoppedError: Ctrl-C or SIGTERM; the same call goes on.
        TrainingDivergedError: The loss is NaN or infinite.
    """
    folder = RunFolder(Path(config.run_dir))
    settings = resolve_settings(plan, config)
    fold = select_fold(splits, config.fold)
    _check_cases(store_folder, fold)
    with run_lock(folder.path):
        folder.begin(plan, splits, config)
        record = folder.read_record()
        if record is not None and record.status == "finished":
            logger.info("%s is finished; give another --run_dir to train anew", folder.path)
            return FitResult.of(folder, record)

        pl.seed_everything(config.seed, workers=True, verbose=False)
        if network is None:
            network = make_network(plan, settings)
        module = SegmentationModule(
            network,
            make_loss(),
            optim=config.optim,
            total_steps=settings.total_steps,
        )
        data = make_data(plan, store_folder, fold, config, settings)
        found = find_checkpoint(folder, module.state_dict())
        table = MetricsTable(
            folder.metrics, class_names=plan.class_names[1:], keep_epochs=found.counts.epoch if found else 0
        )
        validator = make_validator(plan, store_folder, fold.validation)
        callbacks = make_callbacks(network, data, folder, table, validator, config, settings)
        write_artifact(folder.record, record := started_record(settings, config.fold, network, splits=splits))
        logger.info(
            "%d training and %d validation cases; %s", len(fold.train), len(fold.validation), settings.describe()
        )

        if settings.device_type == "cpu":
            keep_freed_memory()
        with torch_threads(settings.processes.num_threads), quiet_lightning():
            trainer = make_trainer(folder, callbacks.in_order, config, settings, found)
            _fit(trainer, module, data, found)
            record = finished_record(
                record, trainer=trainer, network=network, validator=validator, writer=callbacks.writer, table=table
            )
        write_artifact(folder.record, record)
        return FitResult.of(folder, record)


def make_network(plan: Plan, settings: Settings) -> UNet:
    """The plan's U-Net, run as the settings say."""
    return UNet(
        plan.num_channels,
        plan.num_classes,
        plan.network,
        recompute_stages=settings.recompute_stages,
        slab_stages=settings.slab_stages,
        offload_stages=settings.offload_stages,
    )


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


def make_data(plan: Plan, store_folder: Path, fold: Fold, config: TrainConfig, settings: Settings) -> PatchDataModule:
    """The stream of training patches."""
    augmentation = None
    if config.augmentation.enabled:
        augmentation = Augmentation(
            config.augmentation,
            patch_size=plan.patch_size,
            num_channels=plan.num_channels,
            spacing=plan.target_spacing,
            anisotropic_axis=plan.anisotropic_axis,
        )
    dataset = PatchDataset(
        store_folder,
        fold.train,
        patch_size=plan.patch_size,
        foreground_fraction=config.foreground_fraction,
        seed=config.seed,
        augmentation=augmentation,
        defer_augmentation=settings.augment_on_gpu,
    )
    return PatchDataModule(
        dataset,
        batch_size=settings.batch_size,
        iterations_per_epoch=config.iterations_per_epoch,
        num_workers=settings.processes.num_workers,
        pin_memory=settings.device_type == "cuda",
        augmentation=augmentation if settings.augment_on_gpu else None,
        niceness=NICENESS_BESIDE_CPU_NETWORK if settings.device_type == "cpu" else 0,
    )


def make_validator(plan: Plan, store_folder: Path, case_ids: tuple[str, ...]) -> Validator:
    """Whole-volume validation with the training patch as its window."""
    return Validator(
        store_folder=store_folder, case_ids=case_ids, patch_size=plan.patch_size, num_classes=plan.num_classes
    )


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of a training; `in_order` they run at the end of an epoch.

    Attributes:
        writer: Saves checkpoints; the last one.
        others: All before it.
    """

    writer: CheckpointWriter
    others: tuple[pl.Callback, ...]

    @property
    def in_order(self) -> list[pl.Callback]:
        """Clock, seed, guard, average, validation, report, checkpoints."""
        return [*self.others, self.writer]


def make_callbacks(
    network: nn.Module,
    data: PatchDataModule,
    folder: RunFolder,
    table: MetricsTable,
    validator: Validator,
    config: TrainConfig,
    settings: Settings,
) -> Callbacks:
    """Everything that happens around the training step."""
    iterations, timer = config.iterations_per_epoch, EpochTimer(data.wait_clock)
    patience = SCALER_PATIENCE if settings.precision.precision == "16-mixed" else 0
    guard = DivergenceGuard(folder.last_checkpoint, iterations_per_epoch=iterations, patience=patience)
    average = WeightAverage(network, decay=config.optim.ema_decay) if config.optim.ema_decay > 0 else None
    validation = None
    if validator.case_ids:
        validation = WholeVolumeValidation(
            validator.limited_to(config.max_validation_cases),
            every_n_epochs=config.validate_every_n_epochs,
            max_epochs=config.max_epochs,
            network=average.network if average is not None else None,
        )
    report = EpochReport(table, timer, validation, iterations_per_epoch=iterations, max_epochs=config.max_epochs)
    writer = CheckpointWriter(folder, iterations_per_epoch=iterations, validation=validation)
    seeds = IterationSeed(config.seed, iterations_per_epoch=iterations)
    some = [timer, seeds, guard, average, validation, report]
    return Callbacks(writer, tuple(callback for callback in some if callback is not None))


def make_trainer(
    folder: RunFolder,
    callbacks: list[pl.Callback],
    config: TrainConfig,
    settings: Settings,
    found: FoundCheckpoint | None,
) -> pl.Trainer:
    """Lightning's trainer: the loop, precision, accumulation and clipping; everything else is in our callbacks."""
    steps_done = found.counts.optimizer_step if found is not None else 0
    return pl.Trainer(
        accelerator="gpu" if settings.device_type == "cuda" else "cpu",
        devices=1,
        precision=settings.precision.precision,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=config.optim.gradient_clip_norm or None,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.path, name="tensorboard", version="", purge_step=steps_done + 1),
        # Under SLURM Lightning would otherwise save and requeue from inside a signal handler.
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],
        default_root_dir=folder.path,
        benchmark=settings.device_type == "cuda",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )


def _check_cases(store_folder: Path, fold: Fold) -> None:
    missing = sorted({*fold.train, *fold.validation} - set(CaseStore(store_folder).case_ids))
    if missing:
        raise InputError(
            f"{len(missing)} case(s) of the split are not in the store: {', '.join(missing[:10])}",
            where=store_folder,
            fix="Run `voxfit preprocess` for them",
        )


def _fit(trainer: pl.Trainer, module: SegmentationModule, data: PatchDataModule, found: FoundCheckpoint | None) -> None:
    if found is not None:
        logger.info("going on from %s, after epoch %d", found.path.name, found.counts.epoch)
    with stops_as_errors(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=str(found.path) if found is not None else None)
