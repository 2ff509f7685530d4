"""Folders that are written to or read from: room, speed, locks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from pipeline.doctor.facts import Fact
from pipeline.errors import in_words
from pipeline.sizes import GIB, MIB, format_bytes

BLOCK_BYTES = 4 * MIB
FILE_BYTES = 128 * MIB
# A disk that is slow enough for this to matter is known by then.
MOST_SECONDS = 5.0
LEAST_FREE_BYTES = 5 * GIB
SLOW_BYTES_PER_SECOND = 20 * MIB
# Less is over before a disk shows what it can.
LEAST_TIMED_BYTES = 8 * MIB


def find_in_folder(folder: Path, *, timed: bool) -> Iterator[Fact]:
    """Of a folder that is written to: free space, locks, and, by a file that is removed again, its speed."""
    free = shutil.disk_usage(folder).free
    advice = f"{folder} has {format_bytes(free)} free; checkpoints need several times their size"
    yield Fact(
        name="work folder",
        text=f"{folder}: {format_bytes(free)} free",
        value=free,
        advice=advice if free < LEAST_FREE_BYTES else "",
    )
    try:
        with TemporaryDirectory(prefix=".doctor.", dir=folder) as made:
            yield _locks(Path(made))
            if timed and free > 2 * FILE_BYTES:
                path = Path(made) / "timed"
                yield _rate("work folder writing", *_write(path), "synced")
                yield _rate("work folder reading", *_read([path]))
    except OSError as error:
        advice = f"{folder} cannot be written ({error.strerror}); check its permissions and its quota"
        yield Fact(name="work folder writing", text=in_words(error), advice=advice)


def _locks(folder: Path) -> Fact:
    try:
        import fcntl

        with (folder / "lock").open("w") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        advice = "files cannot be locked here, so nothing keeps two trainings out of one run folder; start only one"
        return Fact(name="file locks", text=f"none ({in_words(error)})", value=False, advice=advice)
    return Fact(name="file locks", text="yes", value=True)


def find_in_store(folder: Path) -> Iterator[Fact]:
    """Of a store, which is only read: free space, and the speed at which files in it are read."""
    free = shutil.disk_usage(folder).free
    yield Fact(name="store", text=f"{folder}: {format_bytes(free)} free", value=free)
    yield _rate("store reading", *_read(sorted((folder / "cases").glob("*.image.b2nd"))))


def _rate(name: str, size: int, seconds: float, how: str) -> Fact:
    rate = size / max(seconds, 1e-9)
    advice = ""
    if size > LEAST_TIMED_BYTES and rate < SLOW_BYTES_PER_SECOND:
        advice = f"{name} is slow: {rate / MIB:.0f} MiB/s; put store and run folder on a faster disk"
    text = f"{rate / MIB:.0f} MiB/s ({size / MIB:.3g} MiB, {how})"
    return Fact(name=name, text=text, value=round(rate), advice=advice)


def _write(path: Path) -> tuple[int, float]:
    """Bytes written and the seconds that they took, until they were on the disk."""
    block, size, started = os.urandom(BLOCK_BYTES), 0, perf_counter()
    with path.open("wb", buffering=0) as stream:
        while size < FILE_BYTES and perf_counter() - started < MOST_SECONDS:
            size += stream.write(block)
        os.fsync(stream.fileno())
    return size, perf_counter() - started


def _read(paths: Sequence[Path]) -> tuple[int, float, str]:
    """Bytes read and the seconds that they took, and whether they came from the disk."""
    size, seconds, emptied = 0, 0.0, True
    for path in paths:
        emptied = empty_cache(path) and emptied
        started = perf_counter()
        with path.open("rb", buffering=0) as stream:
            while size < FILE_BYTES and (block := stream.read(BLOCK_BYTES)):
                size += len(block)
        seconds += perf_counter() - started
        if size >= FILE_BYTES or seconds > MOST_SECONDS:
            break
    return size, seconds, "from the disk" if emptied else "perhaps from the system's cache"


def empty_cache(path: Path) -> bool:
    """Ask the system to forget what it keeps of a file in memory; whether it could be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
