"""Which of several training processes this one is, as `srun`, `torchrun` or this program's own launcher tell it."""

from __future__ import annotations

import os
import re
from typing import Literal, NamedTuple

from pipeline.errors import InputError

Launcher = Literal["", "srun", "torchrun"]
TORCHRUN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Above the ports of services and below those that systems hand out by themselves.
FIRST_PORT, NUM_PORTS = 20_000, 12_000


class RankPlace(NamedTuple):
    """The place of a process among those that train together.

    Attributes:
        rank: Number among all of them, from 0; the first one writes.
        num_ranks: How many there are, over all nodes.
        local_rank: Number among those of this node, by which it takes its GPU.
        num_local_ranks: How many this node has.
        address, port: Where the first one listens.
        launcher: What started them; "" for a process on its own. This program's own launcher speaks as torchrun does.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: Launcher = ""

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0


def find_place(*, is_strict: bool = True) -> RankPlace:
    """The place that the environment tells.

    torchrun's variables come first, because torchrun may itself be started by `srun`. A batch script that asks for
    several tasks and runs this program without `srun` is a process on its own.

    Args:
        is_strict: Refuse torchrun's variables where they are incomplete, instead of looking at SLURM's.

    Raises:
        InputError: They are incomplete or no numbers.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and (is_strict or not _wrong_torchrun_names()):
        return _torchrun_place()
    num_tasks = variable_number("SLURM_STEP_NUM_TASKS")
    return _srun_place(num_tasks) if "SLURM_STEP_ID" in os.environ and num_tasks > 1 else RankPlace()


def _torchrun_place() -> RankPlace:
    if wrong := _wrong_torchrun_names():
        what = f"RANK and WORLD_SIZE are set, but {', '.join(wrong)} is missing or no number"
        raise InputError(what, where="the environment", fix="Start with torchrun or srun, or unset them")
    values = {name: os.environ[name] for name in TORCHRUN_NAMES}
    rank, num_ranks, local_rank, num_local_ranks = (int(values[name]) for name in TORCHRUN_NAMES[:4])
    address, port = values["MASTER_ADDR"], int(values["MASTER_PORT"])
    return RankPlace(rank, num_ranks, local_rank, num_local_ranks, address, port, "torchrun")


def _wrong_torchrun_names() -> list[str]:
    values = {name: os.environ.get(name, "") for name in TORCHRUN_NAMES}
    return [name for name, value in values.items() if not (value if name == "MASTER_ADDR" else value.isdecimal())]


def _srun_place(num_tasks: int) -> RankPlace:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    return RankPlace(
        rank=variable_number("SLURM_PROCID"),
        num_ranks=num_tasks,
        local_rank=variable_number("SLURM_LOCALID"),
        num_local_ranks=tasks_on_this_node(),
        address=os.environ.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        port=variable_number("MASTER_PORT") or _port_of_step(),
        launcher="srun",
    )


def _port_of_step() -> int:
    """The same for all tasks of a step and most likely no one else's: jobs that share a node differ in their number."""
    return FIRST_PORT + (8 * variable_number("SLURM_JOB_ID") + variable_number("SLURM_STEP_ID")) % NUM_PORTS


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: "gpu[003-007,9],big1" is gpu003."""
    found = re.match(r"([^,\[\s]*)(?:\[(\d+)[^\]]*\])?([^,\[\s]*)", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else ""


def tasks_on_this_node() -> int:
    """Tasks of this `srun` step that run on this node, at least 1."""
    return max(1, entry_of_this_node("SLURM_STEP_TASKS_PER_NODE"))


def entry_of_this_node(name: str) -> int:
    """The entry of this node in a variable such as "2(x3),4"; 0 where there is none."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get(name, "")):
        counts += [int(count)] * int(times or 1)
    node = variable_number("SLURM_NODEID")
    return counts[node] if node < len(counts) else 0


def variable_number(name: str) -> int:
    """A variable of the environment as a number; 0 where it is none, or missing."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0
