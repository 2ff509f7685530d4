"""The parts of a training, made from plan, options and settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import nn

from pipeline.config import TrainConfig
from pipeline.datasets.splits import Fold
from pipeline.durations import parse_duration
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.run_record import Counts
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.patch_dataset import PatchDataset
from pipeline.stop_signals import StopRequest
from pipeline.training.checkpoints import AtomicCheckpointIO, CheckpointWriter
from pipeline.training.datamodule import PatchDataModule
from pipeline.training.divergence import SCALER_PATIENCE, DivergenceGuard
from pipeline.training.ema import WeightAverage
from pipeline.training.epoch_report import EpochReport, EpochTimer
from pipeline.training.gradient_exchange import GradientExchange
from pipeline.training.gradient_noise import GradientNoise
from pipeline.training.heartbeat import HeartbeatWriter
from pipeline.training.last_step import LastStep, ValidationEnd
from pipeline.training.loop_state import ResumePoint
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.processes import NICENESS_BESIDE_CPU_NETWORK
from pipeline.training.ranks import Ranks
from pipeline.training.run_folder import RunFolder
from pipeline.training.seeding import IterationSeed
from pipeline.training.settings import Settings
from pipeline.training.step_strategy import StepStrategy
from pipeline.training.stops import StopPoint, leave_signals_alone
from pipeline.training.time_budget import TimeBudget
from pipeline.training.validation import Validator, WholeVolumeValidation


def make_network(plan: Plan, settings: Settings) -> UNet:
    """The plan's U-Net, run as the settings say."""
    return UNet(
        plan.num_channels,
        plan.num_classes,
        plan.network,
        **settings.execution._asdict(),
        fused_head=True,
    )


def make_data(
    plan: Plan, store_folder: Path, fold: Fold, config: TrainConfig, settings: Settings, *, start: Counts
) -> PatchDataModule:
    """The stream of training patches, from where `start` says on."""
    augmentation = None
    if config.augmentation.enabled:
        augmentation = Augmentation(
            config.augmentation,
            patch_size=settings.patch_size,
            num_channels=plan.num_channels,
            spacing=plan.target_spacing,
            anisotropic_axis=plan.anisotropic_axis,
            mirror_axes=plan.mirror_axes,
        )
    dataset = PatchDataset(
        store_folder,
        fold.train,
        patch_size=settings.patch_size,
        foreground_fraction=config.foreground_fraction,
        seed=config.seed,
        augmentation=augmentation,
        defer_augmentation=settings.augment_on_gpu,
    )
    data = PatchDataModule(
        dataset,
        batch_size=settings.batch_size,
        iterations_per_epoch=settings.pace.passes_per_epoch,
        start=(start.epoch, settings.pace.passes_into_epoch(start)),
        num_workers=settings.processes.num_workers,
        pin_memory=settings.device_type == "cuda",
        augmentation=augmentation if settings.augment_on_gpu else None,
        niceness=NICENESS_BESIDE_CPU_NETWORK if settings.device_type == "cpu" else 0,
    )
    data.share = (settings.pace.rank, settings.pace.num_ranks)
    return data


