"""What ends a training from outside, said in a line."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from pipeline.errors import InputError, StoppedError
from pipeline.training.out_of_memory import is_worker_out_of_memory

# What torch says of a worker that is gone; errors in a worker are raised again with its traceback in the text.
_WORKER_KILLED = re.compile(r"^DataLoader worker \(pid.*\) (?:exited unexpectedly|is killed by signal)")


@contextmanager
def stops_as_errors(trainer: pl.Trainer) -> Iterator[None]:
    """Turn what Lightning or the data workers raise in `trainer.fit` into errors for users.

    Raises:
        StoppedError: Ctrl-C or SIGTERM.
        InputError: A data worker was killed, or ran out of memory.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        # How Lightning ends after SIGTERM, and after Ctrl-C, which it leaves ignored.
        signal.signal(signal.SIGINT, handler)
        raise _stopped(trainer) from error
    except Exception as error:
        if is_worker_out_of_memory(error):
            raise _with_advice("a data worker ran out of host memory") from error
        if not _WORKER_KILLED.search(str(error)):
            raise
        if trainer.received_sigterm:
            # SLURM and systemd send it to the workers as well.
            raise _stopped(trainer) from error
        raise _with_advice("a data worker was killed, most likely because memory ran out") from error


def _with_advice(what: str) -> InputError:
    return InputError(what, where="hardware.num_workers", fix="Use fewer, or ask for more memory")


def _stopped(trainer: pl.Trainer) -> StoppedError:
    return StoppedError(f"stopped on request in epoch {trainer.current_epoch + 1}", fix="The same command goes on")
