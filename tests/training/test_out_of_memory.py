"""Which errors are out-of-memory errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.training.out_of_memory import is_out_of_memory


def test_what_the_allocators_here_raise_is_recognised():
    for allocate in (lambda: torch.empty(2**60), lambda: np.empty(2**50, np.uint8), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 24 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried 9 bytes."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_form_that_torch_reports_is_recognised(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("DataLoader worker (pid 7) is killed: DefaultCPUAllocator: can't allocate memory"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: repr(error)[:40],
)
def test_other_errors_are_none_even_if_they_speak_of_memory(error):
    assert not is_out_of_memory(error)


def test_a_norm_that_has_one_value_at_batch_one_is_no_ceiling():
    """The error that a search for a batch size once took for one."""
    with pytest.raises(ValueError, match="more than 1 value") as raised:
        nn.BatchNorm3d(2)(torch.zeros(1, 2, 1, 1, 1))
    assert not is_out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as shapes:
        nn.Conv3d(1, 1, 3)(torch.zeros(1, 2, 4, 4, 4))
    assert not is_out_of_memory(shapes.value)
