"""Whole volumes through a network in overlapping windows, blended by a Gaussian.

Legend: images are (C, I, J, K), scores are (num_classes, I, J, K), windows in a batch are (B, C, i, j, k).
Scores are whatever the network gives, which for our networks is logits: nothing is squashed before blending, as in
nnU-Net (Isensee et al. 2021), so mirrored and overlapping windows meet as a weighted mean of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice, product

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import InputError
from pipeline.geometry import Shape3, format_shape
from pipeline.slabs.rows import PendingLogits
from pipeline.slabs.store import slab_ranges, slab_rows

Network = Callable[[Tensor], Tensor]

SIGMA_SHARE = 1 / 8
SMALLEST_WEIGHT = 1e-3


@torch.inference_mode()
def sliding_window_scores(
    network: Network,
    image: Tensor,
    *,
    window: Shape3,
    num_classes: int,
    overlap: float = 0.5,
    tta_axes: Sequence[int] = (),
    window_batch: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Scores of every voxel: the Gaussian-weighted mean over all windows that hold it.

    The mean is kept as a running one (West 1979), one `lerp` per window, instead of two sums and a division: windows
    that agree give back their common value bit by bit, and nothing is divided by a vanishing weight. The precision of
    the network is the caller's: open `torch.autocast` around the call. Put the network in evaluation mode first.

    Args:
        network: Takes (B, C, *window) and gives (B, num_classes, *window). Where it has a method `pending_logits`, as
            our U-Net has, logits of a whole window never exist.
        image: (C, I, J, K) of a floating type. Scores are gathered where it lies: on the GPU for speed, or on the
            host when the scores of a whole volume are too large for the GPU.
        window: Size of the windows in voxels. A smaller volume is padded with zeros on both sides and cropped back.
        num_classes: Number of scores per voxel.
        overlap: Least share of a window that its neighbour covers as well; windows are spread evenly, so it may be
            more.
        tta_axes: Spatial axes (0, 1, 2) to mirror. Scores are averaged over all combinations: 2 ** len(tta_axes)
            passes.
        window_batch: Windows that go through the network at once.
        device: Where the network is; None for where the image is.

    Returns:
        (num_classes, I, J, K) float32 on the image's device.

    Raises:
        InputError: `overlap` or `tta_axes` are out of range, or the network gives another shape.
    """
    _check(overlap, tta_axes)
    padded, inner = _pad(image, window)
    shape = (padded.shape[1], padded.shape[2], padded.shape[3])
    scores = torch.zeros((num_classes, *shape), dtype=torch.float32, device=image.device)
    total = torch.zeros((1, *shape), dtype=torch.float32, device=image.device)
    weights = gaussian_weights(window).to(image.device)[None]
    flips = _flips(tta_axes)
    for places in _batched(window_slices(shape, window, overlap=overlap), window_batch):
        batch = torch.stack([padded[(slice(None), *place)] for place in places]).to(device or image.device)
        for flip in flips:
            for rows, batch_scores in _mirrored_rows(network, batch, flip, num_classes):
                share = weights[:, rows] / len(flips)
                for place, window_scores in zip(places, batch_scores, strict=True):
                    where = (slice(None), slice(place[0].start + rows.start, place[0].start + rows.stop), *place[1:])
                    seen = total[where].add_(share)
                    scores[where].lerp_(window_scores.to(scores), share / seen)
    return scores[(slice(None), *inner)].contiguous()


