"""What autocast means for code that chooses the dtypes of its operations itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a matrix product or convolution of a tensor is computed in: autocast's dtype where it is on, or its own."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) if dtype != torch.float64 else dtype
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast for a block; the meta device knows none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
