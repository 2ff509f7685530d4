"""Recompute: keep a module's inputs instead of its activations and run its forward again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.errors import InputError


def recompute(module: nn.Module, *inputs: Any, preserve_rng_state: bool = False) -> Any:
    """Call `module` so that only its inputs are kept for the backward pass, which runs it a second time.

    Gradients are bitwise those of the plain call as long as the module is deterministic. Running statistics of batch
    norms are updated once only.

    Args:
        module: Any module; it must not itself contain recomputed modules.
        inputs: Its positional inputs.
        preserve_rng_state: Needed for modules that draw random numbers, such as dropout.
    """
    return _checkpoint(module, module, *inputs, preserve_rng_state=preserve_rng_state)


def _checkpoint(function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _SecondRun(module)),
        **kwargs,
    )


class _SecondRun:
    """Context of a module's forward in the backward pass; entered again for every further backward pass.

    Running statistics of batch norms are left alone. Parameters must be those that the first run read, which torch's
    checkpoint does not see to.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = _identities(module)
        self._kept: list[tuple[_BatchNorm, float | None, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        if _identities(self._module) != self._parameters:
            name = type(self._module).__name__
            raise RuntimeError(f"parameters of a recomputed {name} were changed between forward and backward pass")
        norms = [child for child in self._module.modules() if isinstance(child, _BatchNorm)]
        self._kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]
        for norm, *_ in self._kept:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, momentum, num_batches_tracked in self._kept:
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def _identities(module: nn.Module) -> list[tuple[int, int]]:
    """What tells a parameter that was replaced, or changed in place."""
    return [(id(parameter), parameter._version) for parameter in module.parameters()]


class _RecomputedForward:
    """Stands in for a module's `forward`; deep copies and pickles go with its module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = partial(type(self.module).forward, self.module)
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return _checkpoint(plain, self.module, *args, preserve_rng_state=True, **kwargs)


def recompute_modules(network: nn.Module, names: Iterable[str]) -> nn.Module:
    """Recompute the named modules of any network in the backward pass, in place; state_dict keys stay as they are.

    Args:
        network: A network a user brings.
        names: Module names as in `network.named_modules()`. Naming one again changes nothing.

    Returns:
        The same network.

    Raises:
        InputError: A name is unknown, or one recomputed module contains another: a nested one would run its forward
            more than twice. Or `names` is text instead of a list.
    """
    if isinstance(names, str):
        raise InputError(f'a list of module names is needed, such as ["{names}"]', where="recompute")
    modules = dict(network.named_modules())
    wanted = set(names)
    if unknown := sorted(wanted - set(modules)):
        raise InputError(f"the network has no module {', '.join(unknown)}", where="recompute")
    already = {name for name, module in modules.items() if isinstance(module.forward, _RecomputedForward)}
    _refuse_nesting(wanted | already)
    for name in sorted(wanted - already):
        modules[name].forward = _RecomputedForward(modules[name])
    return network


def _refuse_nesting(names: Collection[str]) -> None:
    for name in sorted(names):
        inner = [other for other in sorted(names) if other != name and (not name or other.startswith(f"{name}."))]
        if inner:
            raise InputError(
                f"{name or 'the network'} contains {', '.join(inner)}, and recomputation must not be nested",
                where="recompute",
                fix="Name either the outer or the inner modules",
            )
