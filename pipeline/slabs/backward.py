"""What the backward passes of this project's autograd functions refuse, where torch would go on with wrong numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# What to do about a second pass over rows that a first one has freed.
ONE_PASS = "run forward and backward once each, or set slab_stages to 0"


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be differentiated itself.

    Torch's `once_differentiable` gives a second derivative of zero without a word where the incoming gradient is a
    constant, as that of a loss is.

    Raises:
        RuntimeError: The pass runs with `create_graph=True`.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("this function has no second derivative; leave out create_graph, or use the plain parts")
        return backward(ctx, *gradients)

    return refusing


def check_unchanged(ctx: Any) -> None:
    """See to it that the tensors saved for the backward pass still hold what the forward pass read.

    Raises:
        RuntimeError: One was changed in place; torch names it.
    """
    _ = ctx.saved_tensors


def take_once(ctx: Any, name: str) -> Any:
    """What a function kept under `name` for its backward pass; a loss that lives on then holds it no more.

    Raises:
        RuntimeError: The backward pass has run before.
    """
    kept = getattr(ctx, name)
    if kept is None:
        raise RuntimeError(f"a step in slabs frees its rows, so its backward pass can run only once; {ONE_PASS}")
    setattr(ctx, name, None)
    return kept
