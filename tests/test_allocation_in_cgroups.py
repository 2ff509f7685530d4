"""CPUs and memory of processes that the kernel really holds to limits: in cgroups made for the test, and in containers.

They are made below this process's own cgroup, so that none of its limits is left; skipped where they cannot be made.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
JOIN = 'for folder in $FOLDERS; do echo $$ > "$folder/cgroup.procs" || exit 1; done; exec "$@"'
FOUND = """
import json
from pipeline.allocation import allotted_cpus, allotted_memory_bytes, describe_allocation, resolve_num_workers
print(json.dumps({
    "cpus": allotted_cpus(), "memory": allotted_memory_bytes(), "text": describe_allocation(),
    "workers": resolve_num_workers("auto"), "large workers": resolve_num_workers("auto", bytes_per_worker=300 * 2**20),
}))
"""
Found = dict[str, Any]


def hierarchies() -> Iterator[tuple[Path, list[str]]]:
    """Folders where cgroups are mounted, with the options of their mounts; none for v2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield Path(folder), options.split(",") if kind == "cgroup" else []


def own_folder(controller: str) -> Path | None:
    """The folder whose list of processes has this one: no name is read, as what is tested does."""
    mounted = [folder for folder, options in hierarchies() if controller in options or not options]
    for top in sorted(mounted, key=lambda folder: not (folder / f"{controller}.stat").exists()):
        for path in [top, *(path.parent for path in top.rglob("cgroup.procs"))]:
            if str(os.getpid()) in _lines(path / "cgroup.procs"):
                return path
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


@pytest.fixture
def make_group() -> Iterator[Callable[..., Path]]:
    """Makes a cgroup below this process's own, or below another: (controller, *, parent) -> folder."""
    made: list[Path] = []

    def make(controller: str, parent: Path | None = None) -> Path:
        own = parent or own_folder(controller)
        if own is None:
            pytest.skip("this process is in no cgroup that can be seen")
        folder = own / f"voxfit-test-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
            made.append(folder)
            if not list(folder.glob(f"{controller}.*")):
                (own / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            pytest.skip(f"no cgroup with {controller} can be made here ({error.strerror})")
        if not list(folder.glob(f"{controller}.*")):
            pytest.skip(f"cgroups here have no {controller}")
        return folder

    yield make
    for folder in reversed(made):
        _remove(folder)


def _remove(folder: Path) -> None:
    """A cgroup goes once the kernel has done with its last process."""
    end = monotonic() + 5
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if monotonic() > end:
                raise
            sleep(0.05)


def set_quota(folder: Path, quota: int, period: int = 100_000) -> None:
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} {period}")
        return
    (folder / "cpu.cfs_period_us").write_text(str(period))
    (folder / "cpu.cfs_quota_us").write_text(str(quota))


def set_memory(folder: Path, num_bytes: int) -> None:
    is_v2 = (folder / "memory.max").exists()
    (folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(num_bytes))


