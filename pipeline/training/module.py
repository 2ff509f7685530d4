"""The training step and its optimiser as a LightningModule; nothing else lives here.

Shapes: images (B, C, I, J, K), labels (B, I, J, K).
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pipeline.config import OptimConfig
from pipeline.training.optim import has_fused_kernels, make_optimizer, make_scheduler


class SegmentationModule(pl.LightningModule):
    """Trains a segmentation network with patches.

    Accumulation is Lightning's `accumulate_grad_batches` k: each of the k losses is divided by k before its backward
    pass, so one optimiser step follows the mean gradient over the effective batch. With a per-sample loss (Dice with
    `batch_dice=False`) and group or instance norm, k iterations of batch 1 are the same step as one of batch k, up to
    rounding. With batch Dice they are not: it divides sums over the batch, and a mean of ratios is no ratio of sums.
    When `iterations_per_epoch` is no multiple of k, the m iterations left at the end of an epoch are flushed as a step
    of their own; their losses are divided by k all the same, so that step is m / k as large and every patch of the
    epoch has the same weight.

    Args:
        network: Takes images and gives logits (B, K, I, J, K), or what `loss` understands of deep supervision (a list,
            or a stack (B, heads, K, I, J, K)).
        loss: Called with the network's output and the labels; gives a scalar.
        optim: Optimiser and schedule.
        total_steps: Optimiser steps of the whole training, for the schedule.
    """

    def __init__(self, network: nn.Module, loss: nn.Module, *, optim: OptimConfig, total_steps: int) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.optim = optim
        self.total_steps = total_steps

    def forward(self, images: Tensor) -> Any:
        """The network's own output."""
        return self.network(images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch with keys `image` and `label`."""
        loss: Tensor = self.loss(self.network(batch["image"]), batch["label"])
        return loss

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the kind of kernel that this training's optimiser was made with: torch saves it with the state."""
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["fused"] = has_fused_kernels(self.network)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule, which moves on with every optimiser step."""
        optimizer = make_optimizer(self.network, self.optim)
        scheduler = make_scheduler(optimizer, self.optim, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
