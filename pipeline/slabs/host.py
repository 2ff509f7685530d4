"""Host memory beside a device: buffers that hold what the device has no room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ALLOCATING: ContextVar[bool] = ContextVar("allocating_on_host", default=False)


def allocate_on_host(like: Tensor) -> Tensor:
    """An empty contiguous tensor in host memory, pinned where `like` is on a GPU, so that copies are not waited for."""
    with _allocating():
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda")


def is_allocating_on_host() -> bool:
    """Whether `allocate_on_host` is at work; a meter of device memory counts what is made then apart."""
    return _ALLOCATING.get()


@contextmanager
def _allocating() -> Iterator[None]:
    token = _ALLOCATING.set(True)
    try:
        yield
    finally:
        _ALLOCATING.reset(token)