def found_in(*folders: Path, around: str = "", code: str = FOUND, **more: str) -> Found:
    """What a process in the cgroups finds; `around` is a shell script that starts it as `"$@"`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    variables = {**known, "PYTHONPATH": str(ROOT), "FOLDERS": " ".join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    inner = ["sh", "-ec", around, "sh"] if around else []
    done = subprocess.run(
        ["sh", "-c", JOIN, "sh", *inner, sys.executable, "-c", code],
        env={**variables, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode and around and "ermission denied" in done.stderr + done.stdout:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("quota", "period"), [(150_000, 100_000), (20_000, 10_000), (50_000, 100_000)])
def test_a_process_finds_the_quota_it_is_held_to(make_group, quota: int, period: int) -> None:
    folder = make_group("cpu")
    set_quota(folder, quota, period)
    cpus = max(1, min(quota // period, len(os.sched_getaffinity(0))))
    found = found_in(folder)
    assert (found["cpus"], found["workers"]) == (cpus, cpus)
    if quota / period < len(os.sched_getaffinity(0)):
        assert f"{cpus} CPU(s) (by cgroup cpu." in found["text"]


def test_a_process_without_a_quota_finds_that_of_the_cgroup_around_its_own(make_group) -> None:
    outer = make_group("cpu")
    inner = make_group("cpu", outer)
    set_quota(outer, 100_000)
    assert found_in(inner)["cpus"] == 1
    assert "(by cgroup cpu." in found_in(inner)["text"] or len(os.sched_getaffinity(0)) == 1


def test_a_process_finds_the_memory_it_is_held_to_and_starts_as_few_workers_as_fit(make_group) -> None:
    folder = make_group("memory")
    set_memory(folder, 500 * MIB)
    found = found_in(folder)
    assert found["memory"] == 500 * MIB
    assert found["large workers"] == 1
    assert "0.5 GiB of memory (by cgroup memory." in found["text"]


def test_the_memory_found_is_where_the_kernel_ends_a_process(make_group) -> None:
    """The oracle for the test above: three quarters of it can be had, and twice of it cannot."""
    folder = make_group("memory")
    set_memory(folder, 200 * MIB)
    for num_bytes, survives in ((150 * MIB, True), (400 * MIB, False)):
        code = f"kept = bytearray({num_bytes}); kept[::4096] = b'x' * len(kept[::4096]); print('there')"
        command = ["sh", "-c", JOIN, "sh", sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, "FOLDERS": str(folder)}, capture_output=True, check=False)
        assert (done.stdout.strip() == b"there") == survives, done


def test_a_cpuset_that_is_smaller_than_the_quota_counts(make_group) -> None:
    cpu, cpuset = make_group("cpu"), make_group("cpuset")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU only")
    set_quota(cpu, 190_000)
    mems = "cpuset.mems.effective" if (cpuset.parent / "cpuset.mems.effective").exists() else "cpuset.mems"
    (cpuset / "cpuset.mems").write_text((cpuset.parent / mems).read_text())
    (cpuset / "cpuset.cpus").write_text(str(min(os.sched_getaffinity(0))))
    found = found_in(cpu, cpuset)
    assert found["cpus"] == 1
    assert "1 CPU(s) (by affinity" in found["text"]


def test_slurm_s_memory_for_each_cpu_is_that_of_one_where_a_quota_leaves_less_than_one(make_group) -> None:
    folder = make_group("cpu")
    set_quota(folder, 50_000)
    found = found_in(folder, SLURM_MEM_PER_CPU="300", SLURM_CPUS_PER_TASK="4")
    assert (found["cpus"], found["memory"]) == (1, 300 * MIB)


def test_data_workers_of_a_training_follow_from_the_limits(make_group) -> None:
    cpu, memory = make_group("cpu"), make_group("memory")
    set_quota(cpu, 150_000)
    set_memory(memory, 1024 * MIB)
    code = (
        "import json\nfrom pipeline.training.processes import share_cpus\n"
        "given = dict(num_threads='auto', num_workers='auto', on_gpu=True, batch_bytes=2**20)\n"
        "print(json.dumps(share_cpus(**given)._asdict()))"
    )
    assert found_in(cpu, memory, code=code) == {"num_threads": 1, "num_workers": 1}


# ---- containers: parts of the tree, mounted elsewhere, under names of their own


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
@pytest.mark.parametrize("kind", ["a namespace of its own", "its folder alone, and the name that the machine knows"])
def test_a_container_finds_its_limits(make_group, tmp_path: Path, kind: str) -> None:
    """As Docker and Podman start them: with a cgroup namespace, or, for v1 and by older ones, without."""
    cpu, memory = make_group("cpu"), make_group("memory")
    inner = make_group("memory", memory)
    if (cpu / "cpu.max").exists():
        pytest.skip("v2 here; what follows mounts v1")
    set_quota(cpu, 150_000)
    set_memory(memory, 700 * MIB)
    set_memory(inner, 600 * MIB)
    own_namespace = kind == "a namespace of its own"
    lines = []
    for name, folder in (("cpu", cpu), ("memory", memory)):
        (tmp_path / name).mkdir()
        mount = f"-t cgroup -o {name} none" if own_namespace else f"--bind {folder}"
        lines.append(f"mount {mount} {tmp_path / name}")
    # The process moves on into a cgroup inside, which only its mount leads to.
    lines.append(f"echo $$ > {tmp_path}/memory/{'' if own_namespace else inner.name + '/'}cgroup.procs")
    lines += [f"mount -t tmpfs none {Path('/sys/fs/cgroup')}", 'exec "$@"']
    unshared = "unshare --mount" + (" --cgroup" if own_namespace else "")
    start = f"{unshared} sh -ec '{'; '.join(lines)}' sh \"$@\""
    found = found_in(cpu, inner if own_namespace else memory, around=start)
    assert found["memory"] == 600 * MIB
    assert found["cpus"] == 1
    assert "(by cgroup cpu.cfs_quota_us" in found["text"] or len(os.sched_getaffinity(0)) == 1


@pytest.mark.slow
def test_a_training_that_the_kernel_ends_for_its_memory_is_reported_by_the_doctor(make_group, tmp_path: Path) -> None:
    folder = make_group("memory")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FOLDERS": str(folder)}
    voxfit = [sys.executable, "-m", "pipeline"]
    data = ["--dataset", str(ROOT / "data_samples" / "msd_blobs"), "--num_workers", "1"]
    plan = ["--plan", "plan.json", "--store", "store"]
    small = ["--vram", "1.25GiB", "--base_features", "32", "--patch_size", "32", "32", "32", "--batch_size", "8"]
    for command in (["plan", *data, *small, "--out", "plan.json"], ["preprocess", *data, *plan]):
        subprocess.run([*voxfit, *command], cwd=tmp_path, env=environment, check=True)
    set_memory(folder, 600 * MIB)
    done = subprocess.run(
        ["sh", "-c", JOIN, "sh", *voxfit, "doctor", *plan, "--json", "--hardware.num_workers", "0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    answer = json.loads(done.stdout)
    assert answer["facts"]["CPUs and memory"]["memory"] == 600 * MIB
    parts = {part["name"]: part for part in answer["parts"]}
    assert parts["sample"]["seconds"] > 0
    assert "SIGKILL (as the kernel and SLURM do where memory runs out)" in parts["train"]["problem"]
    assert not list(tmp_path.glob(".doctor.*"))
