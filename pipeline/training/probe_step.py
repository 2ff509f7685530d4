"""One rung's step for real, in the process that runs this module: `python -m pipeline.training.probe_step`.

Reads a `StepRequest` as JSON from standard input and answers with a `ProbedRung` as JSON on standard output. It must be
a process of its own: memory that an earlier step left behind, cached or fragmented, would change the answer, and an
error of a CUDA kernel spoils the process that it happens in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, TextIO

import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.artifacts import to_json
from pipeline.config import OptimConfig
from pipeline.errors import in_words
from pipeline.inference.streamed_labels import plan_label_memory, sliding_window_labels
from pipeline.inference.windows import SlidingWindow
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.out_of_memory import is_out_of_memory, let_go
from pipeline.networks.precision import autocast, choose_precision
from pipeline.networks.unet import UNet
from pipeline.plan import Plan, Precision, ProbedRung, Record, Rung
from pipeline.sizes import GIB
from pipeline.training.optim import make_optimizer
from pipeline.training.probe_memory import DeviceMemory, hold_to
from pipeline.training.processes import keep_freed_memory

NUM_OPTIMIZER_STEPS = 2
# More passes of an accumulation only repeat the second.
MOST_PASSES = 2


@dataclass(frozen=True, kw_only=True)
class StepRequest(Record):
    """What is to be run.

    Attributes:
        plan: Network, precision, optimiser and numbers of channels and classes.
        rung: Patch, batch, accumulation and execution, in place of the plan's own.
        device: Where.
        budget_bytes: What the step may take there; None for all there is.
    """

    plan: Plan
    rung: Rung
    device: Literal["cpu", "cuda"]
    budget_bytes: int | None


def main() -> None:
    """Answer one request."""
    answer_to = _own_standard_output()
    request = TypeAdapter(StepRequest).validate_json(sys.stdin.read())
    answer_to.write(to_json(probe_step(request)))
    answer_to.close()


def _own_standard_output() -> TextIO:
    """Standard output for the answer alone; what libraries print goes to standard error from here on."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def probe_step(request: StepRequest) -> ProbedRung:
    """Run the step under the budget; limits of this process are left as they were, its memory is not."""
    rung = request.rung
    try:
        _make_ready(request)
        memory = hold_to(request.device, request.budget_bytes)
    except Exception as error:
        # No step was run yet: a GPU without room for a context is held by others.
        is_busy = is_out_of_memory(error) or "busy or unavailable" in str(error)
        return ProbedRung(rung=rung, outcome="busy" if is_busy else "error", message=in_words(error))
    where = ""
    try:
        for where in run_step(request.plan, rung, request.device):  # noqa: B007
            pass
    except Exception as error:
        memory.lift()
        return _failed(error, where, rung, memory)
    memory.lift()
    return _ran(request, memory)


def _make_ready(request: StepRequest) -> None:
    """Set the process up as a training does; on a CPU, have libraries take what they take once and for all."""
    if request.device == "cuda":
        torch.backends.cudnn.benchmark = True
        return
    keep_freed_memory()
    # As in the meter's estimate for a CPU, and so that no thread is started under the limit.
    torch.set_num_threads(1)
    tiny = _tiny(request.plan)
    for _ in run_step(tiny, tiny.rung, "cpu"):
        pass


def _tiny(plan: Plan) -> Plan:
    """A plan of the same kind whose step takes next to nothing, but loads whatever is loaded on first use."""
    network = replace(
        plan.network,
        features_per_stage=(8, 8, 8),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((3, 3, 3),) * 3,
        num_blocks_per_stage=(1, 1, 1),
        num_decoder_blocks=1,
    )
    stages = {name: min(value, 2) for name, value in plan.execution._asdict().items()}
    return replace(plan, network=network, patch_size=(16, 16, 16), **stages, candidates=(), fallbacks=())


