"""Whole volumes through a network in overlapping windows, blended by a Gaussian.

Legend: images are (C, I, J, K), scores are (num_classes, I, J, K), windows in a batch are (B, C, i, j, k).
Scores are whatever the network gives, which for our networks is logits: nothing is squashed before blending, as in
nnU-Net (Isensee et al. 2021), so mirrored and overlapping windows meet as a weighted mean of logits.

Windows come start by start along one axis, and once those of a start are added, all planes below the next start are
finished. There is one rule by which windows are added up and one order in which they are, so it does not matter to the
last bit of a score how much of a volume is held at a time. Only where mirrored windows go through a network in batches
does it depend on the batches: all windows of a batch are added once for each mirrored pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.geometry import Shape3
from pipeline.inference.air import AirFinder
from pipeline.inference.case_context import current_case
from pipeline.inference.planes import Planes
from pipeline.inference.running_mean import RunningMean
from pipeline.inference.seams import SeamCounter
from pipeline.inference.window_outputs import Network, Rows, ScoreHead, WindowOutputs, all_flips, num_features
from pipeline.inference.windows import Box, SlidingWindow, gaussian_weights, longest_axis, read_window

# Windows that threads have begun, for each that they may compute at once: they go on while finished ones are added.
WINDOWS_AHEAD = 2


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

    All of them at once, in memory that grows with volume times classes; `stream_planes` gives the same bit by bit.
    The precision of the network is the caller's: open `torch.autocast` around the call. Put the network in evaluation
    mode first.

    Args:
        network: Takes (B, C, *window) and gives (B, num_classes, *window). Where it has a method `pending_logits`, as
            our U-Net has, logits of a whole window never exist.
        image: (C, I, J, K) of a floating type. Scores are gathered where it lies: on the GPU for speed, or on the
            host when the scores of a whole volume are too large for the GPU.
        window: Size of the windows in voxels. A smaller volume is padded with zeros on both sides and cropped back.
        num_classes: Number of scores per voxel.
        overlap: See `SlidingWindow`, as for what follows.
        tta_axes: Spatial axes (0, 1, 2) to mirror.
        window_batch: Windows that go through the network at once.
        device: Where the network is; None for where the image is.

    Returns:
        (num_classes, I, J, K) float32 on the image's device.

    Raises:
        InputError: `overlap` or `tta_axes` are out of range, or the network gives another shape.
    """
    sliding = SlidingWindow(
        window=window,
        num_classes=num_classes,
        overlap=overlap,
        tta_axes=tta_axes,
        window_batch=window_batch,
        device=device,
    )
    # With all planes kept, the last that are handed on are all there are.
    *_, whole = stream_planes(network, image, sliding, keep=max(image.shape[1:]))
    return whole.means


