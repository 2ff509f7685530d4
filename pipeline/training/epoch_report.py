"""The figures of an epoch: measured, written to `metrics.csv` and TensorBoard, and said in one line of the log."""

from __future__ import annotations

import math
import resource
from time import perf_counter
from typing import Any

import psutil
import pytorch_lightning as pl
import torch
from torch import Tensor

from pipeline.log import get_logger
from pipeline.sizes import GIB
from pipeline.training.datamodule import WaitClock
from pipeline.training.gradient_exchange import GradientExchange
from pipeline.training.gradient_noise import GradientNoise
from pipeline.training.metrics_table import COUNT_COLUMNS, NOISE_SCALE, VALIDATION_SECONDS, MetricsTable, Row
from pipeline.training.ranks import Ranks
from pipeline.training.validation import ValidationResult, WholeVolumeValidation


class EpochTimer(pl.Callback):
    """Measures the training part of an epoch and how much of it was spent waiting for data.

    Stands first among the callbacks, so that validation and saving are not counted. On a GPU, which works on while
    the next batch is waited for, the share is an upper bound.

    Args:
        wait_clock: Runs while data is waited for.

    Attributes:
        seconds: Of the training part of the epoch.
        wait_seconds: How many of them were spent waiting for data.
        peak_vram_bytes: The most that tensors took on the GPU in the training part; 0 on a CPU.
    """

    def __init__(self, wait_clock: WaitClock) -> None:
        self.wait_clock = wait_clock
        self.seconds = 0.0
        self.wait_seconds = 0.0
        self.peak_vram_bytes = 0
        self._started_at: float | None = None
        self._waited_before = 0.0
        self._before: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start to measure, also where a training goes on in the middle of an epoch."""
        self._start(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start to measure an epoch."""
        self._before = {}
        self._start(pl_module)

    def _start(self, pl_module: Any) -> None:
        self._started_at, self._waited_before = perf_counter(), self.wait_clock.seconds
        self._device: torch.device = pl_module.device
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop, once the GPU has done what it was given."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._measure()
        self._started_at = None

    def _measure(self) -> None:
        if self._started_at is None:
            return
        self.seconds = self._before.get("seconds", 0.0) + perf_counter() - self._started_at
        waited = self.wait_clock.seconds - self._waited_before
        self.wait_seconds = self._before.get("wait_seconds", 0.0) + waited
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        self.peak_vram_bytes = max(peak, int(self._before.get("peak_vram_bytes", 0)))

    def state_dict(self) -> dict[str, Any]:
        """What the epoch took so far, for one that is gone on with."""
        self._measure()
        return {"seconds": self.seconds, "wait_seconds": self.wait_seconds, "peak_vram_bytes": self.peak_vram_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an epoch."""
        self._before = dict(state_dict)


class EpochReport(pl.Callback):
    """Writes an epoch's row and says it in plain words.

    Args:
        table: Where rows go.
        timer: The epoch's times.
        validation: The epoch's validation; None without validation cases.
        iterations_per_epoch: Iterations of an epoch, for the counts.
        max_epochs: Epochs of the training, for the log line.
        noise: The gradient noise scale; stands before the report among the callbacks.
        exchange: Knows the losses over all ranks; None for a process on its own.
        ranks: Whose largest figures are reported.
    """

    def __init__(
        self,
        table: MetricsTable,
        timer: EpochTimer,
        validation: WholeVolumeValidation | None,
        *,
        iterations_per_epoch: int,
        max_epochs: int,
        noise: GradientNoise | None = None,
        exchange: GradientExchange | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.table, self.timer, self.validation = table, timer, validation
        self.noise, self.exchange, self.ranks = noise, exchange, ranks or Ranks()
        self.class_names = table.class_names
        self.iterations_per_epoch = iterations_per_epoch
        self.max_epochs = max_epochs
        self._losses: list[Tensor] = []
        self._batch_sizes: list[int] = []
        self._lr = 0.0
        # As of the last finished optimiser step: its number, the losses until then, and its rate.
        self._step, self._num_known, self._known_lr = 0, 0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin an epoch with its first batch, and note the rate before the schedule moves on."""
        if batch_idx == 0:
            # Not as soon as the row is written: an epoch's end that is interrupted after that is done again.
            self._losses, self._batch_sizes, self._num_known = [], [], 0
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], *_: Any
    ) -> None:
        """Note the loss, where it lies: reading it would make a GPU wait.

        Lightning hands on the loss as it went into the backward pass: divided by the number of accumulated batches.
        """
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        self._batch_sizes.append(len(batch["image"]))
        if self.exchange is not None and self.exchange.losses:
            losses = [loss.float() * trainer.accumulate_grad_batches for loss in self.exchange.losses]
            self._losses[-len(losses) :], self.exchange.losses = losses, []
        if trainer.global_step > self._step:
            self._step, self._num_known, self._known_lr = trainer.global_step, len(self._losses), self._lr

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the row and the line."""
        row = self._row(trainer, self._mean_loss())
        self.table.append(row)
        for logger in trainer.loggers:
            scalars = {key: value for key, value in row.items() if value is not None and key not in COUNT_COLUMNS}
            logger.log_metrics(scalars, step=trainer.global_step)
        get_logger("train").info(self._line(row))

    def _mean_loss(self) -> float:
        """Over the patches of the epoch: batches are of two sizes where the training stepped down in between."""
        losses = torch.stack([loss.cpu() for loss in self._losses]).double()
        # Bad losses are let through by the divergence guard with fp16 only, where their steps were left out.
        weights = torch.tensor(self._batch_sizes).double() * torch.isfinite(losses)
        return float((losses.nan_to_num() * weights).sum() / weights.sum())

    def state_dict(self) -> dict[str, Any]:
        """The epoch as of its last finished optimiser step; of a finished one, all of it."""
        return {
            "losses": [float(loss) for loss in self._losses[: self._num_known]],
            "batch_sizes": self._batch_sizes[: self._num_known],
            "lr": self._known_lr,
            "step": self._step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an epoch."""
        self._losses = list(torch.tensor(state_dict["losses"]).unbind())
        self._batch_sizes = list(state_dict["batch_sizes"])
        self._lr = self._known_lr = state_dict["lr"]
        self._step, self._num_known = state_dict["step"], len(self._losses)

    def _row(self, trainer: pl.Trainer, train_loss: float) -> Row:
        epoch, own = trainer.current_epoch + 1, (self.timer.peak_vram_bytes, peak_ram_bytes(), self.timer.wait_seconds)
        # What holds one rank up, or is too small for it, is so for the training.
        peak_vram, peak_ram, waited = (max(each) for each in zip(*self.ranks.meet(own), strict=True))
        row: Row = {
            "epoch": epoch,
            "iteration": epoch * self.iterations_per_epoch,
            "optimizer_step": int(trainer.global_step),
            "seconds": round(self.timer.seconds, 3),
            "data_wait_share": round(waited / max(self.timer.seconds, 1e-9), 4),
            "peak_vram_bytes": peak_vram,
            "peak_ram_bytes": peak_ram,
            "lr": self._lr,
            "train_loss": train_loss,
        }
        if self.noise is not None and self.noise.reading is not None:
            row[NOISE_SCALE] = self.noise.reading.noise_scale
        result = self.validation.result if self.validation is not None else None
        return row if result is None else {**row, **self._scores(result)}

    def _scores(self, result: ValidationResult) -> Row:
        by_class = {f"val_dice_{name}": _known(v) for name, v in zip(self.class_names, result.by_class, strict=True)}
        return {"val_dice_mean": _known(result.mean), **by_class, VALIDATION_SECONDS: round(result.seconds, 3)}

    def _line(self, row: Row) -> str:
        parts = [f"epoch {row['epoch']} of {self.max_epochs}: train loss {row['train_loss']:.4f}"]
        if row.get("val_dice_mean") is not None:
            classes = ", ".join(f"{name} {_shown(row[f'val_dice_{name}'])}" for name in self.class_names)
            parts.append(f"validation Dice {row['val_dice_mean']:.4f} ({classes}) in {row[VALIDATION_SECONDS]:.1f} s")
        parts.append(f"{row['seconds']:.1f} s, {row['data_wait_share']:.0%} of it waiting for data")
        parts.append(f"iteration {row['iteration']}, optimiser step {row['optimizer_step']}, rate {row['lr']:.3g}")
        if self.noise is not None:
            parts += filter(None, [self.noise.describe()])
        memory = f"{row['peak_ram_bytes'] / GIB:.1f} GiB RAM"  # type: ignore[operator]
        vram = f", {row['peak_vram_bytes'] / GIB:.1f} GiB VRAM" if row["peak_vram_bytes"] else ""  # type: ignore[operator]
        return "; ".join([*parts, memory + vram])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4f}"


def peak_ram_bytes() -> int:
    """The largest memory that this process held, and what its data workers hold now beyond what they share with it."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return own + sum(_unshared_bytes(child) for child in psutil.Process().children(recursive=True))


def _unshared_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0
