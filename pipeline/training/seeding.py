"""Random numbers inside the network (dropout and the like) as a function of the seed and the iteration."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from pipeline.training.loop_state import Pace

# Two large odd numbers keep the streams of neighbouring seeds and iterations apart; any would do.
SEED_STRIDE = 0x9E3779B97F4A7C15
ITERATION_STRIDE = 0xD1B54A32D192ED03


class IterationSeed(pl.Callback):
    """Seeds torch before every iteration, so that no random state needs to be saved to resume exactly.

    Args:
        seed: Of the run.
        pace: How an epoch is cut up; passes of several ranks have the numbers that they would have on one.
    """

    def __init__(self, seed: int, *, pace: Pace) -> None:
        self.seed = seed
        self.pace = pace

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the generators of the CPU and of the GPU in use."""
        passes_per_epoch = self.pace.passes_per_epoch * self.pace.num_ranks
        iteration = trainer.current_epoch * passes_per_epoch + self.pace.number(batch_idx)
        seed = (self.seed * SEED_STRIDE + iteration * ITERATION_STRIDE) % 2**63
        # Not `torch.manual_seed`: for every kind of device that is absent it queues the call, with a stack trace.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
