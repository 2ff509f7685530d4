"""Voxels of each class: their true number, and a sample of places to centre patches on."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MAX_SAMPLED_VOXELS = 10_000
PIECE_VOXELS = 1 << 20


def count_voxels(label: NDArray[Any], num_classes: int) -> tuple[int, ...]:
    """Voxels of each class index; ignored ones (-1) are not counted.

    Args:
        label: (I, J, K) class indices.
        num_classes: Background included.
    """
    counts = np.zeros(num_classes + 1, np.int64)
    flat = label.ravel()
    # Piece by piece, because bincount makes a 64-bit copy of what it counts.
    for start in range(0, flat.size, PIECE_VOXELS):
        piece = flat[start : start + PIECE_VOXELS].astype(np.int64) + 1
        counts += np.bincount(piece, minlength=num_classes + 1)
    return tuple(int(count) for count in counts[1:])


def sample_foreground(label: NDArray[Any], counts: tuple[int, ...], *, case_id: str) -> NDArray[np.int32]:
    """Up to 10,000 voxels of each foreground class, drawn evenly with a seed that follows from the case id.

    Args:
        label: (I, J, K) class indices.
        counts: Voxels of each class.
        case_id: Seeds the draw, so that a case made anew has the same sample.

    Returns:
        (N, 3) indices, class by class in rising order; a class has min(count, 10,000) rows.
    """
    rng = np.random.default_rng(zlib.crc32(case_id.encode()))
    rows = [np.empty((0, 3), np.int32)]
    # Searching each class in its own box keeps memory and time far below one pass over the volume per class.
    for class_index, box in enumerate(ndimage.find_objects(label, max_label=len(counts) - 1), start=1):
        if box is None:
            continue
        count, extent = counts[class_index], label[box].shape
        flat = np.flatnonzero(label[box] == class_index)
        if count > MAX_SAMPLED_VOXELS:
            flat = flat[np.sort(rng.choice(count, MAX_SAMPLED_VOXELS, replace=False))]
        places = np.stack(np.unravel_index(flat, extent), axis=1) + [side.start for side in box]
        rows.append(places.astype(np.int32))
    return np.concatenate(rows)
