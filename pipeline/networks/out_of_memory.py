"""Whether an error says that memory ran out, what it says, and how to be rid of what it keeps alive."""

from __future__ import annotations

import errno
import mmap
import re
import traceback

import psutil
import torch

# Texts stand where torch puts them: in front of a line, after the type in a quoted traceback, or quoted by
# `load_state_dict`, which keeps neither type nor cause. A file may have any of them as its name.
_STARTS = r"^(?:[\w.]+Error: |.*an exception occurred : \(['\"])?(?:{})"
# PyTorch has a type of its own for the CUDA allocator only; every other allocation that fails is a RuntimeError.
_SIGNS = (
    # The CPU allocator, by operating system, and C++ itself.
    r"(?:\[enforce fail at alloc_cpu\.cpp:\d+\] .*)?DefaultCPUAllocator: (?:can't allocate|not enough) memory",
    r"std::bad_alloc",
    # A file, or memory shared with a data worker, that is mapped: ENOMEM is 12.
    r"unable to mmap \d+ bytes from file <.*>: .*\(12\)",
    r"OSError: \[Errno 12\]",
    # Libraries that allocate on their own; cuDNN 9 has names for device and host.
    r"cuDNN (?:Frontend )?error: .*(?:CUDNN_STATUS_ALLOC_FAILED|(?:DEVICE|HOST)_ALLOCATION_FAILED)",
    r"CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    # The driver, asked past the allocator: pinned host memory, a context, a graph.
    r"CUDA (?:driver )?error: out of memory(?![.\w])",
    r"CUDA out of memory\. Tried to allocate",
)
_IS_SIGN = re.compile(_STARTS.format("|".join(_SIGNS)), re.MULTILINE)
# What oneDNN says of everything that keeps it from a scratchpad or a copy in its own layout.
_MAYBE_ON_HOST = re.compile(_STARTS.format("could not (?:create|execute) a (?:primitive|memory)"), re.MULTILINE)
# What is left to say when no engine of cuDNN found room for its workspace, or cuBLAS none for its handle.
_MAYBE_ON_GPU = re.compile(
    _STARTS.format(
        r"(?:FIND|GET) was unable to find an engine|Unable to find a valid cuDNN algorithm"
        r"|CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"
    ),
    re.MULTILINE,
)
# cuDNN has engines that need next to no workspace, so nothing but an all but full GPU can be why none was found.
SHORT_SHARE_OF_GPU = 0.1
_IN_WORKER = "in DataLoader worker process"
_WORKER_ERROR = re.compile(rf"^Caught \w*MemoryError {_IN_WORKER}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a true out-of-memory of the GPU or of the host, or was raised from one.

    A shape that does not fit, a norm that has a single value, a missing kernel and a killed data worker are none: read
    as a ceiling they would send a search or a training down a ladder for nothing. Errors of data workers are none
    either, whatever they were: no smaller step helps a worker. Errors that may have any reason are one where memory is
    short, so this has to be asked before what the error keeps alive is let go.
    """
    text = str(error)
    if "DataLoader worker" in text:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and (_IS_SIGN.search(text) or _is_one_where_memory_is_short(text)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _is_one_where_memory_is_short(text: str) -> bool:
    if _MAYBE_ON_HOST.search(text):
        return _is_host_short()
    return bool(_MAYBE_ON_GPU.search(text)) and _is_gpu_short()


def _is_host_short() -> bool:
    """Whether the system refuses this process as much again as it holds.

    What failed was refused what it asked for, which is seldom more than all that is held, and freed blocks stay with
    the C library, so that there is no more room now than there was then. Nothing is touched, so it costs nothing, and
    is refused under a limit (or strict overcommit) only. Private, as what is allocated: only that is limited.
    """
    try:
        held = psutil.Process().memory_info().rss
        mmap.mmap(-1, held, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return True
    return False


def _is_gpu_short() -> bool:
    """Whether next to nothing of the GPU is free, apart from what the allocator caches, which it gave back first."""
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):
        # There is none, or an earlier error has spoilt it.
        return False
    return free < SHORT_SHARE_OF_GPU * total


def is_worker_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what the training process gets when a data worker runs out of host memory."""
    text = str(error)
    return _IN_WORKER in text and bool(_WORKER_ERROR.search(text) or _IS_SIGN.search(text))


def let_go(error: BaseException) -> None:
    """Drop the tensors that an error keeps alive by the frames that it came through, and those of its causes."""
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and each.__traceback__ is not None:
            traceback.clear_frames(each.__traceback__)
            each.__traceback__ = None
            pending += [each.__cause__, each.__context__]
