"""The memory budget: from the text a person wrote, or from the device that is present."""

from __future__ import annotations

from math import ceil, floor

from pipeline.errors import InputError
from pipeline.sizes import GIB, parse_bytes

DEFAULT_BUDGET_BYTES = 8 * GIB


def parse_vram(text: str) -> int:
    """A memory budget in bytes from text such as "24GiB", "24GB", "24" or "512 MiB".

    Raises:
        InputError: The text is no positive amount of memory in a known unit.
    """
    num_bytes = parse_bytes(text)
    if not num_bytes:
        raise InputError(f'"{text}" is not an amount of memory', where="vram", fix="Write it as 24GiB, or auto")
    return num_bytes


def format_budget(num_bytes: int) -> str:
    """A budget in GiB, rounded down: beside a need above it, which `format_need` rounds up, the difference shows."""
    # 0.62 GiB is no whole number of bytes, and was rounded down once.
    return f"{floor(1000 * (num_bytes + 1) / GIB) / 1000:g} GiB"


def format_need(num_bytes: int) -> str:
    """What a step needs in GiB, rounded up."""
    return f"{ceil(1000 * num_bytes / GIB) / 1000:g} GiB"


def find_budget(vram: str) -> tuple[int, str]:
    """The memory budget in bytes and, where the machine decided, a sentence about it.

    Args:
        vram: An amount, or "auto".
    """
    return budget_from_device() if vram == "auto" else (parse_vram(vram), "")


def budget_from_device() -> tuple[int, str]:
    """The budget for `vram: auto` in bytes, and the sentence that says where it comes from."""
    import torch

    if not torch.cuda.is_available():
        sentence = (
            f"No GPU is present, so the budget is the default {DEFAULT_BUDGET_BYTES / GIB:.0f} GiB (--vram sets it)."
        )
        return DEFAULT_BUDGET_BYTES, sentence
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    total = int(device.total_memory)
    return total, f"The budget is all {total / GIB:.1f} GiB of the {device.name} that is present."


# What a device takes beside tensors. The context is what CUDA, cuDNN and the kernels of one process take: an H200 (CUDA
# 13.0, torch 2.11) gave 0.95 GiB to a step whose tensors are 0.11 GiB. The shares are of the tensors' peak, for
# workspaces of convolutions and for what the caching allocator cannot hand out again in one piece; with activations
# channels last it held 3.83 GiB there for tensors of 3.92, with torch's own norms 5.13 (docs/benchmarks.md).
CONTEXT_BYTES = int(0.85 * GIB)
WORKSPACE_SHARE = 0.05
FRAGMENTATION_SHARE = 0.05


def estimate_overhead_bytes(peak_bytes: int) -> int:
    """What a device adds to `peak_bytes` of tensors: an estimate, compared with two steps on one GPU so far."""
    return CONTEXT_BYTES + int(peak_bytes * (WORKSPACE_SHARE + FRAGMENTATION_SHARE))
