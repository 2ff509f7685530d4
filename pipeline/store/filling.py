"""Open a store to fill it: alone and without what killed runs left, or beside others that fill it as well."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.store.case_store import CaseStore, info_path
from pipeline.store.records import StoreInfo
from pipeline.store.writable_store import WritableStore, refuse_foreign_folder


@contextmanager
def fill_store(
    folder: Path, info: StoreInfo, *, known_ids: Collection[str] | None = None, shared: bool = False
) -> Iterator[WritableStore]:
    """The store in `folder`, made or brought to `info`, while the block runs.

    Alone, it is swept and kept from other processes. The lock ends with this process, however that ends.

    Shared, any number of processes on any nodes write at the same time. That needs no lock: each file is renamed into
    place whole, a case's record last; the same case made twice has the same bytes; and nobody removes what another may
    have just written. The lock only keeps those apart who fill the store alone, on file systems that have locks.

    Args:
        folder: Made where it is missing.
        info: Cases made with other settings go; in a shared store they are an error.
        known_ids: Ids of the dataset's cases; a store that has none of them but others is another dataset's.
        shared: Beside other processes.

    Raises:
        InputError: The folder is no store but holds files, is another dataset's store, cannot be written, or another
            process is filling it alone.
    """
    refuse_foreign_folder(folder)
    with lock_store(folder, shared=shared):
        if known_ids is not None and info_path(folder).is_file():
            CaseStore(folder).check_dataset(known_ids)
        store = WritableStore.create(folder, info, shared=shared)
        if not shared:
            store.sweep()
        yield store


@contextmanager
def lock_store(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the store's lock, where the file system has locks, while the block runs.

    Args:
        folder: Made where it is missing.
        shared: Allow others that share it as well.

    Raises:
        InputError: The folder cannot be written, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # NFS gives a shared lock to files that are open for reading only.
        stream = (folder / ".lock").open("a+")
    except OSError as error:
        fix = "Check the folder and its permissions"
        raise InputError(f"cannot be written ({error.strerror})", where=folder, fix=fix) from error
    with stream:
        _lock(stream.fileno(), folder, shared=shared)
        yield


def _lock(descriptor: int, folder: Path, *, shared: bool) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "Wait until it is done, or end it"
        raise InputError("another process is filling this store", where=folder, fix=fix) from error
    except (ImportError, OSError):
        get_logger("store").debug("%s: no file locks here, going on without", folder)
