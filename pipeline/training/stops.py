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
from pipeline.training.departures import GOES_ON
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
        self.request.got_on |= not self.request.in_step
        self.request.check()

    def on_train_epoch_end(self, *_: Any) -> None:
        """What the epoch came to is saved."""
        self.request.got_on = True


def leave_signals_alone(trainer: pl.Trainer) -> pl.Trainer:
    """Keep Lightning from listening to signals: it would end after any pass, or save within the handler.

    Of several ranks it would have each wait for the first one before every pass, also for one that has left.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


@contextmanager
def stops_as_errors(trainer: pl.Trainer, request: StopRequest) -> Iterator[None]:
    """Turn what stops a training, or what Lightning and the data workers raise in `trainer.fit`, into errors for users.

    Raises:
        StoppedError: A signal came, or the time is up.
        InputError: A data worker was killed, or ran out of memory; the time is too short for anything to be finished.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except StopNow as stop:
        if not request.signal and not request.got_on:
            raise _in_vain(trainer, request) from stop
        raise _stopped(trainer, request) from stop
    except SystemExit as error:
        # How Lightning ends after a Ctrl-C that nobody listened to, which it leaves ignored.
        signal.signal(signal.SIGINT, handler)
        raise _stopped(trainer, request) from error
    except Exception as error:
        if is_worker_out_of_memory(error):
            raise _with_advice("a data worker ran out of host memory") from error
        # A worker that is killed while it hands over a batch breaks a connection; nothing else in here has any.
        if not _WORKER_KILLED.search(str(error)) and not isinstance(error, ConnectionError | EOFError):
            raise
        if request.came:
            # Before it could set its own handlers: SLURM and systemd send signals to the workers as well.
            raise _stopped(trainer, request) from error
        raise _with_advice("a data worker was killed, most likely because memory ran out") from error


def _with_advice(what: str) -> InputError:
    return InputError(what, where="hardware.num_workers", fix="Use fewer, or ask for more memory")


def _in_vain(trainer: pl.Trainer, request: StopRequest) -> InputError:
    """Not a stop to go on from: the next start would end at the same place."""
    what = (
        f"{request.reason} in epoch {trainer.current_epoch + 1} before one optimiser step or validation case was done"
    )
    return InputError(what, fix="Give more max_time: every start would end like this one")


def _stopped(trainer: pl.Trainer, request: StopRequest) -> StoppedError:
    name = f" ({signal.Signals(request.signal).name})" if request.signal else ""
    reason = request.reason if request.reason and not request.signal else "stopped on request"
    what = f"{reason} in epoch {trainer.current_epoch + 1}{name}"
    return StoppedError(what, fix=GOES_ON, signal=request.signal)