def make_validator(
    plan: Plan,
    store_folder: Path,
    case_ids: tuple[str, ...],
    settings: Settings,
    *,
    request: StopRequest,
    ranks: Ranks,
    scores_on_host: bool,
    progress: Path | None = None,
) -> Validator:
    """Whole-volume validation with the training patch as its window."""
    return Validator(
        store_folder=store_folder,
        case_ids=case_ids,
        patch_size=settings.patch_size,
        num_classes=plan.num_classes,
        scores_on_host=scores_on_host,
        request=request,
        ranks=ranks,
        progress=progress,
    )


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of a training; `in_order` they run.

    Attributes:
        in_order: Resume point, clock, seed, guard, average, validation and its end, gradient noise, exchange of
            gradients between ranks, report, last step, checkpoints, heartbeat, time budget, stop point.
        guard: Stops a training that diverges.
        last_step: Knows the last finished optimiser step; stands after all that do something when one is finished.
        writer: Saves checkpoints; the last one that does something with the state.
        heartbeat: Says how far the training is.
    """

    in_order: list[pl.Callback]
    guard: DivergenceGuard
    last_step: LastStep
    writer: CheckpointWriter
    heartbeat: HeartbeatWriter


def make_callbacks(
    network: nn.Module,
    data: PatchDataModule,
    folder: RunFolder,
    table: MetricsTable,
    validator: Validator,
    config: TrainConfig,
    settings: Settings,
    start: Counts,
) -> Callbacks:
    """Everything that happens around the training step."""
    pace, timer = settings.pace, EpochTimer(data.wait_clock)
    patience = SCALER_PATIENCE if settings.precision.precision == "16-mixed" else 0
    average = WeightAverage(network, decay=config.optim.ema_decay) if config.optim.ema_decay > 0 else None
    validation = None
    if validator.case_ids:
        validation = WholeVolumeValidation(
            validator.limited_to(config.max_validation_cases),
            every_n_epochs=config.validate_every_n_epochs,
            max_epochs=config.max_epochs,
            network=average.network if average is not None else None,
        )
    noise, counts = GradientNoise(pace.num_ranks), {"iterations_per_epoch": pace.iterations_per_epoch}
    ranks = validator.ranks
    exchange = GradientExchange(ranks, pace, noise) if ranks.num > 1 else None
    shared = {"noise": noise, "exchange": exchange, "ranks": ranks}
    report = EpochReport(table, timer, validation, max_epochs=config.max_epochs, **counts, **shared)
    seeds = IterationSeed(config.seed, pace=pace)
    guard, last_step = DivergenceGuard(folder.last_checkpoint, pace=pace, patience=patience), LastStep(pace, start)
    between = 60 * config.save_every_minutes
    writer = CheckpointWriter(folder, last_step, guard=guard, validation=validation, seconds_between_saves=between)
    epochs = {"validation": validation, "max_epochs": config.max_epochs}
    heartbeat = HeartbeatWriter(folder.heartbeat, last_step, table=table, **epochs)
    measured = [validation, ValidationEnd(last_step), noise, exchange, report]
    all_ = [ResumePoint(pace), timer, seeds, guard, average, *measured, last_step, writer, heartbeat]
    stops = _stops(validator.request, heartbeat, writer, config)
    in_order = [callback for callback in [*all_, *stops] if callback is not None]
    return Callbacks(in_order, guard, last_step, writer, heartbeat)


def _stops(
    request: StopRequest, heartbeat: HeartbeatWriter, writer: CheckpointWriter, config: TrainConfig
) -> list[pl.Callback]:
    """What ends a training before it is done."""
    request.while_checking = heartbeat.beat_if_due
    stops: list[pl.Callback] = [StopPoint(request, heartbeat.last_step.pace)]
    if config.max_time:
        stops.insert(0, TimeBudget(request, heartbeat, writer, seconds=parse_duration(config.max_time)))
    return stops


def make_trainer(
    folder: RunFolder,
    callbacks: list[pl.Callback],
    config: TrainConfig,
    settings: Settings,
    ranks: Ranks,
    *,
    start: Counts,
) -> pl.Trainer:
    """Lightning's trainer: the loop, precision, accumulation and clipping; everything else is in our callbacks."""
    # What an epoch whose end is done again has logged is dropped, too.
    purge_step = start.epoch * settings.pace.steps_per_epoch + 1
    trainer = pl.Trainer(
        accelerator="gpu" if settings.device_type == "cuda" else "cpu",
        devices=1,
        precision=settings.precision.precision,
        max_epochs=config.max_epochs,
        accumulate_grad_batches=settings.pace.passes_per_step,
        gradient_clip_val=config.optim.gradient_clip_norm or None,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder.path, name="tensorboard", version="", purge_step=purge_step),
        **_placed(settings, ranks),
        default_root_dir=folder.path,
        benchmark=settings.device_type == "cuda",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty() and ranks.is_first,
    )
    return leave_signals_alone(trainer)


def _placed(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Trainer's options for a process on its own, or for one of several."""
    if ranks.num == 1:
        # Under SLURM Lightning would otherwise save and requeue from inside a signal handler.
        return {"plugins": [AtomicCheckpointIO(), LightningEnvironment()]}
    on_gpu = settings.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return {"strategy": StepStrategy(ranks.place, device, checkpoint_io=AtomicCheckpointIO())}
