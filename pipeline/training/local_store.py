"""The store that a training reads from: the one that was given, or its copy on the node's own disk."""

from __future__ import annotations

import signal
from pathlib import Path

from pipeline.datasets.splits import Fold
from pipeline.errors import StoppedError
from pipeline.stop_signals import StopNow, StopRequest
from pipeline.store import stage_cases


def local_store(store_folder: Path, fold: Fold, stage_to: str, request: StopRequest) -> Path:
    """Copy the fold's cases to `stage_to` and give the copy's folder; without `stage_to`, the store's own.

    Every process of a training may call it, on any node: those on one node share the copy.

    Raises:
        StoppedError: A signal came; what was copied whole is kept.
        InputError: As of `pipeline.store.stage_cases`.
    """
    if not stage_to:
        return store_folder
    try:
        with request.at_any_line():
            return stage_cases(store_folder, (*fold.train, *fold.validation), Path(stage_to))
    except StopNow as stop:
        name = f" ({signal.Signals(request.signal).name})" if request.signal else ""
        what = f"stopped while the store was copied to {stage_to}{name}"
        raise StoppedError(what, fix="The same command goes on", signal=request.signal) from stop
