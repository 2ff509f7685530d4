"""Which of several processes this one is, by the variables of torchrun and of SLURM."""

from __future__ import annotations

import os

import pytest

from pipeline.allocation import allotted_cpus, allotted_memory_bytes, describe_allocation
from pipeline.errors import InputError
from pipeline.rank_place import RankPlace, find_place, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "29400",
}
# As seen by the third of two tasks on the first and three on the second node.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
    "SLURM_STEP_NODELIST": "gpu[007,012]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in TORCHRUN:
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_on_its_own_is_the_first_of_one() -> None:
    assert find_place() == RankPlace()
    assert find_place().is_first


def test_torchrun_tells_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, **TORCHRUN})
    assert find_place() == RankPlace(5, 8, 1, 4, "gpu7", 29400, "torchrun")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"])
def test_half_of_torchrun_s_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_all(monkeypatch, {**TORCHRUN, name: ""})
    with pytest.raises(InputError, match=f"{name} is missing or no number"):
        find_place()


def test_srun_tells_the_place_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    place = find_place()
    assert place._replace(port=0) == RankPlace(2, 5, 0, 3, "gpu007", 0, "srun")
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert 20_000 <= place.port != find_place().port
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert find_place().port not in (place.port, place.port + 8)
    set_all(monkeypatch, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert find_place()[4:6] == ("10.0.0.7", 1234)


def test_a_batch_script_for_several_tasks_without_srun_is_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert find_place() == RankPlace()
    set_all(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"})
    assert find_place() == RankPlace()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,9],big1", "gpu003"),
        ("rack[2,4]-gpu", "rack2-gpu"),
        ("n[17]", "n17"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_processes_of_torchrun_share_what_is_allotted_and_tasks_of_srun_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    alone = allotted_memory_bytes()
    set_all(monkeypatch, TORCHRUN)
    assert allotted_cpus() == 3
    assert allotted_memory_bytes() == alone // 4
    assert describe_allocation().endswith("shared by 4 processes")
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    set_all(monkeypatch, {**SRUN, "SLURM_CPUS_PER_TASK": "6"})
    assert allotted_cpus() == 6
    assert "shared" not in describe_allocation()
