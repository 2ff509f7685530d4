"""What this job was allotted: CPUs and memory from affinity, SLURM and cgroups, not the whole node's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.rank_place import entry_of_this_node, find_place, tasks_on_this_node, variable_number
from pipeline.sizes import GIB

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
PROC_MOUNTS = Path("/proc/self/mountinfo")
MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")


class Limit(NamedTuple):
    """A bound on what this process may use, and where it was read."""

    amount: float
    source: str


def allotted_cpus() -> int:
    """CPUs this process may use: the least of affinity, what SLURM says and the cgroup quota, or its share of them."""
    return max(1, int(_tightest(cpu_limits()).amount) // _sharers())


def network_threads() -> int:
    """Threads for a network on a CPU: one for each allotted CPU, fewer where OMP_NUM_THREADS asks for fewer.

    As libraries take it: two threads of which one shares its CPU with other work take several times as long as one.
    """
    return min(allotted_cpus(), asked_threads("OMP_NUM_THREADS") or allotted_cpus())


def asked_threads(name: str) -> int | None:
    """Threads that a variable of the environment asks for, of a list by level the first; None where it is no number."""
    first = os.environ.get(name, "").split(",")[0].strip()
    return int(first) if first.isdecimal() else None


def allotted_memory_bytes() -> int:
    """Memory this process may use: the least of the machine's, SLURM's and the cgroup limits, or its share of it."""
    return int(_tightest(memory_limits()).amount) // _sharers()


def describe_allocation() -> str:
    """What was found, as a line for the log: the figures, what set each, and the machine's own."""
    cpus, memory, machine = _tightest(cpu_limits()), _tightest(memory_limits()), _machine_memory()
    return (
        f"allotted {max(1, int(cpus.amount))} CPU(s) (by {cpus.source}; the machine has {os.cpu_count() or 1}) and"
        f" {memory.amount / GIB:.1f} GiB of memory (by {memory.source}; the machine has {machine / GIB:.1f})"
        f"{f', shared by {_sharers()} processes' if _sharers() > 1 else ''}"
    )


def _sharers() -> int:
    """Processes that train together and share what was found; for tasks of `srun` the limits are those of each."""
    place = find_place(is_strict=False)
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


def cpu_limits() -> Iterator[Limit]:
    """Every bound on CPUs that was found; the least of them counts."""
    yield Limit(_affinity_cpus(), "affinity")
    yield from _slurm_cpu_limits()
    yield from _cgroup_cpu_quotas()


def memory_limits() -> Iterator[Limit]:
    """Every bound on memory that was found, in bytes; the least of them counts."""
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
    if per_task := variable_number("SLURM_CPUS_PER_TASK"):
        yield Limit(per_task, "SLURM_CPUS_PER_TASK")
    elif on_node := variable_number("SLURM_CPUS_ON_NODE"):
        yield Limit(max(1, on_node // _tasks_here()), "SLURM_CPUS_ON_NODE")
    elif listed := entry_of_this_node("SLURM_JOB_CPUS_PER_NODE"):
        yield Limit(max(1, listed // _tasks_here()), "SLURM_JOB_CPUS_PER_NODE")


def _slurm_memory_limits() -> Iterator[Limit]:
    """SLURM gives mebibytes for the node, each CPU or each GPU, whichever was asked for; 0 is all of the node's."""
    tasks = _tasks_here()
    if per_node := variable_number("SLURM_MEM_PER_NODE"):
        yield Limit((per_node << 20) // tasks, "SLURM_MEM_PER_NODE")
    if per_cpu := variable_number("SLURM_MEM_PER_CPU"):
        yield Limit((per_cpu << 20) * allotted_cpus(), "SLURM_MEM_PER_CPU")
    per_gpu, gpus = variable_number("SLURM_MEM_PER_GPU"), variable_number("SLURM_GPUS_ON_NODE")
    if per_gpu and gpus:
        yield Limit((per_gpu << 20) * gpus // tasks, "SLURM_MEM_PER_GPU")


def _tasks_here() -> int:
    """Processes that share this node's part of the job: several only where `srun` started this one as one of them."""
    return tasks_on_this_node() if "SLURM_STEP_ID" in os.environ else 1


# ---- cgroups


class Mount(NamedTuple):
    """A hierarchy of cgroups in the file system.

    Attributes:
        root: The cgroup that is seen at `folder`: the top one, unless a container is shown its own part only.
        folder: Where it is mounted.
        controllers: Of cgroup v1, among other options of the mount; none for v2.
    """

    root: str
    folder: Path
    controllers: frozenset[str]

    @property
    def is_v2(self) -> bool:
        """Whether it is the one hierarchy of all controllers."""
        return not self.controllers


def _cgroup_cpu_quotas() -> Iterator[Limit]:
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        yield from _quota(quota, period, "cgroup cpu.max")
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        yield from _quota(quota, period, "cgroup cpu.cfs_quota_us")


def _quota(quota: str, period: str, source: str) -> Iterator[Limit]:
    """CPUs from microseconds of them in a period; no quota is "max" or -1."""
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        yield Limit(int(quota) / int(period), source)


def _cgroup_memory_limits() -> Iterator[Limit]:
    for folder in _cgroup_folders("memory"):
        for name in MEMORY_FILES:
            value = _read(folder / name)
            if value.isdecimal():
                yield Limit(int(value), f"cgroup {name}")


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """This process's cgroup folders, v1 and v2, from its own up to the highest seen: a limit may sit on any of them."""
    mounts = list(_cgroup_mounts())
    for line in _read(PROC_CGROUP).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        known = [each for each in mounts if (controller in each.controllers if controllers else each.is_v2)]
        for mount in known or _usual_mounts(controllers and controller):
            yield from _folders_in(mount, path)


def _folders_in(mount: Mount, path: str) -> Iterator[Path]:
    """Folders of a cgroup and those above it, as far as the mount shows them."""
    inner = os.path.relpath(path or "/", mount.root)
    # Containers may be told of a cgroup by a name of the machine's that is none of what is mounted for them.
    relative = Path() if inner.startswith("..") else Path(inner)
    yield from (mount.folder / part for part in dict.fromkeys([relative, *relative.parents]))


def _cgroup_mounts() -> Iterator[Mount]:
    """What `/proc/self/mountinfo` tells: `id parent dev root folder options ... - type source options`."""
    for line in _read(PROC_MOUNTS).splitlines():
        where, _, what = line.partition(" - ")
        fields, kind = where.split(), what.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = frozenset(kind[2].split(",")) if kind[0] == "cgroup" else frozenset()
        yield Mount(_unescaped(fields[3]), Path(_unescaped(fields[4])), controllers)


def _unescaped(text: str) -> str:
    """Blanks and the like are octal numbers in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _usual_mounts(controller: str) -> list[Mount]:
    """Where hierarchies lie by convention; beside v1 controllers, the v2 tree has a folder of its own."""
    folders = [CGROUP_ROOT / controller] if controller else [CGROUP_ROOT, CGROUP_ROOT / "unified"]
    return [Mount("/", folder, frozenset()) for folder in folders]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""
