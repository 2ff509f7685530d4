"""An exponential moving average of the network's weights, kept beside the trained ones."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipeline.networks.weights import EMA_KEY


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): early weights are forgotten fast (the rule of TensorFlow's moving average)."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class WeightAverage(pl.Callback):
    """Averages the weights after every optimiser step and keeps the average in the checkpoints.

    Parameters are averaged, buffers (such as running statistics of a batch norm) are copied. Checkpoints hold the
    averaged network under `ema_state_dict`, by the network's own keys.

    Args:
        network: The network that is trained; copied at once.
        decay: Of the average, per optimiser step, once warmed up.
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._average = AveragedModel(network, multi_avg_fn=self._mix)
        self._num_updates = 0
        self._steps_seen = 0

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        return self._average.module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the trained network onto its device (its own counter stays, so that no step waits for a GPU)."""
        self.network.to(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Average once per optimiser step, whatever the accumulation."""
        if trainer.global_step > self._steps_seen:
            self._steps_seen = trainer.global_step
            self._average.update_parameters(pl_module.network)
            self._num_updates += 1

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the average to what is saved."""
        checkpoint[EMA_KEY] = self.network.state_dict()
        checkpoint["ema_num_updates"] = self._num_updates

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved average."""
        self.network.load_state_dict(checkpoint[EMA_KEY])
        self._num_updates = int(checkpoint["ema_num_updates"])
        self._average.n_averaged.fill_(self._num_updates)
        self._steps_seen = int(checkpoint["global_step"])

    @torch.no_grad()
    def _mix(self, averaged: list[Tensor], current: list[Tensor], _: Tensor | int) -> None:
        weight = 1 - warmed_up_decay(self.decay, self._num_updates)
        torch._foreach_lerp_(averaged, current, weight)
