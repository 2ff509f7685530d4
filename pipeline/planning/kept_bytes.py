"""Which modules of a network keep the most for the backward pass, found on tensors without storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from pipeline.geometry import Shape3
from pipeline.planning.fake_kernels import MeterFakeMode, fake_copy
from pipeline.planning.step_errors import told_as_input_error
from pipeline.planning.storages import StorageCounter

# A module that keeps more than this share of everything would, run again, take nearly the memory of the whole network:
# its parts are looked at instead.
LARGEST_SHARE = 0.5
SMALLEST_SHARE = 0.01


@dataclass
class _Call:
    """A call of a module: what it left alive beside its outputs, and the calls inside it."""

    module: nn.Module | None
    bytes_before: int = 0
    kept_bytes: int = 0
    inner: list[_Call] = field(default_factory=list)


def propose_recompute(network: nn.Module, *, in_channels: int, patch_size: Shape3) -> tuple[str, ...]:
    """Names of modules worth recomputing, the one that keeps most first; none of them holds another.

    Args:
        network: Any network that runs on fake tensors; neither changed nor run.
        in_channels: C.
        patch_size: I, J, K; shares hardly depend on it.

    Raises:
        InputError: The network does not take such a patch, or branches on values of tensors.
    """
    root = _Call(None)
    with (
        told_as_input_error(network, patch_size=patch_size, in_channels=in_channels),
        MeterFakeMode(allow_non_fake_inputs=True),
        StorageCounter() as counter,
    ):
        fake = fake_copy(network).train()
        names = {id(module): name for name, module in fake.named_modules()}
        _record_calls(fake, counter, root)
        outputs = fake(torch.empty(1, in_channels, *patch_size))
    del outputs
    total = sum(call.kept_bytes for call in root.inner)
    kept: dict[str, int] = {}
    for call in _units(root, total):
        name = names[id(call.module)]
        kept[name] = kept.get(name, 0) + call.kept_bytes
    worth = [name for name, num_bytes in kept.items() if num_bytes > SMALLEST_SHARE * total]
    return tuple(sorted(worth, key=lambda name: -kept[name]))


def _units(call: _Call, total: int) -> Iterator[_Call]:
    for inner in call.inner:
        if inner.inner and inner.kept_bytes > LARGEST_SHARE * total:
            yield from _units(inner, total)
        else:
            yield inner


def _record_calls(network: nn.Module, counter: StorageCounter, root: _Call) -> None:
    """Hang the calls of every module below `root`, as they are nested in the forward pass."""
    stack = [root]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(_Call(module, counter.live_bytes))
        stack[-2].inner.append(stack[-1])

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        call = stack.pop()
        given = {tensor.untyped_storage()._cdata for tensor in _tensors(inputs)}
        made = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _tensors(outputs)}
        out_bytes = sum(num_bytes for key, num_bytes in made.items() if key not in given)
        call.kept_bytes = max(0, counter.live_bytes - call.bytes_before - out_bytes)

    for module in network.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor)]
