"""What this job was allotted: CPUs and memory from affinity, SLURM and cgroups, not the whole node's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.rank_place import entry_of_this_node, find_place, tasks_on_this_node

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")


class Limit(NamedTuple):
    """A bound on what this process may use, and where it was read."""

    amount: float
    source: str


def allotted_cpus() -> int:
    """CPUs this process may use: the least of affinity, what SLURM says and the cgroup quota, or its share of them."""
    return max(1, int(_tightest(_cpu_limits()).amount) // _sharers())


def allotted_memory_bytes() -> int:
    """Memory this process may use: the least of the machine's, SLURM's and the cgroup limits, or its share of it."""
    return int(_tightest(_memory_limits()).amount) // _sharers()


def describe_allocation() -> str:
    """What was found, as a line for the log: the figures, what set each, and the machine's own."""
    cpus, memory, machine = _tightest(_cpu_limits()), _tightest(_memory_limits()), _machine_memory()
    return (
        f"allotted {max(1, int(cpus.amount))} CPU(s) (by {cpus.source}; the machine has {os.cpu_count() or 1}) and"
        f" {memory.amount / 2**30:.1f} GiB of memory (by {memory.source}; the machine has {machine / 2**30:.1f})"
        f"{f', shared by {_sharers()} processes' if _sharers() > 1 else ''}"
    )


def _sharers() -> int:
    """Processes that train together and share what was found; for tasks of `srun` the limits are those of each."""
    place = find_place()
    return place.num_local_ranks if place.launcher == "torchrun" else 1


def resolve_num_workers(option: int | str, *, bytes_per_worker: int = 0) -> int:
    """The worker count: the option itself, or for "auto" the allotted CPUs, fewer where memory is short."""
    if isinstance(option, int):
        return option
    cpus = allotted_cpus()
    if bytes_per_worker <= 0:
        return cpus
    return max(1, min(cpus, int(0.8 * allotted_memory_bytes()) // bytes_per_worker))


def _tightest(limits: Iterator[Limit]) -> Limit:
    return min(limits, key=lambda limit: limit.amount)


def _cpu_limits() -> Iterator[Limit]:
    yield Limit(_affinity_cpus(), "affinity")
    yield from _slurm_cpu_limits()
    yield from _cgroup_cpu_quotas()


def _memory_limits() -> Iterator[Limit]:
    yield Limit(_machine_memory(), "the machine")
    yield from _slurm_memory_limits()
    yield from _cgroup_memory_limits()


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _affinity_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- SLURM


def _slurm_cpu_limits() -> Iterator[Limit]:
    """SLURM's count for a task; where none was asked for, this task's share of the job's CPUs on this node."""
    if per_task := _number("SLURM_CPUS_PER_TASK"):
        yield Limit(per_task, "SLURM_CPUS_PER_TASK")
    elif on_node := _number("SLURM_CPUS_ON_NODE"):
        yield Limit(max(1, on_node // _tasks_here()), "SLURM_CPUS_ON_NODE")
    elif listed := entry_of_this_node("SLURM_JOB_CPUS_PER_NODE"):
        yield Limit(max(1, listed // _tasks_here()), "SLURM_JOB_CPUS_PER_NODE")


def _slurm_memory_limits() -> Iterator[Limit]:
    """SLURM gives mebibytes for the node, each CPU or each GPU, whichever was asked for; 0 is all of the node's."""
    tasks = _tasks_here()
    if per_node := _number("SLURM_MEM_PER_NODE"):
        yield Limit((per_node << 20) // tasks, "SLURM_MEM_PER_NODE")
    if per_cpu := _number("SLURM_MEM_PER_CPU"):
        yield Limit((per_cpu << 20) * int(_tightest(_cpu_limits()).amount), "SLURM_MEM_PER_CPU")
    per_gpu, gpus = _number("SLURM_MEM_PER_GPU"), _number("SLURM_GPUS_ON_NODE")
    if per_gpu and gpus:
        yield Limit((per_gpu << 20) * gpus // tasks, "SLURM_MEM_PER_GPU")


def _tasks_here() -> int:
    """Processes that share this node's part of the job: several only where `srun` started this one as one of them."""
    return tasks_on_this_node() if "SLURM_STEP_ID" in os.environ else 1


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


# ---- cgroups


def _cgroup_cpu_quotas() -> Iterator[Limit]:
    for folder in _cgroup_folders("cpu"):
        v2 = _read(folder / "cpu.max").split()
        if len(v2) == 2 and v2[0].isdigit():
            yield Limit(int(v2[0]) / int(v2[1]), "cgroup cpu.max")
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield Limit(int(quota) / int(period), "cgroup cpu.cfs_quota_us")


def _cgroup_memory_limits() -> Iterator[Limit]:
    for folder in _cgroup_folders("memory"):
        for name in MEMORY_FILES:
            value = _read(folder / name)
            if value.isdigit():
                yield Limit(int(value), f"cgroup {name}")


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """This process's cgroup folders, v1 and v2, from its own up to the root: a limit may sit on any of them."""
    for line in _read(PROC_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Beside v1 controllers, the v2 tree is mounted in a folder of its own.
        roots = [CGROUP_ROOT / controller] if controllers else [CGROUP_ROOT, CGROUP_ROOT / "unified"]
        relative = Path(path.lstrip("/"))
        yield from (root / part for root in roots for part in [relative, *relative.parents])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
