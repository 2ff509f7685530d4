"""Open a store to fill it: one process at a time, and without what killed runs left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.store.case_store import CaseStore, refuse_foreign_folder
from pipeline.store.records import StoreInfo


@contextmanager
def fill_store(folder: Path, info: StoreInfo, *, known_ids: Collection[str] | None = None) -> Iterator[CaseStore]:
    """The store in `folder`, made or brought to `info`, swept, and kept from other processes while the block runs.

    The lock ends with this process, however that ends.

    Args:
        folder: Made where it is missing.
        info: Cases made with other settings go.
        known_ids: Ids of the dataset's cases; a store that has none of them but others is another dataset's.

    Raises:
        InputError: The folder is no store but holds files, is another dataset's store, cannot be written, or another
            process is filling it.
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
        if known_ids is not None:
            _refuse_other_dataset(folder, known_ids)
        store = CaseStore.create(folder, info)
        store.sweep()
        yield store


def _refuse_other_dataset(folder: Path, known_ids: Collection[str]) -> None:
    held = CaseStore(folder).case_ids if (folder / "store.json").is_file() else ()
    if held and not set(held) & set(known_ids):
        shown = ", ".join(held[:3]) + (", ..." if len(held) > 3 else "")
        raise InputError(
            f"is the store of another dataset: none of its {len(held)} case(s) ({shown}) is in this one",
            where=folder,
            fix="Give another folder, or delete this one",
        )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fix = "Wait until it is done, or end it"
        raise InputError("another process is filling this store", where=folder, fix=fix) from error
    except (ImportError, OSError):
        get_logger("store").debug("%s: no file locks here, going on without", folder)
