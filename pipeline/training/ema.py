"""An exponential moving average of the network's weights, kept beside the trained ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from pipeline.networks.weights import EMA_KEY


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): early weights are forgotten fast (the rule of TensorFlow's moving average)."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class WeightAverage(pl.Callback):
    """Averages the weights after every optimiser step and keeps the average in the checkpoints.

    Parameters are averaged, from the weights after the first step on; buffers (such as running statistics of a batch
    norm) are copied. Checkpoints hold the averaged network under `ema_state_dict`, by the network's own keys. Not
    torch's AveragedModel: the count that it keeps as a tensor makes every step wait for a GPU.

    Args:
        network: The network that is trained; copied at once.
        decay: Of the average, per optimiser step, once warmed up.

    Attributes:
        network: The averaged network.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.network = deepcopy(network).requires_grad_(False)
        self._num_updates = 0
        self._steps_seen = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the trained network onto its device."""
        self.network.to(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Average once per optimiser step, whatever the accumulation."""
        if trainer.global_step > self._steps_seen:
            self._steps_seen = trainer.global_step
            self._follow(pl_module.network)
            self._num_updates += 1

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the average to what is saved."""
        checkpoint[EMA_KEY] = self.network.state_dict()
        checkpoint["ema_num_updates"] = self._num_updates

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved average."""
        self.network.load_state_dict(checkpoint[EMA_KEY])
        self._num_updates = int(checkpoint["ema_num_updates"])
        self._steps_seen = int(checkpoint["global_step"])

    @torch.no_grad()
    def _follow(self, network: nn.Module) -> None:
        averaged, current = list(self.network.parameters()), list(network.parameters())
        if self._num_updates == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - warmed_up_decay(self.decay, self._num_updates))
        for kept, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)
