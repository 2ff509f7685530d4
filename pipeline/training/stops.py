"""What ends a training from outside, said in a line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl

from pipeline.errors import InputError, StoppedError


@contextmanager
def stops_as_errors(trainer: pl.Trainer) -> Iterator[None]:
    """Turn what Lightning or the data workers raise in `trainer.fit` into errors for users.

    Raises:
        StoppedError: Ctrl-C or SIGTERM.
        InputError: A data worker was killed.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        # How Lightning ends after SIGTERM, and after Ctrl-C, which it leaves ignored.
        signal.signal(signal.SIGINT, handler)
        raise _stopped(trainer) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if trainer.received_sigterm:
            # SLURM and systemd send it to the workers as well.
            raise _stopped(trainer) from error
        raise InputError(
            "a data worker was killed, most likely because memory ran out",
            where="hardware.num_workers",
            fix="Use fewer, or ask for more memory",
        ) from error


def _stopped(trainer: pl.Trainer) -> StoppedError:
    return StoppedError(f"stopped on request in epoch {trainer.current_epoch + 1}", fix="The same command goes on")
