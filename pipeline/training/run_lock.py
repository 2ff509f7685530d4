"""Keeps a run folder to one training at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.log import get_logger

LOCK_NAME = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder` while the block runs; the folder is made where it is missing.

    The lock ends with this process, however that ends: its data workers, which may outlive it, have no part in it.

    Raises:
        InputError: Another process trains in the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK_NAME).open("a")
    except OSError as error:
        fix = "Check the folder and its permissions"
        raise InputError(f"cannot be written ({error.strerror})", where=folder, fix=fix) from error
    with stream:
        _lock(stream.fileno(), folder)
        yield


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        # A record lock, because a `flock` is inherited by forked data workers.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        fix = "Wait until it is done, end it, or give another --run_dir"
        raise InputError("another process is training in this folder", where=folder, fix=fix) from error
    except (ImportError, OSError):
        get_logger("train").debug("%s: no file locks here, going on without", folder)
