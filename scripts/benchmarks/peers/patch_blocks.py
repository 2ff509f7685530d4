"""Blocks of training patches, timed inside the process that makes them."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time


def take_block(make: Callable[[], int], num: int) -> dict[str, float]:
    """At least `num` patches: CPU and wall seconds, and how many they were.

    Args:
        make: Makes some patches and says how many.
        num: How many to make; at 0 nothing is made.
    """
    cpu, wall, made = process_time(), perf_counter(), 0
    while made < num:
        made += make()
    return {"cpu": process_time() - cpu, "wall": perf_counter() - wall, "patches": made}


def measure_memory() -> dict[str, int]:
    """Resident bytes now and at the most."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "now_bytes": pages * resource.getpagesize(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
