"""How a volume is predicted, and what is tried next where that fails: once in full precision, or with less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil
import torch

from pipeline.allocation import allotted_memory_bytes
from pipeline.errors import InputError
from pipeline.inference.case_context import current_case
from pipeline.inference.planes import NotFiniteError
from pipeline.inference.prediction_memory import PredictionMemory
from pipeline.log import get_logger
from pipeline.networks.out_of_memory import is_out_of_memory, let_go
from pipeline.networks.precision import DeviceType
from pipeline.plan import Precision
from pipeline.sizes import GIB

# What may be taken of the allotted memory, and of what the machine has free, unless a bound is given.
AUTO_SHARE = 0.8

PlanMemory = Callable[[int, int | None], PredictionMemory]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to predict a volume.

    Attributes:
        precision: Of the network.
        scores_device: Where scores are gathered.
        window_batch: Windows that go through the network at once.
        memory: How the volume is divided.
    """

    precision: Precision
    scores_device: DeviceType
    window_batch: int
    memory: PredictionMemory


def run_attempts(first: Attempt, run: Callable[[Attempt], Result], plan_memory: PlanMemory) -> Result:
    """Predict a volume as `first` says, and from its beginning with less where memory runs out.

    Values that are not finite in 16 bits are computed once more in float32. Both are said in the log.

    Args:
        first: What is tried first.
        run: Predicts the volume.
        plan_memory: The division of the volume for a number of windows at once and a bound in bytes.

    Raises:
        InputError: The network gives values that are not finite in float32 either.
    """
    attempt = first
    while True:
        try:
            return run(attempt)
        except NotFiniteError as error:
            if attempt.precision == "32-true":
                raise InputError(str(error), fix="Use the run's other checkpoint") from None
            get_logger("predict").warning("%s in %s: once more in float32", error, attempt.precision)
            attempt = replace(attempt, precision="32-true")
        except Exception as error:
            smaller = next(_smaller(attempt, plan_memory), None) if is_out_of_memory(error) else None
            if smaller is None:
                raise
            let_go(error)
            attempt = smaller[0]
            get_logger("predict").warning("out of memory: once more with %s", smaller[1])
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _smaller(attempt: Attempt, plan_memory: PlanMemory) -> Iterator[tuple[Attempt, str]]:
    """Attempts that need less, the cheapest first, each in words."""
    if attempt.window_batch > 1:
        size = attempt.window_batch // 2
        yield replace(attempt, window_batch=size), f"{size} window(s) at a time"
    if attempt.scores_device == "cuda":
        yield replace(attempt, scores_device="cpu"), "scores gathered in host memory"
    memory = plan_memory(attempt.window_batch, attempt.memory.num_bytes - attempt.memory.parts["means"] // 2)
    if memory.num_bytes < attempt.memory.num_bytes:
        yield replace(attempt, memory=memory), f"{len(memory.blocks)} blocks"


def plan_host_memory(
    plan_memory: PlanMemory, *, window_batch: int, max_ram: int | None, result_bytes: int
) -> PredictionMemory:
    """The division of a volume that host memory is enough for.

    Args:
        plan_memory: See `run_attempts`.
        window_batch: Windows at once.
        max_ram: Most that the whole process may hold; None takes a share of the allotted memory.
        result_bytes: What the result takes, and does not hold yet.

    Raises:
        InputError: `max_ram` is given and not enough.
    """
    granted = current_case().granted_bytes
    if granted is not None:
        return plan_memory(window_batch, granted)
    held = held_bytes()
    bound = most_bytes(max_ram) - held - result_bytes
    memory = plan_memory(window_batch, bound)
    if memory.num_bytes > bound:
        needed = memory.num_bytes + held + result_bytes
        what = f"this volume takes at least {needed / GIB:.2f} GiB, {held / GIB:.2f} of them for what is loaded already"
        if max_ram is not None:
            raise InputError(f"{what}; allowed are {max_ram / GIB:.2f}", where="max_ram", fix="Allow more")
        get_logger("predict").warning("%s; memory may run out", what)
    return memory


def most_bytes(max_ram: int | None) -> int:
    """What this process may hold in all: what is asked, or a share of what it was allotted and of what is free."""
    if max_ram is not None:
        return max_ram
    return min(held_bytes() + int(AUTO_SHARE * free_bytes()), int(AUTO_SHARE * allotted_memory_bytes()))


def held_bytes() -> int:
    """What this process holds of the machine's memory."""
    return int(psutil.Process().memory_info().rss)


def free_bytes() -> int:
    """What the machine has free for all processes."""
    return int(psutil.virtual_memory().available)
