"""How kernels are given tensors: channels last, or as a pointer and strides with all voxels as one axis."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The tensor's GPU as the one that kernels are started on; nothing for a CPU, where tests interpret them."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def channels_last(x: Tensor) -> Tensor:
    """X (N, C, I, J, K) channels last, by its strides too where one channel makes both formats the same."""
    if x.shape[1] == 1 and x.is_contiguous():
        count = math.prod(x.shape[2:])
        return x.as_strided(x.shape, (count, 1, *x.stride()[2:]))
    return x.contiguous(memory_format=torch.channels_last_3d)


def flat_voxels(x: Tensor) -> Tensor:
    """X (B, C, I, J, K) as (B, C, V): a view in both memory formats, a copy of anything else."""
    try:
        return x.view(*x.shape[:2], -1)
    except RuntimeError:
        return x.contiguous(memory_format=torch.channels_last_3d).view(*x.shape[:2], -1)


def strided(tensor: Tensor) -> tuple[Tensor | int, ...]:
    """What a kernel takes for a tensor."""
    return tensor, *tensor.stride()


def power_of_two(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()
