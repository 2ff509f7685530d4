"""What this job was allotted: CPUs and memory from affinity, SLURM and cgroups, not the whole node's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


def allotted_cpus() -> int:
    """CPUs this process may use: the least of affinity, SLURM's `cpus-per-task` and the cgroup quota."""
    limits = [float(_affinity_cpus())]
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit():
        limits.append(float(slurm))
    limits += list(_cgroup_cpu_quotas())
    return max(1, int(min(limits)))


def allotted_memory_bytes() -> int:
    """Memory this process may use: the least of the machine's, SLURM's and the cgroup limits."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_slurm_memory_limits(), *_cgroup_memory_limits()])


def resolve_num_workers(option: int | str, *, bytes_per_worker: int = 0) -> int:
    """The worker count: the option itself, or for "auto" the allotted CPUs, fewer where memory is short."""
    if isinstance(option, int):
        return option
    cpus = allotted_cpus()
    if bytes_per_worker <= 0:
        return cpus
    return max(1, min(cpus, int(0.8 * allotted_memory_bytes()) // bytes_per_worker))


def _affinity_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slurm_memory_limits() -> Iterable[int]:
    """SLURM gives mebibytes, for the node or for each CPU, whichever was asked for."""
    per_node, per_cpu = (os.environ.get(f"SLURM_MEM_PER_{unit}", "") for unit in ("NODE", "CPU"))
    # 0 asks for all memory of the node.
    if per_node.isdigit() and int(per_node) > 0:
        yield int(per_node) << 20
    if per_cpu.isdigit() and int(per_cpu) > 0:
        yield (int(per_cpu) << 20) * allotted_cpus()


def _cgroup_cpu_quotas() -> Iterable[float]:
    for folder in _cgroup_folders("cpu"):
        v2 = _read(folder / "cpu.max").split()
        if len(v2) == 2 and v2[0].isdigit():
            yield int(v2[0]) / int(v2[1])
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _cgroup_memory_limits() -> Iterable[int]:
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            value = _read(folder / name)
            if value.isdigit():
                yield int(value)


def _cgroup_folders(controller: str) -> Iterable[Path]:
    """This process's cgroup folders, v1 and v2, from its own up to the root: a limit may sit on any of them."""
    for line in _read(PROC_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT
        relative = Path(path.lstrip("/"))
        yield from (root / part for part in [relative, *relative.parents])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