@torch.inference_mode()
def stream_planes(
    network: Network,
    image: Tensor,
    sliding: SlidingWindow,
    *,
    axis: int | None = None,
    region: Box | None = None,
    keep: int = 0,
    of_features: bool = False,
    own: Box | None = None,
) -> Iterator[Planes]:
    """Scores plane by plane along one axis: the same as those of `sliding_window_scores`, each when it is final.

    No more is held at a time than the planes that one window covers, and of these only those voxels that are wanted.

    Args:
        network: As in `sliding_window_scores`; the precision is the caller's in the same way.
        image: (C, I, J, K) of a floating type. Scores are gathered where it lies.
        sliding: The windows.
        axis: Along which planes follow each other; None takes the longest, whose planes are the smallest.
        region: What is wanted of every plane; its side along `axis` does not matter. None is all. Windows without a
            voxel in it are not computed.
        keep: Planes handed on before that are handed on again with the next, for whoever interpolates between them.
        of_features: Gather the features that the network's head makes scores of; only where `num_features` is not
            None. Less memory and time where there are fewer of them than classes, and the same scores to rounding.
        own: The part of the region in which seams are counted; None is all of it.

    Yields:
        Planes in order. They are a view, of use until the next are asked for.

    Raises:
        InputError: The network gives another shape.
    """
    shape = (image.shape[1], image.shape[2], image.shape[3])
    axis = longest_axis(shape) if axis is None else axis
    region = region or (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    channels = num_features(network) if of_features else sliding.num_classes
    first = tuple(slice(0, held_planes(sliding, axis, shape, keep)) if n == axis else region[n] for n in range(3))
    mean = RunningMean(channels, first, device=image.device)
    handed_on = 0
    steps = _without_air(list(sliding.sweep(shape, axis, region)), image, sliding)
    seams = None
    if sliding.count_seams and sum(len(places) for places, _ in steps) > 1:
        seams = SeamCounter(first, sliding.num_classes, len(all_flips(sliding.tta_axes)), device=image.device)
    add = _WindowAdder(network, image, sliding, mean, seams, of_features=of_features)
    outputs = add.outputs([places for places, _ in steps])
    for places, finished in steps:
        head = add(len(places), outputs)
        start = max(0, handed_on - keep)
        unseen = mean.unseen(axis, start, finished) if sliding.skip_air else None
        yield Planes(axis, start, finished, sliding.num_classes, mean.read(axis, start, finished), head, unseen)
        if seams is not None:
            current_case().note_seams(*seams.count(axis, slice(handed_on, finished), own or region))
        handed_on = finished
        if finished < shape[axis]:
            for moving in (mean, seams) if seams is not None else (mean,):
                moving.move_to(axis, max(0, finished - keep))


def held_planes(sliding: SlidingWindow, axis: int, shape: Shape3, keep: int) -> int:
    """Planes of a volume that a sweep holds at a time."""
    return min(shape[axis], sliding.window[axis] + keep)


def _without_air(
    steps: list[tuple[list[Box], int]], image: Tensor, sliding: SlidingWindow
) -> list[tuple[list[Box], int]]:
    """The steps of a sweep without the windows that need no network."""
    if not sliding.skip_air:
        return steps
    is_air, context = AirFinder(image), current_case()
    left = [([place for place in places if not is_air(place)], finished) for places, finished in steps]
    before, after = (sum(len(places) for places, _ in each) for each in (steps, left))
    context.notes.skipped += before - after
    context.on_windows(before - after)
    return left


class _WindowAdder:
    """Puts windows of an image through a network and adds them to a mean."""

    def __init__(
        self,
        network: Network,
        image: Tensor,
        sliding: SlidingWindow,
        mean: RunningMean,
        seams: SeamCounter | None,
        *,
        of_features: bool,
    ) -> None:
        self._seams = seams
        self._head: ScoreHead | None = None
        alone = tuple(axis + 2 for axis in sliding.mirrored)
        self._flips = [alone] if alone else all_flips(sliding.tta_axes)
        self._outputs = WindowOutputs(network, sliding.num_classes, of_features)
        self._image, self._sliding, self._mean = image, sliding, mean
        self._weights = gaussian_weights(sliding.window).to(image.device)[None] / len(self._flips)

    def outputs(self, steps: Iterable[Sequence[Box]]) -> Iterator[tuple[Sequence[Box], Iterable[Rows]]]:
        """What the network gives for windows, batch by batch and flip by flip, no batch from two steps."""
        threads, at_once = self._sliding.threads, self._sliding.window_batch
        size = 1 if threads else at_once
        batches = (places[first : first + size] for places in steps for first in range(0, len(places), size))
        passes = ((batch, flip) for batch in batches for flip in self._flips)
        if threads is None:
            return ((batch, self._rows(batch, flip)) for batch, flip in passes)
        return threads.map(lambda each: (each[0], list(self._rows(*each))), passes, ahead=WINDOWS_AHEAD * at_once)

    def __call__(self, count: int, outputs: Iterator[tuple[Sequence[Box], Iterable[Rows]]]) -> ScoreHead | None:
        """Add the next windows in order; gives the head where features are gathered and a window was computed."""
        added = 0
        while added < count:
            for _ in self._flips:
                places, rows = next(outputs)
                self._head = self._add(places, rows)
                # Or they would still be there while the next are computed.
                del rows
            added += len(places)
            current_case().on_windows(len(places))
        return self._head

    def _rows(self, places: Sequence[Box], flip: tuple[int, ...]) -> Iterator[Rows]:
        device = self._sliding.device or self._image.device
        batch = torch.stack([read_window(self._image, place) for place in places]).to(device)
        return self._outputs.rows(batch, flip)

    def _add(self, places: Sequence[Box], passed: Iterable[Rows]) -> ScoreHead | None:
        head = None
        for rows, values, head in passed:
            for place, window_values in zip(places, values, strict=True):
                first = place[0].start
                box = (slice(first + rows.start, first + rows.stop), *place[1:])
                self._mean.add(box, window_values, self._weights[:, rows])
                if self._seams is not None:
                    self._seams.add(place, rows, window_values, head)
            # Or they would still be there while the next are computed.
            del values, window_values
        return head.to(self._image.device) if head else None
