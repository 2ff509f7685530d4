"""How far a training is and whether it is alive, from what it leaves in its run folder."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import psutil

from pipeline.artifacts import read_artifact, to_json
from pipeline.config import StatusConfig
from pipeline.durations import format_duration
from pipeline.errors import InputError
from pipeline.plan import Record
from pipeline.run_files import RunFiles
from pipeline.run_record import known_record
from pipeline.sizes import GIB

if TYPE_CHECKING:
    from rich.table import Table

HEARTBEAT_SECONDS = 15.0
# Silent for so long, or for so many optimiser steps, is gone: a beat waits for a window or a pass to end.
STALE_SECONDS, STALE_STEPS = 120.0, 5
State = Literal["alive", "stopped", "finished", "failed", "killed", "stale", "not started"]


def now() -> str:
    """The time as it stands in a heartbeat."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Record):
    """`heartbeat.json`: what a training was doing when it last said so.

    Attributes:
        time: In UTC, ISO 8601.
        phase: What it was doing; "stopped", "failed" and "finished" are last words.
        epoch, max_epochs: Epochs finished, and in all.
        iteration, optimizer_step: Finished.
        total_steps: Optimiser steps in all.
        seconds_per_step: Of late, data included; None before the second step of a start.
        eta_seconds: What is left, validations included; None while that is unknown.
        wall_seconds: What all starts took until then; None where one of them did not count.
        peak_ram_bytes, peak_vram_bytes: Of the processes, and of tensors on the GPU.
        host, pid, slurm_job_id: Who; "" outside of SLURM.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    time: str = field(default_factory=now)
    phase: str
    epoch: int
    max_epochs: int
    iteration: int
    optimizer_step: int
    total_steps: int
    seconds_per_step: float | None = None
    eta_seconds: float | None = None
    wall_seconds: float | None = None
    peak_ram_bytes: int = 0
    peak_vram_bytes: int = 0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    slurm_job_id: str = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID", ""))

    @property
    def age_seconds(self) -> float:
        """How long ago it was written, by the clocks of two machines."""
        return (datetime.now(timezone.utc) - datetime.fromisoformat(self.time)).total_seconds()


@dataclass(frozen=True)
class RunStatus:
    """One training.

    Attributes:
        run: Name of its folder.
        state: "killed" went without a last word on this machine, "stale" has been silent for too long on another one;
            like "stopped" and "failed" it goes on with the same command.
        heartbeat: The last one; None before the first.
    """

    run: str
    state: State
    heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class WorkStatus:
    """All trainings of a folder; `as_json` is how they are to be shown."""

    runs: tuple[RunStatus, ...]
    as_json: bool = False


def read_status(config: StatusConfig) -> WorkStatus:
    """The trainings in a run folder or in the folders of a work folder.

    Raises:
        InputError: There is none.
    """
    path = Path(config.path)
    folders = [path] if _holds_run(path) else sorted(child for child in path.glob("*") if _holds_run(child))
    if not folders:
        fix = "Give a run folder, or the work folder of `voxfit run`"
        raise InputError("holds no training", where=path, fix=fix)
    return WorkStatus(tuple(_status_of(folder) for folder in folders), config.json)


def _holds_run(folder: Path) -> bool:
    files = RunFiles(folder)
    return files.heartbeat.is_file() or files.record.is_file()


def _status_of(folder: Path) -> RunStatus:
    name, files = folder.resolve().name, RunFiles(folder)
    heartbeat = read_artifact(files.heartbeat, Heartbeat) if files.heartbeat.is_file() else None
    record = known_record(files)
    if record is not None and record.status == "finished":
        return RunStatus(name, "finished", heartbeat)
    return RunStatus(name, _state_of(heartbeat) if heartbeat is not None else "not started", heartbeat)


def _state_of(beat: Heartbeat) -> State:
    if beat.phase in ("stopped", "failed"):
        return "stopped" if beat.phase == "stopped" else "failed"
    if beat.host == socket.gethostname() and not _is_running(beat):
        return "killed"
    patience = max(STALE_SECONDS, STALE_STEPS * (beat.seconds_per_step or 0.0))
    return "alive" if beat.age_seconds < patience else "stale"


def _is_running(beat: Heartbeat) -> bool:
    """Whether the process that wrote it is there; one that began after that only has the same number."""
    try:
        process = psutil.Process(beat.pid)
        began_before = process.create_time() <= datetime.fromisoformat(beat.time).timestamp() + 1
        return bool(began_before and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def describe_status(status: WorkStatus) -> Table | str:
    """A table with a line per training, or JSON."""
    from rich.table import Table
    from rich.text import Text

    if status.as_json:
        return to_json(list(status.runs)).rstrip()
    table = Table("run", "state", "doing", "epoch", "optimiser step", "s/step", "left", "RAM, VRAM", "where", "said")
    for run in status.runs:
        # As plain text: a folder's name may look like markup.
        table.add_row(Text(run.run), run.state, *(_cells(run.heartbeat) if run.heartbeat is not None else ()))
    return table


def _cells(beat: Heartbeat) -> tuple[str, ...]:
    job = f", job {beat.slurm_job_id}" if beat.slurm_job_id else ""
    return (
        beat.phase,
        f"{beat.epoch} of {beat.max_epochs}",
        f"{beat.optimizer_step} of {beat.total_steps}",
        "" if beat.seconds_per_step is None else f"{beat.seconds_per_step:.3g}",
        "" if beat.eta_seconds is None else format_duration(beat.eta_seconds),
        f"{beat.peak_ram_bytes / GIB:.1f}, {beat.peak_vram_bytes / GIB:.1f} GiB",
        f"{beat.host} {beat.pid}{job}",
        f"{format_duration(beat.age_seconds)} ago",
    )
