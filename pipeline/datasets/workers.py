"""How many processes are worth starting to read files."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from pipeline.allocation import allotted_memory_bytes
from pipeline.errors import InputError
from pipeline.io.image_file import read_layout, size_on_disk
from pipeline.sizes import MIB

# So little is read in one process before others have imported what they need.
FEW_BYTES = 64 * MIB
# The voxels of the file, their float32 copy, the label and masks.
BYTES_PER_VOXEL = 16


def sensible_workers(files: Iterable[Path], num_workers: int) -> int:
    """At most `num_workers`: one for little work, and no more than memory has room for the largest file.

    Args:
        files: What is to be read; files that are missing do not count.
        num_workers: The user's or the machine's limit.
    """
    sizes = {path: size_on_disk(path) for path in files}
    if num_workers <= 1 or sum(sizes.values()) < FEW_BYTES:
        return 1
    try:
        layout = read_layout(max(sizes, key=lambda path: sizes[path]))
    except InputError:
        return num_workers
    needed = BYTES_PER_VOXEL * prod(layout.grid.shape) * layout.num_channels
    return max(1, min(num_workers, int(0.8 * allotted_memory_bytes()) // needed))
