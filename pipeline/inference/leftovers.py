"""Temporary files of predictions that were killed in the middle of writing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

# A file that is being written changes all the time; one that stood still for so long belongs to nobody any more.
STALE_SECONDS = 15 * 60
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.partial\.(?P<name>.+)")


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove temporary files of `artifacts.atomic_path` that were to become one of these paths, once they are stale.

    Other jobs may be filling the folder: files of their cases, and any that was written to a while ago, stay. Ages are
    told by the file system's own clock, which on a network is not that of this machine.

    Args:
        paths: Files that this job writes.
    """
    by_folder: dict[Path, set[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, set()).add(path.name)
    for folder, names in by_folder.items():
        # Whatever cannot be looked at or removed is left; it is in nobody's way.
        with suppress(OSError):
            _sweep(folder, names)


def _sweep(folder: Path, names: set[str]) -> None:
    left = [path for path in folder.iterdir() if (found := TEMPORARY.fullmatch(path.name)) and found["name"] in names]
    if not left:
        return
    with TemporaryFile(dir=folder) as stream:
        now = os.fstat(stream.fileno()).st_mtime
    for path in left:
        with suppress(OSError):
            if now - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