def _failed(error: Exception, where: str, rung: Rung, memory: DeviceMemory) -> ProbedRung:
    message = f"{where}: {in_words(error)}"
    # It holds the step's tensors.
    let_go(error)
    if not is_out_of_memory(error):
        return ProbedRung(rung=rung, outcome="error", message=message)
    return ProbedRung(
        rung=rung,
        outcome="busy" if memory.missing else "out of memory",
        measured_bytes=memory.measured_bytes(),
        allocated_bytes=memory.allocated_bytes(),
        message=f"{memory.missing}; {message}" if memory.missing else message,
    )


def _ran(request: StepRequest, memory: DeviceMemory) -> ProbedRung:
    """What a step came to that ran to its end; kernels that a GPU loaded meanwhile may have broken the budget."""
    measured, budget = memory.measured_bytes(), request.budget_bytes
    is_over = budget is not None and measured > budget
    message = f"it ran, but took {measured / GIB:.2f} GiB" if is_over else ""
    return ProbedRung(
        rung=request.rung,
        outcome="out of memory" if is_over else "fits",
        measured_bytes=measured,
        allocated_bytes=memory.allocated_bytes(),
        message=message,
    )


def run_step(plan: Plan, rung: Rung, device: Literal["cpu", "cuda"]) -> Iterator[str]:
    """Run a rung as a training does, yielding where it is before each part.

    Network, loss, optimiser, clipping and precision are those of a training, in the order of Lightning's automatic
    optimisation: gradients of the step before live through the first forward pass of the next one. The first optimiser
    step makes the optimiser's state, the second runs with it, and the window of a validation runs beside both, with its
    scores on the host. Values of images and labels are random.
    """
    yield "when the network was made"
    precision = choose_precision(plan.precision, device_type=device).precision
    network = make_probed_network(plan, rung).to(device)
    average = deepcopy(network).requires_grad_(False) if plan.ema else None
    step = _Step(network, plan, rung, precision, device)
    for number in range(1, NUM_OPTIMIZER_STEPS + 1):
        yield f"in optimiser step {number}"
        step.run()
    yield "in the validation window"
    validated = network if average is None else average
    with autocast(precision, device):
        image = step.images[0]
        sliding = SlidingWindow(window=rung.patch_size, num_classes=plan.num_classes, device=device)
        memory = plan_label_memory(validated, rung.patch_size, sliding, num_channels=plan.num_channels)
        sliding_window_labels(validated.eval(), image, sliding, memory)
    if device == "cuda":
        torch.cuda.synchronize()


def make_probed_network(plan: Plan, rung: Rung) -> UNet:
    """The network of a training with the plan, run as the rung says."""
    return UNet(plan.num_channels, plan.num_classes, plan.network, **rung.execution._asdict(), fused_head=True)


class _Step:
    """An optimiser step with all its passes; what lives from one to the next lives in here."""

    def __init__(
        self, network: UNet, plan: Plan, rung: Rung, precision: Precision, device: Literal["cpu", "cuda"]
    ) -> None:
        self.images = torch.randn(rung.batch_size, plan.num_channels, *rung.patch_size)
        self.labels = torch.randint(plan.num_classes, (rung.batch_size, *rung.patch_size), dtype=torch.int16)
        self._network, self._loss, self._optim = network.train(), make_loss(), OptimConfig(name=plan.optimizer)
        self._optimizer = make_optimizer(network, self._optim)
        self._scaler = torch.amp.GradScaler("cuda", enabled=precision == "16-mixed")
        self._num_passes = min(MOST_PASSES, rung.accumulate_grad_batches)
        self._precision, self._device = precision, device

    def run(self) -> None:
        for index in range(self._num_passes):
            self._run_pass(clear_gradients=index == 0)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._optim.gradient_clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _run_pass(self, *, clear_gradients: bool) -> None:
        images, labels = self.images.to(self._device), self.labels.to(self._device)
        with autocast(self._precision, self._device):
            value: Tensor = self._loss(self._network(images), labels) / self._num_passes
        if clear_gradients:
            self._optimizer.zero_grad()
        self._scaler.scale(value).backward()


if __name__ == "__main__":
    main()
