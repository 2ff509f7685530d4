"""Which errors are out-of-memory errors."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import InputError
from pipeline.networks.out_of_memory import is_out_of_memory, is_worker_out_of_memory
from pipeline.training.probe_memory import hold_to


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
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 123 bytes from file </run/last.ckpt>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(
            "Caught AcceleratorError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n"
            '  File "pin_memory.py", line 40\ntorch.AcceleratorError: CUDA error: out of memory\n'
        ),
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
        MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory.nii: shape mismatch"),
        RuntimeError("/data/CUDA error: out of memory.nii is torn"),
        RuntimeError("torn: /data/CUDNN_STATUS_ALLOC_FAILED.nii"),
        RuntimeError("unable to mmap 123 bytes from file </run/last.ckpt>: Permission denied (13)"),
        OSError(errno.EIO, "Input/output error"),
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


def test_an_error_that_was_raised_from_an_out_of_memory_is_one():
    error = InputError("is no readable checkpoint")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def test_an_out_of_memory_while_weights_are_loaded_is_told_by_what_torch_quotes(monkeypatch):
    def fail(self: Tensor, *_) -> Tensor:
        return torch.empty(2**60)

    network = nn.Linear(2, 2)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    monkeypatch.setattr(Tensor, "copy_", fail)
    with pytest.raises(RuntimeError, match="While copying the parameter") as raised:
        network.load_state_dict(state)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("what", ["create a primitive", "create a memory object", "execute a primitive"])
def test_what_onednn_cannot_do_is_an_out_of_memory_only_where_memory_is_short(what):
    error = RuntimeError(f"could not {what}")
    assert not is_out_of_memory(error)
    limit = hold_to("cpu", 2**25)
    try:
        found = is_out_of_memory(error)
    finally:
        limit.lift()
    assert found


@pytest.mark.parametrize(
    "said",
    [
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_what_cudnn_and_cublas_cannot_do_is_an_out_of_memory_only_on_a_gpu_that_is_all_but_full(said, monkeypatch):
    def spoilt() -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    answers = {"full": lambda: (2**27, 2**34), "half full": lambda: (2**33, 2**34), "spoilt": spoilt}
    found = {}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", answer)
        found[name] = is_out_of_memory(RuntimeError(said))
    assert found == {"full": True, "half full": False, "spoilt": False}


CONVOLUTIONS = """
import torch
from pipeline.networks.out_of_memory import is_out_of_memory, let_go
from pipeline.training.probe_memory import hold_to
from pipeline.training.processes import give_freed_memory_back, keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def step(size):
    layers = torch.nn.Sequential(torch.nn.Conv3d(1, 16, 3, padding=1), torch.nn.Conv3d(16, 16, 3, padding=1))
    layers(torch.randn(2, 1, size, size, size)).sum().backward()
step(8)
for mib in range(4, 160, 12):
    give_freed_memory_back()
    limit = hold_to("cpu", mib * 2**20)
    try:
        step(48)
    except Exception as error:
        print(is_out_of_memory(error), str(error).splitlines()[0])
        let_go(error)
    limit.lift()
"""


def test_whatever_convolutions_say_on_a_cpu_without_enough_memory_is_an_out_of_memory():
    done = subprocess.run([sys.executable, "-c", CONVOLUTIONS], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines
    assert all(line.startswith("True") for line in lines), lines
    assert any("could not create a primitive" in line for line in lines), lines


class Raises(Dataset):
    """Raises where an item is asked for."""

    def __init__(self, raise_error: Callable[[], object]) -> None:
        self.raise_error = raise_error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return self.raise_error()


def raise_memory_error() -> None:
    raise MemoryError


def raise_another() -> None:
    raise RuntimeError("shape mismatch in the store of case MemoryError")


@pytest.mark.parametrize(
    ("raise_error", "expected"),
    [
        (raise_memory_error, True),
        (lambda: np.empty(2**50, np.uint8), True),
        (lambda: torch.empty(2**60), True),
        (raise_another, False),
    ],
)
def test_what_a_data_worker_lacks_is_none_of_the_training(raise_error, expected):
    with pytest.raises((RuntimeError, MemoryError), match="in DataLoader worker process 0") as raised:
        next(iter(DataLoader(Raises(raise_error), num_workers=1)))
    assert not is_out_of_memory(raised.value)
    assert is_worker_out_of_memory(raised.value) == expected
