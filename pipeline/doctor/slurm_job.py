"""The SLURM job that this runs in: what it is, how long it may go on, and what becomes of it then."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from time import time

from pipeline.allocation import allotted_memory_bytes
from pipeline.doctor.facts import Fact
from pipeline.durations import format_duration, parse_duration
from pipeline.requeue import ask_scontrol, slurm_job_id
from pipeline.sizes import format_bytes

_MEMORY = re.compile(r"\bTRES=\S*?\bmem=([\d.]+)([KMGT])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIGNAL = re.compile(r"^#SBATCH\s+--signal[= ]\s*(\S+)", re.MULTILINE)
# Seconds before the limit at which SLURM signals where the script names none.
USUAL_SIGNAL_SECONDS = 60


def find_job() -> Iterator[Fact]:
    """The job, or that there is none."""
    job = slurm_job_id()
    if not job:
        there = shutil.which("sbatch") is not None
        text = "none: started by hand" + (" (SLURM is installed here)" if there else "")
        yield Fact(name="job", text=text, value=None)
        return
    said = ask_scontrol("show", "job", "--oneliner", job)
    node = os.environ.get("SLURM_JOB_NODELIST", "")
    partition = os.environ.get("SLURM_JOB_PARTITION") or _field(said, "Partition")
    yield Fact(name="job", text=f"{job} in partition {partition or 'unknown'} on {node or 'unknown'}", value=job)
    yield from _memory(said)
    yield _limit(said)
    yield _time_left(said)
    yield _requeue(said)
    yield from _signal(job)


def _field(said: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", said)
    return found[1] if found else ""


def _memory(said: str) -> Iterator[Fact]:
    """What SLURM granted on this node; no variable tells it to the tasks of a bare `srun`, at least in SLURM 22.05."""
    found = _MEMORY.search(said)
    if found is None:
        return
    granted = int(float(found[1]) * UNITS[found[2]]) // max(1, int(_field(said, "NumNodes").split("-")[0] or 1))
    allotted, advice = allotted_memory_bytes(), ""
    if granted < allotted:
        advice = (
            f"SLURM granted {format_bytes(granted)} of memory, which neither a variable nor a cgroup says here, so"
            f" workers are counted by {format_bytes(allotted)}; submit with sbatch, or export"
            f" SLURM_MEM_PER_NODE={granted >> 20}"
        )
    yield Fact(name="memory granted", text=format_bytes(granted), value=granted, advice=advice)


def _limit(said: str) -> Fact:
    text = _field(said, "TimeLimit")
    seconds = _seconds(text)
    return Fact(name="time limit", text=format_duration(seconds) if seconds else text or "not known", value=seconds)


def _time_left(said: str) -> Fact:
    seconds = None
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdecimal():
        seconds = int(end) - time()
    elif end := _field(said, "EndTime"):
        try:
            seconds = datetime.fromisoformat(end).timestamp() - time()
        except ValueError:
            seconds = None
    text = format_duration(seconds) if seconds is not None else "not known"
    return Fact(name="time left", text=text, value=None if seconds is None else round(seconds))


def _requeue(said: str) -> Fact:
    allowed = {"1": True, "0": False}.get(_field(said, "Requeue"))
    if _field(said, "BatchFlag") == "0":
        return Fact(name="requeue", text="not possible: this is no batch job", value=False)
    advice = "a training that is stopped is not queued again; submit with --requeue" if allowed is False else ""
    text = {True: "allowed", False: "not allowed", None: "not known"}[allowed]
    return Fact(name="requeue", text=text, value=allowed, advice=advice)


def _signal(job: str) -> Iterator[Fact]:
    """What the script asks for: SLURM tells it nowhere else."""
    script = ask_scontrol("write", "batch_script", job, "-")
    if not script:
        yield Fact(name="signal", text="not known: the job has no script that can be read")
        return
    asked = _SIGNAL.search(script)
    if asked is None:
        advice = "no signal comes before the time limit; #SBATCH --signal=B:USR1@180 lets a training save in time"
        yield Fact(name="signal", text="none before the time limit", advice=advice)
        return
    _, _, seconds = asked[1].partition("@")
    yield Fact(name="signal", text=asked[1], value=int(seconds) if seconds.isdecimal() else USUAL_SIGNAL_SECONDS)


def _seconds(text: str) -> int | None:
    try:
        return parse_duration(text)
    # "UNLIMITED", "Partition_Limit" and the like.
    except Exception:
        return None
