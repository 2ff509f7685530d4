"""Class indices of a volume on the grid that it is given on, without its scores ever being there whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.geometry import Shape3
from pipeline.inference.planes import Planes, Scores
from pipeline.inference.prediction_memory import Block, PredictionMemory, plan_prediction_memory
from pipeline.inference.sliding_window import stream_planes
from pipeline.inference.window_outputs import Network
from pipeline.inference.windows import SlidingWindow
from pipeline.preprocessing.score_resampling import ScoreResampling
from pipeline.slabs.store import slab_ranges


def plan_label_memory(
    network: Network, shape: Shape3, sliding: SlidingWindow, *, num_channels: int, max_bytes: int | None = None
) -> PredictionMemory:
    """How `sliding_window_labels` goes over a volume, see `plan_prediction_memory`."""
    return plan_prediction_memory(
        ScoreResampling(shape, shape),
        sliding,
        num_channels=num_channels,
        network=network,
        max_bytes=max_bytes,
    )


@torch.inference_mode()
def sliding_window_labels(network: Network, image: Tensor, sliding: SlidingWindow, memory: PredictionMemory) -> Tensor:
    """The class of the highest score of every voxel, the lowest of several.

    Args:
        network: As in `sliding_window_scores`; the precision is the caller's in the same way.
        image: (C, I, J, K) of a floating type. Scores are gathered where it lies.
        sliding: The windows.
        memory: How the volume is divided.

    Returns:
        (I, J, K) class indices on the host, in uint8 for up to 256 classes and int16 above.

    Raises:
        InputError: The network gives another shape.
    """
    dtype = torch.uint8 if sliding.num_classes <= 256 else torch.int16
    labels = torch.zeros(image.shape[1:], dtype=dtype)
    for block in memory.blocks:
        planes = stream_planes(
            network, image, sliding, axis=memory.axis, region=block.source, of_features=memory.of_features
        )
        _write_highest(planes, block, memory, labels)
    return labels


def _write_highest(planes: Iterator[Planes], block: Block, memory: PredictionMemory, labels: Tensor) -> None:
    """The labels of one block, of which nothing else is left when the next one begins."""
    for finished in planes:
        for start, stop in slab_ranges(finished.stop - finished.start, memory.rows):
            taken = finished.narrow(finished.start + start, finished.start + stop)
            place = [slice(taken.start, taken.stop) if n == memory.axis else block.native[n] for n in range(3)]
            labels[tuple(place)] = highest(taken, labels.dtype, chunk=memory.chunk).to(labels.device)


def highest(scores: Scores, dtype: torch.dtype, *, chunk: int) -> Tensor:
    """The class of the highest score (i, j, k), the lowest of several.

    Args:
        scores: Of which all planes are taken at once.
        dtype: Of the indices.
        chunk: Classes at a time.
    """
    best = indices = None
    for first in range(0, scores.num_classes, chunk):
        for index, score in enumerate(scores.take(slice(first, min(first + chunk, scores.num_classes))), start=first):
            if best is None or indices is None:
                best, indices = score.clone(), torch.zeros_like(score, dtype=dtype)
                continue
            # Indices ascend, so a class that wins is the highest index so far; this way nothing is gathered or masked.
            wins = score > best
            torch.maximum(best, score, out=best)
            torch.maximum(indices, wins.view(torch.uint8).to(dtype) * index, out=indices)
    assert indices is not None
    return indices
