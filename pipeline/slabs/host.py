"""Host memory beside a device: buffers that hold what the device has no room for."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ALLOCATING: ContextVar[bool] = ContextVar("allocating_on_host", default=False)

# Torch rounds a pinned block up to a power of two, so several buffers share one where that leaves less over. Blocks are
# not larger than need be, because the last one is seldom full.
LARGEST_SHARED_BLOCK = 2**32
MOST_BUFFERS_PER_BLOCK = 16
MOST_LEFT_OVER = 1 / 16


class BufferPool:
    """Host buffers that are used again as soon as they are given up, and not when the device has caught up.

    All copies of a step are queued in one stream, so what is written into a buffer next cannot overtake what was read
    from it last. Torch's own pool of pinned memory waits for the device instead, and pins anew as long as the host is
    ahead of it.

    Args:
        pin_memory: For a GPU.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self.pin_memory = pin_memory
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An empty contiguous tensor; its memory comes back when the tensor is gone."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        free = self._free[num_bytes]
        if not free:
            number = buffers_per_block(num_bytes)
            block = torch.empty(number * num_bytes, dtype=torch.uint8, pin_memory=self.pin_memory)
            free.extend(block.split(num_bytes))
        buffer = free.pop()
        tensor = buffer.view(dtype).view(shape)
        weakref.finalize(tensor, free.append, buffer).atexit = False
        return tensor

    def clear(self) -> None:
        """Let go of all buffers that are not in use."""
        for free in self._free.values():
            free.clear()


def buffers_per_block(num_bytes: int) -> int:
    """How many buffers of a size are allocated at once: the fewest that leave little of a power of two over."""
    most = max(1, min(MOST_BUFFERS_PER_BLOCK, LARGEST_SHARED_BLOCK // max(num_bytes, 1)))

    def left_over(number: int) -> float:
        return 1 - number * num_bytes / _power_of_two(number * num_bytes)

    numbers = range(1, most + 1)
    return next((number for number in numbers if left_over(number) <= MOST_LEFT_OVER), min(numbers, key=left_over))


def pinned_bytes(num_buffers: int, num_bytes: int) -> int:
    """What so many buffers of a size that are live at one time take of pinned memory."""
    number = buffers_per_block(num_bytes)
    return -(-num_buffers // number) * _power_of_two(number * num_bytes)


def _power_of_two(num_bytes: int) -> int:
    return 1 << max(num_bytes - 1, 0).bit_length()


_PINNED = BufferPool(pin_memory=True)


def allocate_on_host(like: Tensor) -> Tensor:
    """An empty contiguous tensor in host memory, pinned where `like` is on a GPU, so that copies are not waited for."""
    with _allocating():
        if like.device.type == "cuda":
            return _PINNED.take(like.shape, like.dtype)
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def release_host_buffers() -> None:
    """Let go of pinned buffers that are not in use; torch gives their memory back where its own pool is emptied."""
    _PINNED.clear()


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
