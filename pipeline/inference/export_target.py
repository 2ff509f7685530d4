"""Where an export goes: nothing is replaced that was not asked to be, and no folder but an earlier bundle."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import InputError

# The key of `configs/metadata.json` that tells a bundle of ours from other folders.
BUNDLE_KEY = "voxfit"


def check_target(path: Path, *, is_folder: bool, overwrite: bool) -> None:
    """Refuse what would be lost by an export, before anything is computed.

    Args:
        path: Where the export goes.
        is_folder: Whether it will be a folder.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        InputError: Something is there, and `overwrite` is off or it is no earlier export of this kind.
    """
    if not path.exists() or (is_folder and path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() != is_folder:
        kind = "a folder" if path.is_dir() else "a file"
        raise InputError(f"is {kind}", where=path, fix="Choose another --out")
    if not overwrite:
        raise InputError("is there already", where=path, fix="Use --overwrite, or choose another --out")
    if is_folder and not _is_bundle(path):
        raise InputError("is no bundle that voxfit wrote, and is not replaced", where=path, fix="Choose another --out")


def _is_bundle(folder: Path) -> bool:
    try:
        return BUNDLE_KEY in json.loads((folder / "configs" / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
