"""Arrays in blosc2 files: chunks fitted to the training patch, blocks to the processor's cache.

A random patch then touches few chunks and decompresses little more than itself. The idea is that of nnU-Net's Blosc2
data set (Isensee et al.); the rules are our own and measured: of codecs and filters, LZ4 with bit shuffling reads
fastest at nearly zstd's size on normalised images (CT, 1.25 times smaller than raw; labels 60 times).
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import atomic_path
from pipeline.geometry import Shape3

MAX_CHUNK_EDGE = 128
# 32^3 float32 voxels are 128 KiB, which a core's second-level cache holds; edges from 13 to 50 read within 30 %.
MAX_BLOCK_EDGE = 32


class WrittenFile(NamedTuple):
    """What tells a file that is whole.

    Attributes:
        size: In bytes.
        crc32: Of the bytes.
    """

    size: int
    crc32: int


def fitted_chunks(shape: tuple[int, ...], patch_size: Shape3) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and block shape for an array (..., I, J, K): even parts, so that little is padded.

    Args:
        shape: Of the array; leading axes are split into single channels.
        patch_size: Of the patches that will be read; chunks are no longer than it along any axis.
    """
    lead = (1,) * (len(shape) - 3)
    chunks = [_even_part(n, min(patch, MAX_CHUNK_EDGE)) for n, patch in zip(shape[-3:], patch_size, strict=True)]
    return (*lead, *chunks), (*lead, *(_even_part(n, MAX_BLOCK_EDGE) for n in chunks))


def _even_part(length: int, longest: int) -> int:
    """The size of equal parts of `length`, none longer than `longest`."""
    num_parts = -(-length // longest)
    return -(-length // num_parts)


def write_array(
    path: Path, array: NDArray[Any], *, chunks: tuple[int, ...] | None = None, blocks: tuple[int, ...] | None = None
) -> WrittenFile:
    """Write an array atomically as a blosc2 NDArray (`.b2nd`); a record in the same folder is to follow.

    Raises:
        InputError: The file cannot be written.
    """
    cparams = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    # The frame is made in memory because Python's own writing reports a full disk; blosc2's does not say why it failed.
    compressed = blosc2.asarray(
        np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=cparams, contiguous=True
    )
    frame: bytes = compressed.to_cframe()
    # Syncing the folder takes about as long as syncing a small file, and the record's does it for all of the case.
    with atomic_path(path, sync_folder=False) as temporary:
        temporary.write_bytes(frame)
    return WrittenFile(len(frame), zlib.crc32(frame))


def read_array(path: Path, part: Any) -> NDArray[Any]:
    """Read `part` (slices) of a file, decompressing only the blocks it touches, in the calling thread.

    Raises:
        RuntimeError, OSError: The file is no blosc2 array or is damaged.
    """
    handle = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
    voxels: NDArray[Any] = handle[part]
    return voxels
