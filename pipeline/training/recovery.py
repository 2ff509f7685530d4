"""What happens between an out-of-memory and going on: what is kept, let go, written down and said."""

from __future__ import annotations

import gc
import resource
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.allocation import allotted_memory_bytes
from pipeline.artifacts import write_artifact
from pipeline.config import TrainConfig
from pipeline.errors import InputError
from pipeline.log import get_logger
from pipeline.plan import Plan
from pipeline.run_record import Counts, Phase, StepDown
from pipeline.sizes import GIB
from pipeline.slabs.host import release_host_buffers
from pipeline.training.processes import give_freed_memory_back
from pipeline.training.run_folder import RunFolder
from pipeline.training.step_down import Standing, options_in_the_way

WHERE: dict[Phase, str] = {
    "start": "while the training was set up",
    "data": "while a batch was made ready",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimiser": "in the optimiser step",
    "validation": "in the validation",
    "report": "while the epoch was reported and saved",
}


@dataclass(frozen=True, kw_only=True)
class OutOfMemoryReport:
    """An out-of-memory of a training, without anything that would keep memory.

    Attributes:
        where: What the training was doing.
        counts: As of the last finished optimiser step before it.
        continues_from: What the checkpoint on disk holds.
        on_gpu: Whether the training ran on a GPU.
        memory: How much there was, in words.
        error: The error's first line.
    """

    where: Phase
    counts: Counts
    continues_from: Counts
    on_gpu: bool
    memory: str
    error: str

    @property
    def place(self) -> str:
        """Where and when, in words."""
        return f"{WHERE[self.where]} after optimiser step {self.counts.optimizer_step}"


def describe_memory(*, on_gpu: bool) -> str:
    """How much memory there is, and how much of it the training took, or that this cannot be told."""
    try:
        if on_gpu:
            total, held = torch.cuda.get_device_properties().total_memory, torch.cuda.max_memory_reserved()
            return f"the GPU has {total / GIB:.1f} GiB, of which the training held up to {held / GIB:.1f} GiB"
        total, held = allotted_memory_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return f"this job has {total / GIB:.1f} GiB, of which the training held up to {held / GIB:.1f} GiB"
    except Exception:
        # Asked where memory has run out and may be short still, which must not end the training.
        return "how much memory there is cannot be told"


def free_memory(network: nn.Module | None) -> None:
    """Give back what a training that ended left behind: gradients, objects that hold each other, what is cached."""
    if network is not None:
        network.zero_grad(set_to_none=True)
    # Torch keeps what a failed backward pass on a CPU left undone, and all it holds, until the next one.
    torch.zeros((), requires_grad=True).backward()
    gc.collect()
    release_host_buffers()
    give_freed_memory_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        # As of torch 2.9 or so.
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()


def go_down(
    folder: RunFolder | None, plan: Plan, config: TrainConfig, standing: Standing, failure: OutOfMemoryReport
) -> Standing:
    """Decide how to go on, write it into `run.json` and say it in a line.

    Args:
        folder: Of the run; None where another process writes into it.
        plan: For the advice at the end of the ladder, as `config`.
        config: Options of the run.
        standing: Where memory ran out.
        failure: How it did.

    Raises:
        InputError: No rung is left.
    """
    below = standing.step_down(failure.where, on_gpu=failure.on_gpu)
    if below is None:
        raise _no_rung_left(plan, config, standing, failure)
    record = folder.read_record() if folder is not None else None
    step = StepDown(
        where=failure.where,
        counts=failure.counts,
        continued_from=failure.continues_from,
        from_rung=standing.rung,
        to_rung=below.rung,
        fallback=below.fallback,
        scores_on_host=below.scores_on_host,
        error=failure.error,
    )
    if folder is not None and record is not None:
        write_artifact(folder.record, replace(record, step_downs=(*record.step_downs, step)))
    get_logger("train").warning("%s", _said(standing, below, failure))
    return below


def _said(standing: Standing, below: Standing, failure: OutOfMemoryReport) -> str:
    if below.rung.is_same_step(standing.rung):
        how = "validations add up their scores in host memory from here on"
    else:
        how = f"stepping down from {standing.rung} to {below.rung}"
    parts = [f"out of memory {failure.place}: {how}"]
    if below.rung.patch_size != standing.rung.patch_size:
        parts.append("the same cases from here on, in smaller patches, and validation in smaller windows")
    parts.append(f"going on from optimiser step {failure.continues_from.optimizer_step}")
    if failure.continues_from.optimizer_step < failure.counts.optimizer_step:
        parts.append("later ones are repeated, because memory does not hold them whole")
    return "; ".join([*parts, failure.memory])


def _no_rung_left(plan: Plan, config: TrainConfig, standing: Standing, failure: OutOfMemoryReport) -> InputError:
    ways = ["end what else takes memory there"]
    if by_hand := options_in_the_way(plan, config, standing, failure.where):
        ways.append(f"leave {' and '.join(by_hand)} to the plan, which has other rungs")
    step = failure.continues_from.optimizer_step
    ways.append("or plan again with a smaller --vram, or a smaller patch_size, and train into another --run_dir")
    left = f"no rung is left below {standing.rung}"
    if standing.below:
        left = f"no rung below {standing.rung} runs the windows of a validation otherwise"
    return InputError(
        f"out of memory {failure.place}, and {left}; {failure.memory}",
        where="plan.json",
        fix=f"The same command goes on from optimiser step {step} where there is more: {'; '.join(ways)}",
    )
