"""Open a store to fill it: one process at a time, and without what killed runs left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.store.case_store import CaseStore, refuse_foreign_folder
from pipeline.store.records import StoreInfo


@contextmanager
def fill_store(folder: Path, info: StoreInfo) -> Iterator[CaseStore]:
    """The store in `folder`, made or brought to `info`, swept, and kept from other processes while the block runs.

    The lock ends with this process, however that ends.

    Raises:
        InputError: The folder is no store but holds files, cannot be written, or another process is filling it.
    """
    refuse_foreign_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a")
    except OSError as error:
        fix = "Check the folder and its permissions"
        raise InputError(f"cannot be written ({error.strerror})", where=folder, fix=fix) from error
    with stream:
        _lock(stream.fileno(), folder)
        store = CaseStore.create(folder, info)
        store.sweep()
        yield store


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "Wait until it is done, or end it"
        raise InputError("another process is filling this store", where=folder, fix=fix) from error
    except (ImportError, OSError):
        get_logger("store").debug("%s: no file locks here, going on without", folder)
