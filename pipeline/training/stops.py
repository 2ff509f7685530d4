"""What ends a training from outside, where it may end, and how it is said in a line."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from pipeline.errors import InputError, StoppedError
from pipeline.networks.out_of_memory import is_worker_out_of_memory
from pipeline.stop_signals import StopNow, StopRequest
from pipeline.training.loop_state import Pace

# What torch says of a worker that is gone; errors in a worker are raised again with its traceback in the text.
_WORKER_KILLED = re.compile(r"^DataLoader worker \(pid.*\) (?:exited unexpectedly|is killed by signal)")


class StopPoint(pl.Callback):
    """Ends a training that was asked to stop where memory holds a finished optimiser step; stands last.

    That is after the step in work, between epochs, and at any line of a wait for data or of a validation, which see to
    it themselves. A step of many passes is given up where it would be waited for too long: what came before is kept.

    Args:
        request: Whether it was asked for.
        pace: How an epoch is cut up.
    """

    def __init__(self, request: StopRequest, pace: Pace) -> None:
        self.request = request
        self.pace = pace

    def on_train_start(self, *_: Any) -> None:
        """Do not begin."""
        self.request.in_step = False
        self.request.check()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin no epoch."""
        self.request.check()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End after a finished step."""
        self.request.in_step = not self.pace.ends_step(batch_idx)
        self.request.check()


def leave_signals_alone(trainer: pl.Trainer) -> pl.Trainer:
    """Keep Lightning from listening to signals: it would end after any pass, or save within the handler."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


@contextmanager
def stops_as_errors(trainer: pl.Trainer, request: StopRequest) -> Iterator[None]:
    """Turn what stops a training, or what Lightning and the data workers raise in `trainer.fit`, into errors for users.

    Raises:
        StoppedError: A signal came, or the time is up.
        InputError: A data worker was killed, or ran out of memory.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except StopNow as stop:
        raise _stopped(trainer, request) from stop
    except SystemExit as error:
        # How Lightning ends after a Ctrl-C that nobody listened to, which it leaves ignored.
        signal.signal(signal.SIGINT, handler)
        raise _stopped(trainer, request) from error
    except Exception as error:
        if is_worker_out_of_memory(error):
            raise _with_advice("a data worker ran out of host memory") from error
        if not _WORKER_KILLED.search(str(error)):
            raise
        if request.came:
            # Before it could set its own handlers: SLURM and systemd send signals to the workers as well.
            raise _stopped(trainer, request) from error
        raise _with_advice("a data worker was killed, most likely because memory ran out") from error


def _with_advice(what: str) -> InputError:
    return InputError(what, where="hardware.num_workers", fix="Use fewer, or ask for more memory")


def _stopped(trainer: pl.Trainer, request: StopRequest) -> StoppedError:
    name = f" ({signal.Signals(request.signal).name})" if request.signal else ""
    reason = request.reason if request.reason and not request.signal else "stopped on request"
    what = f"{reason} in epoch {trainer.current_epoch + 1}{name}"
    return StoppedError(what, fix="The same command goes on", signal=request.signal)
