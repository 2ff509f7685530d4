"""CPUs and memory of a job, read from files as cgroup v1 and v2 write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import allocation
from pipeline.allocation import (
    allotted_cpus,
    allotted_memory_bytes,
    describe_allocation,
    network_threads,
    resolve_num_workers,
)

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
    """A folder tree that stands for /sys/fs/cgroup, and files that stand for /proc/self/cgroup and mountinfo."""

    def __init__(self, root: Path) -> None:
        self.cgroup, self.proc, self.mounts = root / "cgroup", root / "proc_cgroup", root / "mountinfo"
        self.cgroup.mkdir()
        self.proc.write_text("")

    def write(self, name: str, text: str) -> None:
        path = self.cgroup / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def mount(self, root: str, folder: str, kind: str, options: str) -> None:
        """Say that the cgroup `root` is seen at a folder of the tree."""
        where = str(self.cgroup / folder).replace(" ", "\\040")
        with self.mounts.open("a") as stream:
            stream.write(f"34 31 0:29 {root} {where} rw,nosuid,relatime shared:9 - {kind} cgroup {options}\n")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node with 64 CPUs to this process and nothing else limited."""
    made = Node(tmp_path)
    monkeypatch.setattr(allocation, "CGROUP_ROOT", made.cgroup)
    monkeypatch.setattr(allocation, "PROC_CGROUP", made.proc)
    monkeypatch.setattr(allocation, "PROC_MOUNTS", made.mounts)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, 64), ("", 64), ("0", 64), ("many", 64), ("3", 3), ("3,2", 3), (" 3 ", 3), ("640", 64)],
)
def test_a_network_takes_no_more_threads_than_openmp_is_allowed(
    node: Node, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: int
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert (network_threads(), allotted_cpus()) == (expected, 64)


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


# ---- what SLURM says, as it says it


@pytest.fixture
def in_job(node: Node, monkeypatch: pytest.MonkeyPatch):
    """Set SLURM's variables, by name without the prefix."""
    monkeypatch.setattr(allocation, "_machine_memory", lambda: 256 * GIB)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return set_variables


def test_without_cpus_per_task_the_job_s_cpus_on_this_node_count(in_job) -> None:
    in_job(JOB_ID="812", CPUS_ON_NODE="6", JOB_CPUS_PER_NODE="6", TASKS_PER_NODE="1", MEM_PER_NODE="2048")
    assert allotted_cpus() == 6
    assert allotted_memory_bytes() == 2 * GIB


@pytest.mark.parametrize(("node_id", "expected"), [("0", 8), ("2", 8), ("3", 4), ("9", 64), ("", 8)])
def test_a_list_of_nodes_is_read_at_this_node_s_place(in_job, node_id: str, expected: int) -> None:
    in_job(JOB_CPUS_PER_NODE="8(x3),4", NODEID=node_id)
    assert allotted_cpus() == expected


def test_tasks_that_srun_started_share_the_node_s_part_and_a_batch_step_has_all_of_it(in_job) -> None:
    # Four tasks without --cpus-per-task: the batch step, then a task of a step on the second node.
    in_job(CPUS_ON_NODE="8", TASKS_PER_NODE="4", MEM_PER_NODE="4096", NODEID="1")
    assert (allotted_cpus(), allotted_memory_bytes()) == (8, 4 * GIB)
    in_job(STEP_ID="0", STEP_TASKS_PER_NODE="2,4")
    assert (allotted_cpus(), allotted_memory_bytes()) == (2, GIB)


def test_memory_per_cpu_and_per_gpu_are_multiplied_by_what_was_allotted(in_job) -> None:
    in_job(CPUS_PER_TASK="3", CPUS_ON_NODE="3", MEM_PER_CPU="1024")
    assert (allotted_cpus(), allotted_memory_bytes()) == (3, 3 * GIB)
    in_job(MEM_PER_CPU="", MEM_PER_GPU="8192", GPUS_ON_NODE="2")
    assert allotted_memory_bytes() == 16 * GIB


def test_no_memory_figure_and_all_of_the_node_are_the_machine_s(in_job) -> None:
    in_job(CPUS_PER_TASK="2", MEM_PER_NODE="0")
    assert allotted_memory_bytes() == 256 * GIB


def test_cpus_that_srun_bound_the_task_to_count_before_what_was_asked_for(
    in_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(CPUS_PER_TASK="16", STEP_ID="0", STEP_TASKS_PER_NODE="1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 6}, raising=False)
    assert allotted_cpus() == 4


def test_a_soft_v2_limit_counts_as_well(node: Node) -> None:
    node.proc.write_text(V2)
    job = "system.slice/slurmstepd.scope/job_812"
    node.write(f"{job}/memory.max", str(4 * GIB))
    node.write(f"{job}/step_0/memory.high", str(2 * GIB))
    assert allotted_memory_bytes() == 2 * GIB


def test_beside_v1_controllers_the_v2_tree_is_found_in_its_own_folder(node: Node) -> None:
    node.proc.write_text("6:memory:/\n0::/system.slice/slurmstepd.scope/job_812\n")
    node.write("memory/memory.limit_in_bytes", UNLIMITED_V1)
    node.write("unified/system.slice/slurmstepd.scope/job_812/cpu.max", "500000 100000")
    assert allotted_cpus() == 5


# ---- layouts as they are found on machines, with what `/proc/self/mountinfo` says of them


def test_a_pod_of_kubernetes_on_v2_sees_its_own_root(node: Node) -> None:
    node.mount("/", "", "cgroup2", "rw,nsdelegate")
    node.proc.write_text("0::/\n")
    node.write("cpu.max", "3500000 1000000")
    node.write("memory.max", str(6 * GIB))
    node.write("memory.high", "max")
    assert (allotted_cpus(), allotted_memory_bytes()) == (3, 6 * GIB)


def test_a_session_in_nested_slices_of_systemd_is_held_by_the_tightest(node: Node) -> None:
    node.mount("/", "", "cgroup2", "rw,nsdelegate,memory_recursiveprot")
    slices = ["user.slice", "user-1000.slice", "user@1000.service", "app.slice", "run-u7.scope"]
    node.proc.write_text(f"0::/{'/'.join(slices)}\n")
    limits = {1: ("max 100000", "max", 4 * GIB), 3: ("250000 100000", 8 * GIB, "max"), 5: ("max 100000", "max", "max")}
    for depth, (cpu, most, high) in limits.items():
        folder = "/".join(slices[:depth])
        for name, value in (("cpu.max", cpu), ("memory.max", most), ("memory.high", high)):
            node.write(f"{folder}/{name}", str(value))
    assert (allotted_cpus(), allotted_memory_bytes()) == (2, 4 * GIB)
    assert "(by cgroup memory.high;" in describe_allocation()


def test_a_container_of_docker_on_v1_finds_itself_and_cgroups_inside_of_it_by_what_is_mounted(node: Node) -> None:
    ours = "/docker/4f0c"
    node.mount(ours, "cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
    node.mount(ours, "memory", "cgroup", "rw,memory")
    node.mount(ours, "systemd", "cgroup", "rw,xattr,name=systemd")
    node.proc.write_text(f"9:memory:{ours}/worker\n4:cpu,cpuacct:{ours}\n1:name=systemd:{ours}\n0::/system.slice\n")
    node.write("cpu,cpuacct/cpu.cfs_quota_us", "150000")
    node.write("cpu,cpuacct/cpu.cfs_period_us", "100000")
    node.write("memory/memory.limit_in_bytes", str(4 * GIB))
    node.write("memory/worker/memory.limit_in_bytes", str(GIB))
    assert (allotted_cpus(), allotted_memory_bytes()) == (1, GIB)


def test_apptainer_shows_the_machine_s_own_tree_at_its_own_names(node: Node) -> None:
    job = "system.slice/slurmstepd.scope/job_812"
    node.mount("/", "", "cgroup2", "rw,nsdelegate")
    node.proc.write_text(f"0::/{job}/step_0/user/task_0\n")
    node.write(f"{job}/step_0/user/task_0/cpu.max", "max 100000")
    node.write(f"{job}/memory.max", str(2 * GIB))
    node.write(f"{job}/step_0/memory.max", str(2 * GIB))
    node.write(f"{job}/step_0/user/memory.max", "max")
    assert (allotted_cpus(), allotted_memory_bytes()) == (64, 2 * GIB)


def test_a_mount_that_shows_nothing_of_ours_is_read_at_its_top(node: Node) -> None:
    node.mount("/kubepods/pod1/c1", "memory", "cgroup", "rw,memory")
    node.mount("/../..", "cpu", "cgroup", "rw,cpu")
    node.proc.write_text("5:memory:/\n4:cpu:/\n")
    node.write("memory/memory.limit_in_bytes", str(GIB))
    node.write("cpu/cpu.cfs_quota_us", "300000")
    node.write("cpu/cpu.cfs_period_us", "100000")
    assert (allotted_cpus(), allotted_memory_bytes()) == (3, GIB)


def test_folders_with_blanks_and_controllers_that_lie_in_unusual_places_are_found(node: Node) -> None:
    node.mount("/", "my groups/both", "cgroup", "rw,cpu,memory")
    node.proc.write_text("2:cpu,memory:/a b:c\n")
    node.write("my groups/both/a b:c/cpu.cfs_quota_us", "700000")
    node.write("my groups/both/a b:c/cpu.cfs_period_us", "100000")
    node.write("my groups/both/a b:c/memory.limit_in_bytes", str(GIB))
    assert (allotted_cpus(), allotted_memory_bytes()) == (7, GIB)


@pytest.mark.parametrize("text", ["", "max", "max 100000", "-1 100000", "100000 0", "100000", "² 100000", "0x10 5"])
def test_what_is_no_quota_limits_nothing(node: Node, text: str) -> None:
    node.proc.write_text("0::/\nnonsense\n::\n")
    node.mounts.write_text("nonsense\n1 2 3 - cgroup\n")
    node.write("cpu.max", text)
    node.write("memory.max", f"{text} bytes")
    assert (allotted_cpus(), allotted_memory_bytes()) == (64, MACHINE_BYTES)


def test_less_than_one_cpu_is_one_for_what_is_given_by_cpu(in_job, node: Node) -> None:
    in_job(CPUS_PER_TASK="4", MEM_PER_CPU="1024")
    node.proc.write_text("0::/\n")
    node.write("cpu.max", "50000 100000")
    assert (allotted_cpus(), allotted_memory_bytes()) == (1, GIB)


def test_the_line_for_the_log_says_what_set_each_figure(in_job, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert describe_allocation() == (
        "allotted 64 CPU(s) (by affinity; the machine has 64) and 256.0 GiB of memory (by the machine; the machine has"
        " 256.0)"
    )
    in_job(CPUS_PER_TASK="8", MEM_PER_NODE="49152")
    assert "allotted 8 CPU(s) (by SLURM_CPUS_PER_TASK; the machine has 64)" in describe_allocation()
    node.proc.write_text(V2)
    node.write("system.slice/slurmstepd.scope/job_812/memory.max", str(32 * GIB))
    assert "32.0 GiB of memory (by cgroup memory.max; the machine has 256.0)" in describe_allocation()


def test_memory_follows_slurm_where_no_cgroup_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert allocation.allotted_memory_bytes() <= 2048 << 20
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    assert allocation.allotted_memory_bytes() <= 512 << 20
