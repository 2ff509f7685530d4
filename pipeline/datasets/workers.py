"""How many processes are worth starting to read files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.allocation import allotted_memory_bytes
from pipeline.errors import InputError
from pipeline.io.nifti import read_source

# So little is read in one process before others have imported what they need.
FEW_BYTES = 64 * 2**20
# The voxels of the file, their float32 copy, the label and masks.
BYTES_PER_VOXEL = 16


def sensible_workers(files: Iterable[Path], num_workers: int) -> int:
    """At most `num_workers`: one for little work, and no more than memory has room for the largest file.

    Args:
        files: What is to be read; files that are missing do not count.
        num_workers: The user's or the machine's limit.
    """
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    if num_workers <= 1 or sum(sizes.values()) < FEW_BYTES:
        return 1
    try:
        shape = read_source(max(sizes, key=lambda path: sizes[path])).header.get_data_shape()
    except InputError:
        return num_workers
    needed = BYTES_PER_VOXEL * int(np.prod(shape, dtype=np.int64))
    return max(1, min(num_workers, int(0.8 * allotted_memory_bytes()) // needed))
