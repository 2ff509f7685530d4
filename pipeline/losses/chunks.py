"""Ranges of voxels whose temporaries are small beside a network's, whatever the number of classes."""

from __future__ import annotations

from torch import Tensor

from pipeline.slabs.repeats import has_values

# Elements of a temporary: few enough that the two or three that are live at once (8 MiB each in float32) do not count,
# and many enough that a GPU is busy.
CHUNK_ELEMENTS = 2**21


def split_voxels(num_voxels: int, elements_per_voxel: int) -> list[slice]:
    """Ranges of nearly equal length that cover the voxels, of at most `CHUNK_ELEMENTS` elements where one voxel fits.

    Args:
        num_voxels: Voxels of a sample.
        elements_per_voxel: Of the widest temporary, over all samples.
    """
    longest = max(CHUNK_ELEMENTS // elements_per_voxel, 1)
    num_chunks = max(-(-num_voxels // longest), 1)
    length = max(-(-num_voxels // num_chunks), 1)
    return [slice(start, min(start + length, num_voxels)) for start in range(0, num_voxels, length)]


def without_repeats(chunks: list[slice], tensor: Tensor) -> list[slice]:
    """The chunks to be worked on: all of them, or a few for a tensor without values.

    Chunks of one length take the same memory one after the other, so that metering a step on fake tensors needs the
    first two (the second finds what the first has left) and the last, and not thousands.
    """
    return chunks if has_values(tensor) or len(chunks) <= 3 else [*chunks[:2], chunks[-1]]
