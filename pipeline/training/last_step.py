"""What a training that is interrupted can be taken up from: the last finished optimiser step, if it is still there."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.networks.out_of_memory import is_out_of_memory
from pipeline.run_record import Counts, Phase
from pipeline.training.loop_state import Pace


class _Mark(NamedTuple):
    """What tells a changed state from that of a finished optimiser step.

    Attributes:
        parameters: Version of each parameter.
        state: Identity and version, or the value, of each entry of the optimiser's state by parameter and name.
    """

    parameters: list[int]
    state: dict[tuple[int, str], Any]


class LastStep(pl.Callback):
    """Keeps count of the last finished optimiser step, and knows whether memory still holds the state as of it.

    An optimiser step is finished when all callbacks have seen its end: this one stands after those that do something
    then. After an error the state is that of the last finished step unless a later one has changed something: every
    in-place change of a tensor raises its `_version`, which is compared. Fused kernels do not raise it, but they
    allocate nothing, so an out-of-memory can come before and after them only, or between those of two groups of
    parameters in the very first step, when the state of the second is made; what tells is that the step was returned
    from, or that an entry `step` has moved. Running statistics change in every forward pass without a trace, so they
    are copied at every step (group and instance norm have none) and put back.

    Callbacks that keep something for checkpoints do their part: their `state_dict` is as of the last finished
    optimiser step as well, whatever passes came after it.

    Args:
        pace: How an epoch is cut up.
        counts: What the training goes on from.

    Attributes:
        counts: As of the last finished optimiser step.
        phase: What the training is doing.
        is_current: After an error: whether memory holds the state as of `counts`, to be saved.
    """

    def __init__(self, pace: Pace, counts: Counts) -> None:
        self.pace = pace
        self.counts = counts
        self.phase: Phase = "start"
        self.is_current = False
        self._stepped = False
        self._mark: _Mark | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note what the training starts from."""
        trainer.optimizers[0].register_step_post_hook(self._note_step)
        self._buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        self._mark = _Mark(_versions(pl_module), _state_of(trainer.optimizers[0]))
        self.phase = self._phase_after(self.pace.passes_into_epoch(self.counts))

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _phase_after(self, passes: int) -> Phase:
        return "validation" if passes == self.pace.passes_per_epoch else "data"

    def on_train_batch_start(self, *_: Any) -> None:
        """A batch is there."""
        self.phase = "forward"

    def on_before_backward(self, *_: Any) -> None:
        """The loss is there."""
        self.phase = "backward"

    def on_before_optimizer_step(self, *_: Any) -> None:
        """The gradients of all passes are there; clipping comes next."""
        self.phase = "optimiser"

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a finished optimiser step."""
        if trainer.global_step > self.counts.optimizer_step:
            counts = self.pace.counts(epoch=trainer.current_epoch, passes=batch_idx + 1)
            mark = _Mark(_versions(pl_module), _state_of(trainer.optimizers[0]))
            for buffer, copy in self._buffers:
                copy.copy_(buffer)
            # Last and at once: an error in between would leave a new mark with old counts, and the step be done twice.
            self._mark, self.counts, self._stepped = mark, counts, False
        self.phase = self._phase_after(batch_idx + 1)

    def on_train_epoch_start(self, *_: Any) -> None:
        """The first batch of an epoch comes next."""
        self.phase = "data"

    def finish_epoch(self, counts: Counts) -> None:
        """Count the epoch as finished, once all that is kept of it is on disk."""
        self.counts = counts

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Put back what an unfinished step has changed, if that can be told from what was there before."""
        # Ctrl-C comes at any line, also between the kernels of a step and the note that it was made.
        sudden = not is_out_of_memory(exception) and self.phase == "optimiser"
        # Where the fp16 scaler leaves a step out nothing changes, but callbacks before this one may have seen its end.
        half_seen = trainer.global_step > self.counts.optimizer_step
        if self._mark is None or self._stepped or sudden or half_seen:
            return
        optimizer = trainer.optimizers[0]
        state, known = _state_of(optimizer), self._mark.state
        new = {key: value for key, value in state.items() if key not in known}
        if _versions(pl_module) != self._mark.parameters or state != {**new, **known} or _has_stepped(optimizer, new):
            return
        _drop(optimizer, new)
        for buffer, copy in self._buffers:
            buffer.copy_(copy)
        self.is_current = True


class ValidationEnd(pl.Callback):
    """Notes that a validation is over; stands behind it."""

    def __init__(self, last_step: LastStep) -> None:
        self.last_step = last_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What the epoch brought is written down next."""
        self.last_step.phase = "report"


def _versions(module: nn.Module) -> list[int]:
    return [parameter._version for parameter in module.parameters()]


def _state_of(optimizer: Optimizer) -> dict[tuple[int, str], Any]:
    return {
        (id(parameter), key): (id(value), value._version) if isinstance(value, Tensor) else value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _has_stepped(optimizer: Optimizer, new: dict[tuple[int, str], Any]) -> bool:
    """Whether the step of some parameter without an earlier one was counted."""
    return any(
        float(values["step"]) > 0 for parameter, values in optimizer.state.items() if (id(parameter), "step") in new
    )


def _drop(optimizer: Optimizer, new: dict[tuple[int, str], Any]) -> None:
    for parameter, values in list(optimizer.state.items()):
        for key in [key for key in values if (id(parameter), key) in new]:
            del values[key]
        if not values:
            del optimizer.state[parameter]
