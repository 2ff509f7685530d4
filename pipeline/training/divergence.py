"""Stops a training whose loss is no number any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from pipeline.errors import TrainingDivergedError
from pipeline.training.loop_state import Pace

SCALER_PATIENCE = 10


class _Seen(NamedTuple):
    loss: Tensor
    is_finite: Tensor
    copied: torch.cuda.Event | None
    case_ids: tuple[str, ...]
    iteration: int
    ends_step: bool


class DivergenceGuard(pl.Callback):
    """Raises when a loss is NaN or infinite, naming the cases of the batch.

    A loss is looked at one iteration late, and the last one at the end of the epoch before anything is saved. The
    verdict is copied to the host as soon as the GPU has the loss, so that looking waits for no later iteration. With
    fp16 single bad losses are part of the method (the gradient scaler leaves that step out and lowers its scale): only
    ten in a row count.

    Args:
        last_checkpoint: What is named as the way back, once it exists.
        pace: How an epoch is cut up, to number iterations.
        patience: Bad losses in a row that are borne.
    """

    def __init__(self, last_checkpoint: Path, *, pace: Pace, patience: int = 0) -> None:
        self.last_checkpoint = last_checkpoint
        self.pace = pace
        self.patience = patience
        self._pending: _Seen | None = None
        self._bad_in_a_row = 0
        self._bad_at_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Look at the loss of the iteration before, and keep this one."""
        self._look()
        iteration = self.pace.iteration(epoch=trainer.current_epoch, batch_idx=batch_idx)
        is_finite, copied = _copied_to_host(torch.isfinite(outputs["loss"]))
        case_ids, ends_step = tuple(batch.get("case_id", ())), self.pace.ends_step(batch_idx)
        self._pending = _Seen(outputs["loss"], is_finite, copied, case_ids, iteration, ends_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check before anything is saved."""
        self.check(trainer, pl_module)

    def check(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look at the last loss, and at the weights, which the last step may have spoilt without a bad loss."""
        self._look()
        if not weights_are_finite(pl_module):
            raise self._error("the weights became NaN or infinite", f"epoch {trainer.current_epoch + 1}")

    def state_dict(self) -> dict[str, Any]:
        """The bad losses in a row up to the last finished optimiser step: those after it will be seen again."""
        return {"bad_in_a_row": self._bad_at_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._bad_in_a_row = self._bad_at_step = int(state_dict["bad_in_a_row"])

    def _look(self) -> None:
        seen, self._pending = self._pending, None
        if seen is None:
            return
        if seen.copied is not None:
            seen.copied.synchronize()
        self._bad_in_a_row = 0 if bool(seen.is_finite) else self._bad_in_a_row + 1
        if seen.ends_step:
            self._bad_at_step = self._bad_in_a_row
        if self._bad_in_a_row > self.patience:
            place = f"iteration {seen.iteration}, case {', '.join(dict.fromkeys(seen.case_ids))}"
            raise self._error(f"the loss became {float(seen.loss)}", place)

    def _error(self, what: str, where: str) -> TrainingDivergedError:
        way_back = f"The last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint.is_file() else ""
        remedy = "Look at the case, lower optim.lr, or train in 32-true"
        return TrainingDivergedError(what, where=where, fix=". ".join(filter(None, [remedy, way_back])))


def _copied_to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The flag on the host, to be read once the event has passed; without an event it is there already."""
    if flag.device.type != "cuda":
        return flag, None
    on_host, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))
    return on_host, copied


def weights_are_finite(module: nn.Module) -> bool:
    """Whether no parameter holds a NaN or an infinity."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
