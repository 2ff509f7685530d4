"""How the allotted CPUs are shared between the network's threads and the data workers."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch

from pipeline.allocation import allotted_cpus, network_threads, resolve_num_workers
from pipeline.sizes import MIB
from pipeline.stop_signals import STOP_SIGNALS, end_with

CPUS_PER_WORKER = 4
MAX_WORKERS = 16
PREFETCH_FACTOR = 2
WORKER_BYTES = 300 * MIB
COPIES_PER_PATCH = 4
# Options of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# A step on a CPU waits for its slowest thread, so a worker must not take a core from one; 10 is what `nice` adds.
NICENESS_BESIDE_CPU_NETWORK = 10


class Processes(NamedTuple):
    """Threads of the network on a CPU, and data worker processes."""

    num_threads: int
    num_workers: int


def share_cpus(*, num_threads: int | str, num_workers: int | str, on_gpu: bool, batch_bytes: int) -> Processes:
    """The options themselves, or for "auto" a share of the CPUs that this job was allotted.

    On a GPU every CPU but one makes patches, 16 at most. On a CPU the network takes all of them and is far slower than
    a worker, so one worker is added for every four threads (one at least); threads that are given by hand leave the
    remaining CPUs to workers, those that OMP_NUM_THREADS forbids leave them idle. Workers are fewer where their patches
    would not fit into memory.

    Args:
        num_threads: Option `hardware.num_threads`.
        num_workers: Option `hardware.num_workers`; 0 makes patches in the training process itself.
        on_gpu: Whether the network runs on a GPU.
        batch_bytes: Bytes of one batch of images and labels.
    """
    cpus = allotted_cpus()
    threads, taken = (network_threads(), cpus) if num_threads == "auto" else (int(num_threads), int(num_threads))
    if num_workers != "auto":
        return Processes(threads, int(num_workers))
    wanted = cpus - 1 if on_gpu else max(cpus - taken, taken // CPUS_PER_WORKER)
    bytes_per_worker = WORKER_BYTES + (PREFETCH_FACTOR + COPIES_PER_PATCH) * batch_bytes
    affordable = resolve_num_workers("auto", bytes_per_worker=bytes_per_worker)
    return Processes(threads, max(1, min(wanted, affordable, MAX_WORKERS)))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block, and what it used before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step instead of giving it back to the system each time.

    A training step on a CPU frees and takes the same blocks over and over, and every return costs page faults. Does
    nothing where the C library is not glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Setting any option ends glibc's own adaptation, and older releases refuse a threshold above 32 MiB.
        libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_freed_memory_back() -> None:
    """Let the C library give back what it keeps, and from here on every large block as soon as it is freed.

    The end of `keep_freed_memory`, for a process that has run short: small blocks that live on keep the free ones
    between them from going back to the system, where libraries ask for code, mapped files and stacks of threads. Costs
    the page faults that were spared before: up to the time of the step itself for a small network.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**20)
        libc.malloc_trim(0)


def prepare_worker(_: int, *, niceness: int = 0, parent: int | None = None) -> None:
    """Set up a data worker: one thread, and signals are left to the training process, which ends its workers itself.

    SLURM sends its signals to all processes of a job, and a training that is to finish its step needs its workers.

    Args:
        niceness: By how much it gives way to others, as for `os.nice`.
        parent: The process that the worker is to end with.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if parent is not None:
        end_with(parent)
    os.nice(niceness)
    torch.set_num_threads(1)
