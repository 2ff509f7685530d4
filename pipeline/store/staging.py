"""Cases of a store copied to the node's own disk: made once, kept up to date, shared by the trainings of a node.

The copy is a store of its own. Each file is renamed into place whole and a case's record last: a copy that was killed
at any moment holds whole cases only, and two that are made at the same time do no harm.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, time_ns

from pipeline.artifacts import atomic_path, content_hash, to_json, write_artifact, write_text
from pipeline.errors import InputError
from pipeline.log import get_logger, track
from pipeline.sizes import MIB, format_bytes
from pipeline.store.case_store import DATA_KINDS, CaseStore, info_path
from pipeline.store.records import CaseRecord

BLOCK_BYTES = 8 << 20
# What file systems keep for themselves, and other writers may take meanwhile.
SPARE_BYTES = 16 * MIB

logger = get_logger("store")


@dataclass(frozen=True)
class _File:
    """A data file of the store and its copy.

    Attributes:
        source, target: Where it is, and where it goes.
        size, mtime_ns: As it was when it was looked at.
        crc32: Of what was written when the case was made; None where that is not known.
    """

    source: Path
    target: Path
    size: int
    mtime_ns: int
    crc32: int | None

    def is_current(self) -> bool:
        """Whether the copy is there, and of the file as it is now.

        The name of a data file holds a hash of what its content follows from, so whole seconds do: not all file
        systems keep finer times.
        """
        try:
            status = self.target.stat()
        except OSError:
            return False
        return (status.st_size, int(status.st_mtime)) == (self.size, self.mtime_ns // 10**9)


@dataclass(frozen=True)
class _Case:
    """What the copy of a case lacks.

    Attributes:
        files: Data files.
        record: Where its record goes.
        text: The record, as it was when the data files were looked at.
    """

    files: tuple[_File, ...]
    record: Path
    text: str

    def is_current(self) -> bool:
        """Whether nothing is lacking."""
        try:
            return not self.files and self.record.read_text(encoding="utf-8") == self.text
        except OSError:
            return False

    def num_bytes(self) -> int:
        """What is to be copied."""
        return sum(file.size for file in self.files) + len(self.text)


def stage_cases(source: Path, case_ids: Sequence[str], folder: Path) -> Path:
    """Copy cases of a store into a folder of their own within `folder`; what is there, whole and unchanged, is kept.

    Copies of one store share that folder, whose name follows from the store's place and settings. Nothing in it is
    ever removed but leftovers of copies that were killed: another training may be reading.

    Args:
        source: Folder of the store.
        case_ids: In the order in which they are copied.
        folder: On the node's own disk.

    Returns:
        Folder of the copy.

    Raises:
        InputError: A case is not in the store or is damaged, there is no room for what is lacking, or the folder
            cannot be written.
    """
    store, started = CaseStore(source), perf_counter()
    target = folder / f"voxfit-store-{content_hash(str(Path(source).resolve()), to_json(store.info))}"
    with _turn(target):
        cases = [_look_at(store, case_id, target) for case_id in case_ids]
        lacking = [case for case in cases if not case.is_current()]
        num_bytes = sum(case.num_bytes() for case in lacking)
        if lacking:
            _check_room(target, num_bytes)
            logger.info("copying %d case(s), %s, to %s", len(lacking), format_bytes(num_bytes), target)
        if not info_path(target).is_file():
            write_artifact(info_path(target), store.info)
        for case in track(lacking, description="copying", total=len(lacking)):
            for file in case.files:
                _copy(file)
            write_text(case.record, case.text)
    seconds = perf_counter() - started
    speed = f" in {seconds:.1f} s ({format_bytes(num_bytes / seconds)}/s)" if lacking else ""
    kept = len(cases) - len(lacking)
    logger.info("%s: %d case(s) copied%s, %d were there already", target, len(lacking), speed, kept)
    return target


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    """Wait until no other process copies to `target`, where the file system has locks, and sweep up what kills left.

    A record lock, as of a run folder: processes forked meanwhile have no part in it.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        stream = (target / ".lock").open("a")
    except OSError as error:
        fix = "Check the folder and its permissions, or leave stage_to out"
        raise InputError(f"cannot be written ({error.strerror})", where=target, fix=fix) from error
    with stream:
        if _lock(stream.fileno(), target):
            for path in target.rglob(".*.partial.*"):
                path.unlink(missing_ok=True)
        yield


def _lock(descriptor: int, target: Path) -> bool:
    """Take the lock; whether there are locks here."""
    try:
        import fcntl

        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            logger.info("waiting for another training that copies the same store to %s", target)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        logger.debug("%s: no file locks here, going on without", target)
        return False
    return True


def _look_at(store: CaseStore, case_id: str, target: Path) -> _Case:
    record = store.record(case_id)
    files = [_data_file(store, record, kind, target) for kind in DATA_KINDS]
    lacking = tuple(file for file in files if not file.is_current())
    return _Case(lacking, target / "cases" / f"{case_id}.json", to_json(record))


def _data_file(store: CaseStore, record: CaseRecord, kind: str, target: Path) -> _File:
    path = store.data_file(record.case_id, kind)
    return _File(
        source=path,
        target=target / path.relative_to(store.folder),
        size=record.data_bytes[kind],
        mtime_ns=path.stat().st_mtime_ns,
        crc32=record.data_crc32.get(kind),
    )


def _check_room(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes + SPARE_BYTES > free:
        raise InputError(
            f"{format_bytes(num_bytes)} of the store are to be copied here and {format_bytes(free)} are free",
            where=target,
            fix="Give --stage_to a larger disk, or leave it out to read from the store",
        )


def _copy(file: _File) -> None:
    """Copy a file whole or not at all, with its time of change, and check what was read."""
    # The record that follows syncs the folder, as in the store itself.
    with atomic_path(file.target, sync_folder=False) as temporary:
        size = crc32 = 0
        with temporary.open("wb") as stream:
            for block in _blocks(file.source):
                stream.write(block)
                size, crc32 = size + len(block), zlib.crc32(block, crc32)
        if size != file.size:
            raise InputError("changed while it was copied", where=file.source, fix="Run the same command again")
        if file.crc32 not in (None, crc32):
            what = "is damaged: its bytes are not those that were written"
            fix = "Delete it and run `voxfit preprocess`, which makes the case anew"
            raise InputError(what, where=file.source, fix=fix)
        # Now as the time of the last use: what cleans temporary folders goes by it.
        os.utime(temporary, ns=(time_ns(), file.mtime_ns))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix="Run the same command again") from error
