"""CPUs, memory and limits of this process, and what set each."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.allocation import (
    Limit,
    allotted_cpus,
    allotted_memory_bytes,
    asked_threads,
    cpu_limits,
    memory_limits,
)
from pipeline.doctor.facts import Fact
from pipeline.sizes import GIB, MIB, format_bytes

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
SHARED_MEMORY = Path("/dev/shm")
# What containers give by default is 64 MiB, less than two patches of a usual size.
LEAST_SHARED_BYTES = 512 * MIB
LEAST_MEMORY_BYTES = 4 * GIB
LEAST_FREE_BYTES = GIB
LEAST_OPEN_FILES = 1024


def find_cpus() -> Iterator[Fact]:
    """CPUs that this process may use, and every limit that was found."""
    limits, cpus = list(cpu_limits()), allotted_cpus()
    limit = min(limits, key=lambda each: each.amount)
    text = f"{cpus} (by {limit.source}; the machine has {os.cpu_count() or 1})"
    yield Fact(name="CPUs", text=text + _others(limits, limit, "g"), value=cpus)


def find_memory() -> Iterator[Fact]:
    """Memory that this process may use, every limit that was found, and what is free."""
    limits, allotted = list(memory_limits()), allotted_memory_bytes()
    limit = min(limits, key=lambda each: each.amount)
    advice = ""
    if allotted < LEAST_MEMORY_BYTES:
        advice = f"{format_bytes(allotted)} of memory is little for a training; ask for more (SLURM: --mem)"
    text = f"{format_bytes(allotted)} (by {limit.source})" + _others(limits, limit, "GiB")
    yield Fact(name="memory", text=text, value=allotted, advice=advice)
    free = psutil.virtual_memory().available
    advice = ""
    if free < 0.5 * allotted:
        sizes = f"{format_bytes(free)} are free of the {format_bytes(allotted)} allotted"
        advice = f"other processes hold much of the memory: {sizes}"
    yield Fact(name="memory free now", text=f"{format_bytes(free)} (on the whole machine)", value=free, advice=advice)


def _others(limits: list[Limit], tightest: Limit, unit: str) -> str:
    """Limits that do not bind, for whoever wonders whether they were seen."""
    seen: dict[str, None] = {}
    for limit in limits:
        if limit is not tightest and limit.amount < 2**60:
            amount = format_bytes(limit.amount) if unit == "GiB" else f"{limit.amount:g}"
            seen[f"{limit.source} {amount}"] = None
    return f"; {', '.join(seen)}" if seen else ""


def find_threads() -> Iterator[Fact]:
    """Variables that say how many threads libraries start."""
    cpus = allotted_cpus()
    for name in THREAD_VARIABLES:
        text = os.environ.get(name, "")
        if not text:
            continue
        number, advice = asked_threads(name), ""
        if number is not None and number > cpus:
            advice = f"{name} asks for {number} threads on {cpus} CPU(s), which then wait for each other; unset it"
        yield Fact(name=name, text=text, value=number, advice=advice)


def find_limits() -> Iterator[Fact]:
    """What `ulimit` says of files and of address space."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = ""
    if 0 <= soft < LEAST_OPEN_FILES:
        advice = (
            f"only {soft} files may be open, and data workers need more; `ulimit -n {_most(hard)}` before the command"
        )
    yield Fact(name="open files", text=_limit(soft), value=soft, advice=advice)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        advice = "a GPU reserves far more addresses than memory, and then fails to start; `ulimit -v unlimited`"
        yield Fact(name="address space", text=format_bytes(soft), value=soft, advice=advice)


def _limit(number: int) -> str:
    return "unlimited" if number < 0 else str(number)


def _most(hard: int) -> int:
    return 4096 if hard < 0 else min(hard, 4096)


def find_shared_memory() -> Iterator[Fact]:
    """The space through which data workers hand on their patches."""
    if not SHARED_MEMORY.is_dir():
        yield Fact(
            name=str(SHARED_MEMORY), text="there is none", advice="data workers need it; --hardware.num_workers 0"
        )
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    advice = ""
    if usage.free < LEAST_SHARED_BYTES:
        advice = (
            f"{SHARED_MEMORY} has {format_bytes(usage.free)} free, and data workers hand on patches through it; start "
            "the container with more (docker --shm-size 8g, or --ipc host), or use --hardware.num_workers 0"
        )
    text = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    yield Fact(name=str(SHARED_MEMORY), text=text, value=usage.free, advice=advice)


def find_temporary_folder() -> Iterator[Fact]:
    """Where libraries put what they need for a while."""
    folder = Path(tempfile.gettempdir())
    usage, advice = shutil.disk_usage(folder), ""
    if usage.free < LEAST_FREE_BYTES:
        advice = f"{folder} has {format_bytes(usage.free)} free; set TMPDIR to a folder with more"
    yield Fact(
        name="temporary folder", text=f"{folder}: {format_bytes(usage.free)} free", value=usage.free, advice=advice
    )


def find_terminal() -> Iterator[Fact]:
    """Whether somebody watches."""
    there = sys.stderr.isatty()
    text = "yes" if there else "no: lines of progress instead of bars, as in a batch job"
    yield Fact(name="terminal", text=text, value=there)
