"""Threads that put windows through a network side by side on a CPU, each window on its own core.

Splitting every convolution over the cores lets all of them wait for the slowest one at each of some hundred layers,
and a core that another process has taken just then holds up all of them. Windows do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from pipeline.parallel import map_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")


class WindowThreads:
    """As many threads as windows may be in a network at once, whichever volumes they belong to.

    torch's own number of threads has to be set before, see `cores_per_window`: it is that of each window.

    Args:
        count: Threads.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="window")

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
        """Results in the order of the items, see `map_ahead`; the caller's precision is that of the threads.

        Args:
            function: Called in the threads.
            items: What for.
            ahead: Most items that are begun and not yet taken.
        """
        return map_ahead(_as_here(function), items, self._pool, ahead=ahead)


def _as_here(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """The function with the caller's autocast, which belongs to a thread, and without gradients."""
    is_enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(item: Item) -> Result:
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=is_enabled):
            return function(item)

    return run


def cores_per_window(num_threads: int, window_batch: int) -> int:
    """Threads that torch may take for each window, so that all of them together take no more than allowed."""
    return max(1, num_threads // window_batch)
