"""What a process may take of a device's memory, and what it took: for a probe, in a process of its own."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import torch

from pipeline.planning.budget import CONTEXT_BYTES
from pipeline.sizes import GIB

# A fresh process that uses more than this of a GPU before its step is not alone there.
MOST_CONTEXT_BYTES = 2 * CONTEXT_BYTES
_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class DeviceMemory(Protocol):
    """A device's memory under a budget.

    Attributes:
        missing: Why the device does not have the whole budget for this process, in words; "" where it has.
    """

    missing: str

    def measured_bytes(self) -> int:
        """Most bytes that the process held at one time since the budget was set."""
        ...

    def allocated_bytes(self) -> int:
        """Most of these bytes that were in tensors; 0 where that is not known."""
        ...

    def lift(self) -> None:
        """Take the limit away, so that what happened can be told."""
        ...


def hold_to(device: Literal["cpu", "cuda"], budget_bytes: int | None) -> DeviceMemory:
    """Limit this process to a budget on a device, as if the device had no more; None sets no limit.

    Raises:
        RuntimeError: The device cannot be used.
    """
    return CudaMemory(budget_bytes) if device == "cuda" else ProcessMemory(budget_bytes)


class CudaMemory:
    """The current GPU: the budget holds what the allocator reserves and the process's context.

    The limit is the allocator's own (`set_per_process_memory_fraction`), so that an allocation beyond it first gives
    back what is cached and then fails as it would on a full GPU. The context is not the allocator's; what the driver
    counts beyond reserved memory is taken for it, where it is not too much for one.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        reserved, context = torch.cuda.memory_reserved(), context_bytes()
        self._of_others = total - free - reserved - context
        # Kernels are loaded into the context as they are first called, so it still grows.
        budget = total if budget_bytes is None else min(budget_bytes, total)
        allowed = max(0, budget - max(CONTEXT_BYTES, context))
        has_room = free + reserved >= allowed
        self.missing = "" if has_room else f"other processes hold {self._of_others / GIB:.1f} GiB of the GPU"
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        torch.cuda.reset_peak_memory_stats()

    def measured_bytes(self) -> int:
        """Most that the allocator reserved, and the context as it is now."""
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved() - self._of_others
        return torch.cuda.max_memory_reserved() + max(0, context)

    def allocated_bytes(self) -> int:
        """Most that was in tensors."""
        return torch.cuda.max_memory_allocated()

    def lift(self) -> None:
        """Nothing is in the way: answers are made on the host."""


def context_bytes() -> int:
    """What this process takes of the current GPU beside its allocator.

    That is all that the driver counts, or where it is too much for one process, because others use the GPU too, the
    estimate that plans are made with.
    """
    free, total = torch.cuda.mem_get_info()
    used = total - free - torch.cuda.memory_reserved()
    return used if used <= MOST_CONTEXT_BYTES else CONTEXT_BYTES


class ProcessMemory:
    """This process on a CPU (Linux): the budget holds what it takes beyond what it holds now.

    The limit is the kernel's on private writable memory (`RLIMIT_DATA`); the peak is that of resident memory, which is
    reset first.
    """

    missing = ""

    def __init__(self, budget_bytes: int | None) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_DATA)
        # Where the kernel does not reset it, the peak of the imports hides some of what comes.
        with suppress(OSError):
            _CLEAR_PEAK.write_text("5")
        self._before = _status_bytes("VmHWM")
        if budget_bytes is not None:
            hard, wanted = self._limits[1], _status_bytes("VmData") + budget_bytes
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

    def measured_bytes(self) -> int:
        """Growth of the peak of resident memory."""
        return max(0, _status_bytes("VmHWM") - self._before)

    def allocated_bytes(self) -> int:
        """Not known."""
        return 0

    def lift(self) -> None:
        """Put the limits back that the process had."""
        resource.setrlimit(resource.RLIMIT_DATA, self._limits)


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the kernel does not tell {name} of a process")
    return int(found[1]) * 1024
