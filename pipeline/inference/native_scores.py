"""From finished planes of scores to reducers on the native grid, block by block and slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.inference.heap import hand_back_freed
from pipeline.inference.planes import Planes, Scores
from pipeline.inference.prediction_memory import Block, PredictionMemory
from pipeline.inference.sliding_window import stream_planes
from pipeline.inference.window_outputs import Network, gathers_features
from pipeline.inference.windows import SlidingWindow
from pipeline.preprocessing.restore import NativeScores, Reducer
from pipeline.slabs.store import slab_ranges

Stream = Callable[[Block], Iterable[Scores]]


def reduce_blocks(stream: Stream, native: NativeScores, memory: PredictionMemory, reducers: Sequence[Reducer]) -> None:
    """Give the scores of a volume to reducers, on the native grid.

    Args:
        stream: Gives the finished planes of a block's source, the last `memory.keep` of them again with the next.
        native: The way back.
        memory: The blocks.
        reducers: What takes the scores.
    """
    for block in memory.blocks:
        _reduce_block(stream, block, native, memory, reducers)


def _reduce_block(
    stream: Stream, block: Block, native: NativeScores, memory: PredictionMemory, reducers: Sequence[Reducer]
) -> None:
    """One block, of which nothing is left when the next one begins."""
    for rows, scores in _native_slabs(stream(block), native, memory.rows):
        needed = native.resampling.source_side(memory.axis, rows)
        i, j, k = (rows if axis == memory.axis else side for axis, side in enumerate(block.native))
        on_host = partial(_on_host, scores.narrow(needed.start, needed.stop))
        native.reduce(on_host, (i, j, k), reducers, chunk=memory.chunk)
        # Planes of a block's end would still be there while windows are computed.
        del scores, on_host


def _on_host(scores: Scores, classes: slice) -> NDArray[np.float32]:
    return scores.take(classes).cpu().numpy()


def stream_block(
    network: Network, image: Tensor, sliding: SlidingWindow, memory: PredictionMemory, block: Block
) -> Iterator[Planes]:
    """The finished planes of one network for a block.

    Raises:
        NotFiniteError: Not all of them are finite.
    """
    planes = stream_planes(
        network,
        image,
        sliding,
        axis=memory.axis,
        region=block.source,
        keep=memory.keep,
        of_features=memory.of_features and gathers_features(network, sliding.num_classes),
        own=block.own,
    )
    for each in planes:
        each.check_finite()
        yield each


def _native_slabs(planes: Iterable[Scores], native: NativeScores, num_rows: int) -> Iterator[tuple[slice, Scores]]:
    """Planes of the result, some at a time, as soon as the planes of the source that they are made from are there."""
    done = 0
    for scores in planes:
        ready = native.resampling.num_ready(scores.axis, scores.stop)
        # What windows took would still be there, in pieces, beside what the slabs take, and the other way round.
        hand_back_freed()
        for start, stop in slab_ranges(ready - done, num_rows):
            yield slice(done + start, done + stop), scores
        hand_back_freed()
        done = ready
