"""Whether an error says that memory ran out, what it says, and how to be rid of what it keeps alive."""

from __future__ import annotations

import traceback

import torch

# PyTorch has a type of its own for the CUDA allocator only; every other allocation that fails is a RuntimeError.
SIGNS = (
    # The CPU allocator, by operating system.
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    # Libraries that allocate on their own; cuDNN 9 has names for device and host.
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    # The driver, asked past the allocator: pinned host memory, a context, a graph.
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)

MAX_ERROR_LENGTH = 300


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a true out-of-memory of the GPU or of the host.

    A shape that does not fit, a norm that has a single value, a missing kernel and a killed data worker are none: read
    as a ceiling they would send a search or a training down a ladder for nothing. Errors of data workers are none
    either, whatever they were: no smaller step helps a worker.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "DataLoader worker" not in text and any(sign in text for sign in SIGNS)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:MAX_ERROR_LENGTH] if lines else type(error).__name__


def let_go(error: BaseException) -> None:
    """Drop the tensors that an error keeps alive by the frames that it came through, and those of its causes."""
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None
            pending += [each.__cause__, each.__context__]
