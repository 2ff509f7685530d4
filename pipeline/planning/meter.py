"""How much memory a training step takes, found by running that very step on tensors without storage.

Works for any network, loss and optimiser, needs no GPU and allocates nothing. What it counts are tensor storages; what
a GPU adds to them is estimated in `pipeline.planning.budget`. Shapes: images (B, C, I, J, K), targets (B, I, J, K).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.plan import Precision
from pipeline.planning.cuda_autocast import cuda_autocast_rules
from pipeline.planning.fake_kernels import MeterFakeMode, fake_copy
from pipeline.planning.step_errors import check_choice, told_as_input_error
from pipeline.planning.storages import StorageCounter

if TYPE_CHECKING:
    from typing_extensions import Unpack

Loss = Callable[[Any, Tensor], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
OptimizerName = Literal["sgd", "adamw"]

# What autocast computes in; None is no autocast.
HALF_OF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}

PARTS = ("parameters", "gradients", "optimizer", "input", "activations", "head", "working")


@dataclass(frozen=True)
class StepMemory:
    """The metered peak of one training step.

    Attributes:
        peak_bytes: Most bytes of tensor storages that were live on the device at one time.
        parts: Bytes at that moment by what holds them, all of `PARTS`; they add up to `peak_bytes`. "parameters" are
            weights and buffers, "activations" what the network's forward pass left for the backward pass,
            half-precision weights included, "head" the logits of every output and what the loss left for its backward
            pass, and "working" everything that comes and goes inside a pass.
        host_bytes: Most bytes of host buffers that were live at one time, for what is offloaded.
        pinned_bytes: What these take of pinned memory with a GPU, where blocks are powers of two.
        process_bytes: Most bytes by which the step makes a process on a CPU grow, estimated for one thread and glibc:
            tensors, host buffers, what convolutions allocate inside themselves
            (`pipeline.networks.convolution_workspace`), and freed blocks that the C library keeps
            (`pipeline.planning.storages`). None for a GPU.
    """

    peak_bytes: int
    parts: dict[str, int]
    host_bytes: int = 0
    pinned_bytes: int = 0
    process_bytes: int | None = None


class StepOptions(TypedDict, total=False):
    """How a step is run.

    Attributes:
        precision: As in the plan ("bf16-mixed" where it is left out); the mixed ones run under autocast.
        optimizer: "sgd" (with momentum, the default), "adamw", or a function that makes one from the parameters.
        accumulate_grad_batches: Above one (the default), gradients of earlier iterations are live during a step.
    """

    precision: Precision
    optimizer: OptimizerName | MakeOptimizer
    accumulate_grad_batches: int


def meter_step(
    network: nn.Module,
    loss: Loss,
    *,
    patch_size: Shape3,
    in_channels: int,
    batch_size: int = 1,
    device_type: Literal["cpu", "cuda"] = "cuda",
    **options: Unpack[StepOptions],
) -> StepMemory:
    """Meter one training step (forward, loss, backward, optimiser) without allocating anything.

    Where the kernels of a GPU keep other things than those of a CPU, the CPU's are counted: dropout's mask is as wide
    as its input instead of one byte.

    Args:
        network: Any network; neither changed nor run. It may lie on any device, "meta" included.
        loss: Called with the network's output and a target (B, I, J, K) of int64 class indices.
        patch_size: I, J, K.
        in_channels: C.
        batch_size: B.
        device_type: Whose autocast rules operators follow: which of them run in half precision, and which in float32.
        options: As for `StepOptions`.

    Raises:
        InputError: An option is wrong, or the step fails: the network or the loss does not take such a patch, or
            branches on values of tensors, which fake ones do not have.
    """
    check_choice("device_type", device_type, ("cpu", "cuda"))
    with (
        told_as_input_error(network, patch_size=patch_size, in_channels=in_channels, batch_size=batch_size),
        MeterFakeMode(allow_non_fake_inputs=True),
        _rules_of(device_type),
    ):
        memory = count_step(
            fake_copy(network),
            fake_copy(loss) if isinstance(loss, nn.Module) else loss,
            torch.empty(batch_size, in_channels, *patch_size),
            torch.zeros(batch_size, *patch_size, dtype=torch.int64),
            **options,
        )
    return memory if device_type == "cpu" else replace(memory, process_bytes=None)


def count_step(
    network: nn.Module,
    loss: Loss,
    images: Tensor,
    targets: Tensor,
    *,
    precision: Precision = "bf16-mixed",
    optimizer: OptimizerName | MakeOptimizer = "sgd",
    accumulate_grad_batches: int = 1,
) -> StepMemory:
    """Run and count a training step on CPU tensors, real or fake; the network is trained by it.

    It is the step that every later one repeats: the optimiser has its state, and gradients of the step before are
    there. Both come from an optimiser step on gradients of zero, which is counted too.

    Args: as for `meter_step` and `StepOptions`, with the batch itself instead of its sizes.

    Raises:
        InputError: An option is unknown, or nothing of the network is trained.
    """
    counter = StorageCounter()
    counter.claim([*network.parameters(), *network.buffers()], "parameters")
    counter.claim([images, targets], "input")
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("no parameter requires a gradient, so there is no training step", where=type(network).__name__)
    step = _CountedStep(counter, network.train(), loss, _make_optimizer(optimizer, parameters), _autocast(precision))
    with ExitStack() as stack:
        for parameter in parameters:
            handle = parameter.register_post_accumulate_grad_hook(step.claim_gradient)
            stack.callback(handle.remove)
        stack.enter_context(counter)
        step.make_state(parameters)
        step.run(images, targets, clear_gradients=accumulate_grad_batches == 1)
        if step.forget_state_of_unused(parameters):
            step.run(images, targets, clear_gradients=accumulate_grad_batches == 1)
    parts = counter.peak_parts()
    return StepMemory(
        counter.peak_bytes,
        {part: parts.get(part, 0) for part in PARTS},
        host_bytes=counter.peak_host_bytes,
        pinned_bytes=counter.peak_pinned_bytes,
        process_bytes=counter.peak_process_bytes,
    )


@dataclass(frozen=True)
class _CountedStep:
    counter: StorageCounter
    network: nn.Module
    loss: Loss
    optimizer: Optimizer
    autocast: AbstractContextManager[Any]
    used: set[int] = field(default_factory=set)

    def make_state(self, parameters: list[nn.Parameter]) -> None:
        """Give the optimiser its state and the parameters gradients, as an iteration before would have."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.counter.claim((parameter.grad for parameter in parameters if parameter.grad is not None), "gradients")
        self._step()

    def forget_state_of_unused(self, parameters: list[nn.Parameter]) -> bool:
        """Drop what parameters without a part in the loss never have; whether there were any."""
        unused = [parameter for parameter in parameters if id(parameter) not in self.used]
        for parameter in unused:
            parameter.grad = None
            self.optimizer.state.pop(parameter, None)
        if unused:
            self.counter.restart_peak()
        return bool(unused)

    def run(self, images: Tensor, targets: Tensor, *, clear_gradients: bool) -> None:
        """One iteration in the order of Lightning's automatic optimisation: old gradients live through the forward."""
        self.counter.part = "working"
        with self.autocast:
            value = self._forward(images, targets)
        if clear_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self._step()

    def claim_gradient(self, parameter: Tensor) -> None:
        """Hook for when a parameter's gradient is complete."""
        self.used.add(id(parameter))
        if parameter.grad is not None:
            self.counter.claim([parameter.grad], "gradients")

    def _step(self) -> None:
        self.optimizer.step()
        state = (value for values in self.optimizer.state.values() for value in values.values())
        self.counter.claim((value for value in state if isinstance(value, Tensor)), "optimizer")

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        outputs = self.network(images)
        self.counter.claim_live(made_as="working", part="activations")
        logits = (leaf for leaf in tree_iter(outputs) if isinstance(leaf, Tensor))
        self.counter.claim(logits, "head", made_as="activations")
        value = self.loss(outputs, targets)
        self.counter.claim_live(made_as="working", part="head")
        return value


def _rules_of(device_type: Literal["cpu", "cuda"]) -> AbstractContextManager[None]:
    return cuda_autocast_rules() if device_type == "cuda" else nullcontext()


def _autocast(precision: Precision) -> AbstractContextManager[Any]:
    check_choice("precision", precision, HALF_OF)
    dtype = HALF_OF[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _make_optimizer(optimizer: OptimizerName | MakeOptimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """The foreach kinds, as PyTorch takes them by default on GPUs: they work on all parameters at once."""
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5, foreach=True)
    if optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.001, foreach=True)
    if not callable(optimizer):
        raise InputError(f'"{optimizer}" is neither sgd, adamw nor a function of parameters', where="optimizer")
    return optimizer(parameters)
