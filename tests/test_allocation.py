"""CPUs and memory of a job, read from files as cgroup v1 and v2 write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import allocation
from pipeline.allocation import allotted_cpus, allotted_memory_bytes, resolve_num_workers

GIB = 2**30
MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = "9223372036854771712"
V2 = "0::/system.slice/slurmstepd.scope/job_812/step_0/user/task_0\n"
V1 = """\
12:pids:/system.slice/slurmd.service
9:cpuset:/slurm/uid_1000/job_812/step_0
6:memory:/slurm/uid_1000/job_812/step_0/task_0
4:cpu,cpuacct:/slurm/uid_1000/job_812/step_0/task_0
1:name=systemd:/system.slice/slurmd.service
0::/system.slice/slurmd.service
"""


class Node:
    """A folder tree that stands for /sys/fs/cgroup, and a file that stands for /proc/self/cgroup."""

    def __init__(self, root: Path) -> None:
        self.cgroup, self.proc = root / "cgroup", root / "proc_cgroup"
        self.cgroup.mkdir()
        self.proc.write_text("")

    def write(self, name: str, text: str) -> None:
        path = self.cgroup / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node with 64 CPUs to this process and nothing else limited."""
    made = Node(tmp_path)
    monkeypatch.setattr(allocation, "CGROUP_ROOT", made.cgroup)
    monkeypatch.setattr(allocation, "PROC_CGROUP", made.proc)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return made


def test_without_limits_the_affinity_counts(node: Node):
    assert allotted_cpus() == 64
    assert allotted_memory_bytes() == MACHINE_BYTES


def test_without_cgroup_files_the_affinity_counts(node: Node):
    node.proc.unlink()
    assert allotted_cpus() == 64


@pytest.mark.parametrize(("value", "expected"), [("8", 8), ("128", 64), ("", 64), ("many", 64)])
def test_slurm_lowers_but_never_raises_the_count(
    node: Node, monkeypatch: pytest.MonkeyPatch, value: str, expected: int
):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", value)
    assert allotted_cpus() == expected


@pytest.mark.parametrize(("quota", "expected"), [("400000 100000", 4), ("50000 100000", 1), ("250000 100000", 2)])
def test_a_v2_quota_is_rounded_down_to_whole_cpus(node: Node, quota: str, expected: int):
    node.proc.write_text(V2)
    node.write("system.slice/slurmstepd.scope/job_812/step_0/user/task_0/cpu.max", quota)
    assert allotted_cpus() == expected


def test_a_v2_limit_on_a_parent_holds(node: Node):
    node.proc.write_text(V2)
    job = "system.slice/slurmstepd.scope/job_812"
    node.write(f"{job}/step_0/user/task_0/cpu.max", "max 100000")
    node.write(f"{job}/step_0/user/task_0/memory.max", "max")
    node.write(f"{job}/cpu.max", "600000 100000")
    node.write(f"{job}/memory.max", str(GIB))
    assert allotted_cpus() == 6
    assert allotted_memory_bytes() == GIB


def test_a_v2_container_sees_its_own_root(node: Node):
    node.proc.write_text("0::/\n")
    node.write("cpu.max", "200000 100000")
    node.write("memory.max", str(GIB // 2))
    assert allotted_cpus() == 2
    assert allotted_memory_bytes() == GIB // 2


def test_v1_limits_of_a_slurm_job(node: Node):
    node.proc.write_text(V1)
    task = "slurm/uid_1000/job_812/step_0/task_0"
    node.write(f"cpu/{task}/cpu.cfs_quota_us", "-1")
    node.write(f"cpu/{task}/cpu.cfs_period_us", "100000")
    node.write("cpu/slurm/uid_1000/job_812/cpu.cfs_quota_us", "300000")
    node.write("cpu/slurm/uid_1000/job_812/cpu.cfs_period_us", "100000")
    node.write(f"memory/{task}/memory.limit_in_bytes", UNLIMITED_V1)
    node.write("memory/slurm/uid_1000/job_812/memory.limit_in_bytes", str(GIB))
    assert allotted_cpus() == 3
    assert allotted_memory_bytes() == GIB


def test_a_v1_container_whose_own_path_is_hidden_uses_the_mounted_root(node: Node):
    node.proc.write_text("4:cpu,cpuacct:/docker/0af1\n6:memory:/docker/0af1\n")
    node.write("cpu/cpu.cfs_quota_us", "150000")
    node.write("cpu/cpu.cfs_period_us", "100000")
    node.write("memory/memory.limit_in_bytes", str(GIB))
    assert allotted_cpus() == 1
    assert allotted_memory_bytes() == GIB


def test_an_unlimited_v1_group_counts_as_the_machine(node: Node):
    node.proc.write_text("6:memory:/\n")
    node.write("memory/memory.limit_in_bytes", UNLIMITED_V1)
    assert allotted_memory_bytes() == MACHINE_BYTES


def test_a_cpu_quota_of_another_controllers_group_is_not_ours(node: Node):
    node.proc.write_text("12:pids:/elsewhere\n")
    node.write("cpu/elsewhere/cpu.cfs_quota_us", "100000")
    node.write("cpu/elsewhere/cpu.cfs_period_us", "100000")
    assert allotted_cpus() == 64


def test_an_explicit_worker_count_is_taken_as_it_is(node: Node):
    assert resolve_num_workers(100, bytes_per_worker=GIB) == 100


def test_auto_workers_fit_into_the_memory(node: Node):
    node.proc.write_text("0::/\n")
    node.write("memory.max", str(10 * 2**20))
    assert resolve_num_workers("auto") == 64
    assert resolve_num_workers("auto", bytes_per_worker=2**21) == 4
    assert resolve_num_workers("auto", bytes_per_worker=2**30) == 1


def test_this_machine_gives_plausible_figures():
    assert 1 <= allotted_cpus() <= (os.cpu_count() or 1)
    assert 0 < allotted_memory_bytes() <= MACHINE_BYTES


def test_memory_follows_slurm_where_no_cgroup_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert allocation.allotted_memory_bytes() <= 2048 << 20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    assert allocation.allotted_memory_bytes() <= 512 << 20
