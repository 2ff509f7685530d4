"""What `run.json` says when a run begins and when it is done."""

from __future__ import annotations

import math
import platform
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import nn

from pipeline import __version__
from pipeline.datasets.splits import Splits
from pipeline.log import get_logger
from pipeline.networks.weights import read_weights
from pipeline.plan import Plan, Rung
from pipeline.run_record import Counts, InitialWeights, RunRecord, StepDown
from pipeline.training.checkpoints import CheckpointWriter
from pipeline.training.metrics_table import VALIDATION_SECONDS, MetricsTable
from pipeline.training.probe_memory import context_bytes
from pipeline.training.run_folder import hash_of
from pipeline.training.settings import Settings
from pipeline.training.validation import ValidationResult, Validator

PACKAGES = ("torch", "pytorch-lightning", "monai", "numpy", "blosc2")


def started_record(
    settings: Settings,
    fold: int | Literal["all"],
    network: nn.Module | None,
    *,
    splits: Splits,
    step_downs: tuple[StepDown, ...] = (),
    predicted_bytes: int | None = None,
    max_epochs: int | None = None,
    initial_weights: InitialWeights | None = None,
) -> RunRecord:
    """The record of a run that begins, also before it has a network, or goes on."""
    return RunRecord(
        fold=fold,
        max_epochs=max_epochs,
        splits_hash=hash_of(splits),
        versions={
            "python": platform.python_version(),
            "voxfit": __version__,
            **{name: _version(name) for name in PACKAGES},
        },
        device=settings.device_name,
        precision=settings.precision.precision,
        precision_reason=settings.precision.reason,
        num_threads=settings.processes.num_threads,
        num_workers=settings.processes.num_workers,
        patch_size=settings.patch_size,
        batch_size=settings.batch_size,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        num_ranks=settings.pace.num_ranks,
        step_downs=step_downs,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()) if network is not None else 0,
        initial_weights=initial_weights,
        # Plans are for GPUs; a process on a CPU takes other things.
        predicted_bytes=predicted_bytes if settings.device_type == "cuda" else None,
    )


def predicted_bytes(plan: Plan, rung: Rung) -> int | None:
    """Memory that the plan predicts of a step, or None where the step is none of its own."""
    known = (each.required_bytes for each in (plan.rung, *plan.fallbacks) if each.is_same_step(rung))
    return next(known, None) or None


def _measured_bytes(trainer: pl.Trainer, table: MetricsTable) -> int:
    """Most memory that the training held so far."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        # Peaks are reset with every epoch; what is reserved seldom falls.
        peaks = (torch.cuda.max_memory_reserved(device), *(int(row["peak_vram_bytes"] or 0) for row in table.rows))
        return max(peaks) + context_bytes()
    return max(int(row["peak_ram_bytes"] or 0) for row in table.rows)


# Looking one up takes 3 ms, and every start of a fold asks for all.
@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def finished_record(
    record: RunRecord,
    *,
    trainer: pl.Trainer,
    network: nn.Module,
    validator: Validator,
    writer: CheckpointWriter,
    table: MetricsTable,
) -> RunRecord:
    """The record of a run that is done, with the Dice of the best weights on every validation case.

    They were scored when they were saved, unless validations during training saw only some of the cases.
    """
    result = writer.best_result
    if validator.case_ids and (result is None or set(result.by_case) != set(validator.case_ids)):
        result = _score_best(trainer, network, validator, writer)
    mean = result.mean if result is not None else math.nan
    if result is not None:
        get_logger("train").info("best weights are of epoch %s: validation Dice %.4f", writer.best_epoch, mean)
    last = table.rows[-1]
    return replace(
        record,
        status="finished",
        counts=Counts(**{name: int(last[name] or 0) for name in ("epoch", "iteration", "optimizer_step")}),
        best_epoch=writer.best_epoch,
        best_dice=None if math.isnan(mean) else mean,
        validation=_by_class(result, table.class_names) if result is not None else {},
        train_seconds=round(table.total("seconds"), 3),
        validation_seconds=round(table.total(VALIDATION_SECONDS), 3),
        measured_bytes=_measured_bytes(trainer, table),
    )


def _score_best(
    trainer: pl.Trainer, network: nn.Module, validator: Validator, writer: CheckpointWriter
) -> ValidationResult:
    network.load_state_dict(read_weights(writer.folder.best_checkpoint))
    device = trainer.strategy.root_device
    return validator.score(network.to(device), device=device, forward_context=trainer.precision_plugin.forward_context)


def _by_class(result: ValidationResult, class_names: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
    return {
        case_id: {name: None if math.isnan(v) else v for name, v in zip(class_names, scores, strict=True)}
        for case_id, scores in result.by_case.items()
    }