def window_starts(size: int, window: int, *, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spread, the first at 0, the last ending at the border.

    Args:
        size: Voxels along the axis, at least `window`.
        window: Voxels of a window.
        overlap: Least share of a window that its neighbour covers as well.
    """
    step = max(1, int(window * (1 - overlap) + 1e-6))
    span = size - window
    gaps = -(-span // step)
    return [span * index // gaps for index in range(gaps + 1)] if gaps else [0]


def window_slices(shape: Shape3, window: Shape3, *, overlap: float) -> list[tuple[slice, slice, slice]]:
    """Every window of a volume of `shape`, the last axis fastest. No axis of `shape` is below `window`."""
    starts = [window_starts(size, length, overlap=overlap) for size, length in zip(shape, window, strict=True)]
    i_len, j_len, k_len = window
    return [(slice(i, i + i_len), slice(j, j + j_len), slice(k, k + k_len)) for i, j, k in product(*starts)]


def gaussian_weights(window: Shape3) -> Tensor:
    """Importance of the voxels of a window: 1 about the centre, a Gaussian of 1/8 of each axis, never below 0.001.

    The same weighting as in nnU-Net and MONAI (`mode="gaussian"`). The floor keeps apart what is far from every centre.

    Returns:
        `window`-shaped float32.
    """
    weights = torch.ones(1)
    for length in window:
        offset = torch.arange(length) - (length - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (offset / (SIGMA_SHARE * length)) ** 2)
    return weights[0].clamp_min(SMALLEST_WEIGHT)


def _check(overlap: float, tta_axes: Sequence[int]) -> None:
    if not 0 <= overlap < 1:
        raise InputError(f"must be from 0 to below 1, got {overlap}", where="overlap")
    if not set(tta_axes) <= {0, 1, 2}:
        raise InputError(f"only the axes 0, 1 and 2 can be mirrored, got {list(tta_axes)}", where="tta_axes")


def _pad(image: Tensor, window: Shape3) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """The image, zero-padded on both sides to at least `window`, and where it lies in the padded one."""
    borders: list[int] = []
    inner = []
    for size, length in zip(image.shape[1:], window, strict=True):
        missing = max(0, length - size)
        before = missing // 2
        inner.append(slice(before, before + size))
        borders = [before, missing - before, *borders]
    return functional.pad(image, borders), (inner[0], inner[1], inner[2])


def _flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of axes to mirror, none first, as axes of a batch."""
    spatial = sorted({axis + 2 for axis in axes})
    return [flip for count in range(len(spatial) + 1) for flip in combinations(spatial, count)]


def _mirrored_rows(
    network: Network, batch: Tensor, flip: tuple[int, ...], num_classes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of windows and their scores (B, K, n, j, k), as the network gives them for the mirrored batch."""
    num_rows = batch.shape[2]
    for rows, scores in _score_rows(network, batch.flip(flip), num_classes):
        yield (slice(num_rows - rows.stop, num_rows - rows.start) if 2 in flip else rows), scores.flip(flip)


def _score_rows(network: Network, batch: Tensor, num_classes: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of windows and their scores; a few rows at a time where the network can leave its logits pending."""
    if not hasattr(network, "pending_logits"):
        yield slice(0, batch.shape[2]), _scores(network, batch, num_classes)
        return
    pending: PendingLogits = network.pending_logits(batch)
    _check_shape(pending.shape, batch, num_classes)
    for start, stop in slab_ranges(batch.shape[2], slab_rows(pending.shape, torch.float32)):
        yield slice(start, stop), pending.compute(start, stop)


def full_resolution(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The scores (B, K, I, J, K') at full resolution of any output that deep supervision knows.

    Args:
        output: A tensor, a list of them from the highest resolution down, or DynUNet's stack (B, heads, K, I, J, K').
    """
    if not isinstance(output, Tensor):
        return output[0]
    return output[:, 0] if output.ndim == 6 else output


def _scores(network: Network, batch: Tensor, num_classes: int) -> Tensor:
    scores = full_resolution(network(batch))
    _check_shape(scores.shape, batch, num_classes)
    return scores


def _check_shape(found: torch.Size, batch: Tensor, num_classes: int) -> None:
    expected = (batch.shape[0], num_classes, *batch.shape[2:])
    if tuple(found) != expected:
        raise InputError(
            f"the network gives {format_shape(found)} for windows of {format_shape(batch.shape)}, "
            f"expected {format_shape(expected)}"
        )


def _batched(places: Sequence[tuple[slice, slice, slice]], size: int) -> Iterator[list[tuple[slice, slice, slice]]]:
    remaining = iter(places)
    while chunk := list(islice(remaining, size)):
        yield chunk
