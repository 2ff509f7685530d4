"""Measures the gradient noise scale on the micro-batches of every optimiser step, without copying a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pipeline.log import get_logger
from pipeline.training.noise_scale import NoiseReading, NoiseSums, signal_and_noise


class _Step(NamedTuple):
    squared_norms: Tensor
    num_batches: int
    mean_inverse_batch: float


class GradientNoise(pl.Callback):
    """Measures the gradient noise scale of a training that accumulates; without accumulation there is none to measure.

    A hook on every parameter sees the gradient of the micro-batch alone, on its way to being accumulated, and keeps
    its norm: no gradient is copied. The norm of the accumulated gradient is taken before clipping. Norms stay where
    the gradients are and are read once an epoch, so that no iteration waits for a GPU. Steps left out by the fp16
    scaler are left out here, and so is a step over a single micro-batch, as may be left at the end of an epoch.

    The estimate takes patches for drawn independently. `PatchSampler` spreads foreground patches and cases evenly
    instead, so the patches of a step differ more than independent ones would: over m micro-batches of one patch that
    lowers |G|^2 by up to 1 / (m - 1) of the variance between the kinds of patches, and raises the noise scale. Read it
    as an upper bound at an accumulation of two or three. Micro-batches of several ranks count like accumulated ones:
    `GradientExchange` averages their norms.

    Args:
        num_ranks: Processes whose gradients are averaged.

    Attributes:
        reading: As of the last finished epoch; None where an optimiser step has a single micro-batch.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.reading: NoiseReading | None = None
        self._sums = NoiseSums()
        self._pending: list[_Step] = []
        self._handles: list[RemovableHandle] = []
        self._in_pieces = False
        self._batch_size = self._effective_batch = 1
        self._begin_step()

    def _begin_step(self) -> None:
        self._norms: dict[int, Tensor] = {}
        self._small: list[Tensor] = []
        self._inverse_batches: list[float] = []
        self._measured: _Step | None = None
        self._mean_of_all: Tensor | None = None

    def mean_of_own(self, device: torch.device) -> Tensor:
        """Mean over this rank's micro-batches of the step of their squared norms; 0 where none were measured."""
        return torch.stack(self._small).mean() if self._small else torch.zeros((), dtype=torch.float64, device=device)

    def take_mean_of_all(self, mean: Tensor) -> None:
        """Put the mean over all ranks in the place of this rank's own."""
        self._mean_of_all = mean

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where nothing can be measured."""
        if not self._is_measured(trainer):
            get_logger("train").info(
                "the gradient noise scale is not measured: that takes an effective_batch of at least twice batch_size"
            )

    def _is_measured(self, trainer: pl.Trainer) -> bool:
        return trainer.accumulate_grad_batches * self.num_ranks > 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: dict[str, Any], *_: Any) -> None:
        """Note how many patches the micro-batch has."""
        self._batch_size = len(batch["image"])
        self._effective_batch = self._batch_size * trainer.accumulate_grad_batches * self.num_ranks

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Begin an optimiser step, between the forward and the backward pass of its first micro-batch."""
        self._begin_step()
        if self._is_measured(trainer) and not (self._handles or self._in_pieces):
            parameters = [each for each in pl_module.parameters() if each.requires_grad]
            self._handles = [each.register_hook(self._hook(index)) for index, each in enumerate(parameters)]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def keep_norm(gradient: Tensor) -> None:
            # Twice in one pass: a nested backward pass hands it in piece by piece, and pieces have other norms.
            self._in_pieces |= index in self._norms
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self._norms[index] = torch.linalg.vector_norm(gradient, dtype=dtype)

        return keep_norm

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the norm of the micro-batch's own gradient."""
        if self._norms:
            self._small.append(torch.stack(list(self._norms.values())).double().square().sum())
            self._inverse_batches.append(1 / self._batch_size)
            self._norms = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note the norms of a whole step: Lightning's division by the accumulation and the fp16 scale taken out."""
        per_rank, accumulate = len(self._small), trainer.accumulate_grad_batches
        num = per_rank * self.num_ranks
        if num < 2 or self._in_pieces:
            return
        small = self._mean_of_all if self._mean_of_all is not None else torch.stack(self._small).mean()
        small = small * accumulate**2
        gradients = [each.grad for each in pl_module.parameters() if each.grad is not None]
        big = torch.nn.utils.get_total_norm(gradients).double().square() * (accumulate / per_rank) ** 2
        if trainer.scaler is not None:
            scale = trainer.scaler.scale(torch.ones_like(small))
            small = small / scale**2
            # Optimisers that undo the scale themselves, such as fused AdamW, have not done so yet.
            big = big / scale**2 if getattr(optimizer, "_step_supports_amp_scaling", False) else big
        mean_inverse_batch = sum(self._inverse_batches) / per_rank
        self._measured = _Step(torch.stack([small, big]), num, mean_inverse_batch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep what was measured once the optimiser step is made: a failed one will be repeated."""
        if self._measured is not None:
            self._pending.append(self._measured)
        self._measured = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what the epoch brought."""
        self._collect()
        if self._in_pieces and self._handles:
            get_logger("train").warning("no gradient noise scale: gradients of this network arrive in pieces")
            self._unhook()
        is_measured = self._is_measured(trainer) and not self._in_pieces
        self.reading = self._sums.read() if is_measured else None

    def _collect(self) -> None:
        sums = replace(self._sums)
        for squared_norms, num, inverse in self._pending:
            # One by one, because stacking them first takes memory on the device, of which none may be left.
            small, big = squared_norms.tolist()
            if math.isfinite(small) and math.isfinite(big):
                sums.add(*signal_and_noise(small, big, num_batches=num, mean_inverse_batch=inverse))
        # At once, so that an interruption loses no step and adds none twice.
        self._sums, self._pending = sums, []

    def describe(self) -> str:
        """The reading in words; empty where there is none."""
        if self.reading is None:
            return ""
        return self.reading.describe(batch_size=self._batch_size, effective_batch=self._effective_batch)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the network without hooks."""
        self._unhook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the network without hooks."""
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The running sums, with all finished optimiser steps in them and no unfinished one."""
        self._collect()
        return asdict(self._sums)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self._sums, self._pending = NoiseSums(**state_dict), []
