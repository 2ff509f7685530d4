"""Averages the gradients of all ranks once per optimiser step, after every rank has said that it has its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sizes import MIB
from pipeline.training.ema import WeightAverage
from pipeline.training.gradient_noise import GradientNoise
from pipeline.training.loop_state import Pace
from pipeline.training.ranks import Ranks

BUCKET_BYTES = 32 * MIB


class GradientExchange(pl.Callback):
    """What Lightning's DDP does by torch's wrapper within the backward pass, done after it.

    Torch's DistributedDataParallel exchanges gradients while the last backward pass runs, so a rank that runs out of
    memory there leaves the others hanging, and it keeps a second copy of all gradients. Here nothing is sent within a
    pass. When the last one is done the ranks meet, where one that could not finish says so, and only then are gradients
    averaged, through one workspace that was taken at the start. What that costs is the overlap with the backward pass:
    gradients are small beside the activations of a dense volume. NCCL takes memory of its own on top.

    The losses of the passes and the norms of the gradient noise are averaged along, and floating-point buffers such as
    running statistics of a batch norm, so that all ranks report, and could save, the same.

    Args:
        ranks: More than one.
        pace: How an epoch is cut up.
        noise: Stands before this callback.

    Attributes:
        losses: Of the passes of the last optimiser step, over all ranks, as they went into the backward pass.
    """

    def __init__(self, ranks: Ranks, pace: Pace, noise: GradientNoise) -> None:
        self.ranks, self.pace, self.noise = ranks, pace, noise
        self.losses: list[Tensor] = []
        self._own_losses: list[Tensor] = []
        self._workspaces: dict[torch.dtype, Tensor] = {}
        self._ends_step = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take what is needed later, and have everyone start from the first rank's weights."""
        tensors = [*(each for each in pl_module.parameters() if each.requires_grad), *_float_buffers(pl_module)]
        for dtype in {each.dtype for each in tensors}:
            largest = max(each.numel() for each in tensors if each.dtype == dtype)
            # One more bucket's worth is all that an exchange takes, and it is there before the first step.
            size = max(largest, BUCKET_BYTES // dtype.itemsize)
            self._workspaces[dtype] = torch.empty(size, dtype=dtype, device=pl_module.device)
        averages = [each.network for each in trainer.callbacks if isinstance(each, WeightAverage)]
        modules = [pl_module, *averages]
        self.ranks.meet()
        with self.ranks.exchange() as group, torch.no_grad():
            for tensor in (each for module in modules for each in (*module.parameters(), *module.buffers())):
                dist.broadcast(tensor.data, src=0, group=group)
        self._check_same_start(trainer)

    def _check_same_start(self, trainer: pl.Trainer) -> None:
        """A file system that shows one node an older checkpoint must not let ranks go on from different steps."""
        state = [
            _digest(value) if isinstance(value, Tensor) else value
            for values in trainer.optimizers[0].state.values()
            for value in values.values()
        ]
        scale = trainer.scaler.get_scale() if trainer.scaler is not None else 1.0
        found = self.ranks.meet((trainer.current_epoch, trainer.global_step, scale, state))
        if any(each != found[0] for each in found):
            steps = ", ".join(str(step) for _, step, *_ in found)
            raise InputError(
                f"the processes read different checkpoints (of optimiser steps {steps})",
                where=trainer.ckpt_path or "",
                fix="Start again once all nodes see the same files",
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a pass."""
        self._ends_step = self.pace.ends_step(batch_idx)

    def on_before_zero_grad(self, *_: Any) -> None:
        """Begin an optimiser step, between the forward and the backward pass of its first pass."""
        self._own_losses = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Keep the loss of a pass, without the scale that fp16 gave it."""
        value = loss.detach().double()
        self._own_losses.append(
            value if trainer.scaler is None else value / trainer.scaler.scale(torch.ones_like(value))
        )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Meet and average, once the step's last pass is done."""
        if not self._ends_step:
            return
        parameters = [each for each in pl_module.parameters() if each.requires_grad]
        missing = tuple(index for index, each in enumerate(parameters) if each.grad is None)
        # Before they meet, because memory may run out.
        shared = torch.stack([*self._own_losses, self.noise.mean_of_own(pl_module.device)])
        if len(set(self.ranks.meet(missing))) > 1:
            raise InputError(
                "parameters have a gradient on some of the processes only",
                where="network",
                fix="Use all of its parameters in every pass, or train on one device",
            )
        gradients = [each.grad for each in parameters if each.grad is not None]
        with self.ranks.exchange() as group:
            for bucket in _buckets([*gradients, *_float_buffers(pl_module)]):
                self._average(bucket, group)
            dist.all_reduce(shared, group=group)
        *self.losses, mean_norm = (shared / self.ranks.num).unbind()
        self.noise.take_mean_of_all(mean_norm)

    @torch.no_grad()
    def _average(self, tensors: list[Tensor], group: Any) -> None:
        """All of one type, and together no larger than the workspace."""
        sizes = [each.numel() for each in tensors]
        flat = self._workspaces[tensors[0].dtype][: sum(sizes)]
        pieces = flat.split(sizes)
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.view_as(tensor).copy_(tensor)
        dist.all_reduce(flat, group=group)
        flat /= self.ranks.num
        for piece, tensor in zip(pieces, tensors, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _digest(tensor: Tensor) -> int:
    """The same for the same bits, whatever the device and the order in which it adds."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().reshape(-1).view(whole)
    # Slice by slice, because the sum of all would first be a copy in 64 bits.
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(BUCKET_BYTES // 8))


def _float_buffers(module: Any) -> list[Tensor]:
    return [each for each in module.buffers() if each.is_floating_point()]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together at most `BUCKET_BYTES`, or a single larger one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(each.nbytes for each in (*bucket, tensor))
        if bucket and (tensor.dtype != bucket[0].dtype or size > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
