"""What a prediction will hold at a time, and how the volume is divided so that it stays within a bound.

A sweep along the longest axis holds the planes of one window, in as many channels as there are classes, or features
where the network has fewer of these. Where that is too much, the volume is divided across the other axes into blocks
that are swept one after the other. Every score stays the same to the last bit; what it costs is time, since windows
that reach into two blocks are computed for both. Nothing is written to disk.

Several networks that are combined sweep side by side, so the planes of all of them are held; the windows of only one
are in a network at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from pipeline.inference.prediction_bytes import Division, Need, Sweep, planes_kept, sum_of_parts
from pipeline.inference.window_memory import network_bytes, waiting_bytes
from pipeline.inference.window_outputs import Network
from pipeline.inference.windows import Box, SlidingWindow, longest_axis
from pipeline.preprocessing.score_resampling import ScoreResampling
from pipeline.sizes import GIB


@dataclass(frozen=True)
class Block:
    """What one sweep is for.

    Attributes:
        native: Box of the result; the whole of it along the axis of the sweep.
        source: Box of the prepared grid that it is made from.
        own: The part of it that belongs to no block before, so that all blocks together have each voxel once.
    """

    native: Box
    source: Box
    own: Box


@dataclass(frozen=True, kw_only=True)
class PredictionMemory:
    """How a volume is predicted, and what that takes.

    Attributes:
        axis: Of the sweeps.
        keep: Planes that are handed on once more, for interpolation between planes.
        of_features: Gather features instead of scores, of networks that have fewer of them.
        blocks: One sweep each.
        rows: Planes of the result at a time.
        chunk: Classes at a time.
        num_windows, fewest_windows: Windows that are computed, and those of a single block, by all networks.
        parts: Bytes by what takes them: "means" gathered, "slab" on its way to the native grid, "window" in the
            network, which is an estimate, "waiting" for their turn meanwhile, "libraries" that the first window has
            loaded, and "seams" that are counted.
        num_sweeps: Sweeps side by side.
    """

    axis: int
    keep: int
    of_features: bool
    blocks: tuple[Block, ...]
    rows: int
    chunk: int
    num_windows: int
    fewest_windows: int
    parts: Mapping[str, int]
    num_sweeps: int = 1

    @property
    def num_bytes(self) -> int:
        """At most: a slab and windows of the next step are not there at the same time, see `hand_back_freed`."""
        return sum_of_parts(self.parts)

    def describe(self) -> str:
        """A line for the log."""
        parts = ", ".join(f"{value / GIB:.2f} {name}" for name, value in self.parts.items() if value)
        what = "features" if self.of_features else "scores"
        again = f", {self.num_windows / self.fewest_windows:.2f} times the windows" if len(self.blocks) > 1 else ""
        several = f" of {self.num_sweeps} sweeps side by side" if self.num_sweeps > 1 else ""
        return (
            f"{what}{several} are gathered along axis {'ijk'[self.axis]} in {len(self.blocks)} block(s){again}: "
            f"{self.num_bytes / GIB:.2f} GiB beside network, image and labels ({parts})"
        )


def plan_prediction_memory(
    resampling: ScoreResampling,
    sliding: SlidingWindow,
    *,
    num_channels: int = 1,
    network: Network | None = None,
    max_bytes: int | None = None,
) -> PredictionMemory:
    """The way to predict a volume that computes the fewest windows within a bound, or the smallest where none is.

    Args:
        resampling: From the prepared to the native grid.
        sliding: The windows.
        num_channels: Of the image.
        network: None stands for one that gives scores.
        max_bytes: Most that may be held beside network, image and result; None is no bound.
    """
    return plan_sweeps(resampling, [Sweep(sliding, network)], num_channels=num_channels, max_bytes=max_bytes)


def plan_sweeps(
    resampling: ScoreResampling,
    sweeps: Sequence[Sweep],
    *,
    num_channels: int = 1,
    num_buffered: int = 0,
    max_bytes: int | None = None,
) -> PredictionMemory:
    """As `plan_prediction_memory`, for networks that sweep a volume side by side.

    Args:
        resampling: From the prepared to the native grid.
        sweeps: The networks.
        num_channels: Of the image.
        num_buffered: Values that reducers keep of every voxel of a slab of the result.
        max_bytes: Most that may be held beside networks, image and result; None is no bound.
    """
    axis = longest_axis(resampling.source_shape)
    by_axis = [
        list(_divisions(resampling, sweeps, other, most=1 if other == axis or max_bytes is None else None))
        for other in range(3)
    ]
    need = Need(
        resampling=resampling,
        axis=axis,
        sweeps=tuple(sweeps),
        window_bytes=max(network_bytes(each.sliding, num_channels, each.network) for each in sweeps),
        waiting_bytes=sum(waiting_bytes(each.sliding, each.network) for each in sweeps),
        num_buffered=num_buffered,
    )
    ways = [(sum_of_parts(need.parts(way)), _num_windows(way), way) for way in product(*by_axis)]
    fitting = [(windows, taken, way) for taken, windows, way in ways if max_bytes is None or taken <= max_bytes]
    way = min(fitting or ways, key=lambda each: each[:2])[2]
    rows, chunk = need.pieces(way)
    sides = [zip(each.sides, _own_sides(resampling, n, each), strict=True) for n, each in enumerate(way)]
    return PredictionMemory(
        axis=axis,
        keep=planes_kept(resampling, axis),
        of_features=any(sweep.of_features for sweep in sweeps),
        blocks=tuple(_block(resampling, *block) for block in product(*sides)),
        rows=rows,
        chunk=chunk,
        num_windows=_num_windows(way),
        fewest_windows=_num_windows([each[0] for each in by_axis]),
        parts=need.parts(way),
        num_sweeps=len(sweeps),
    )


def _own_sides(resampling: ScoreResampling, axis: int, division: Division) -> list[slice]:
    sources = [resampling.source_side(axis, side) for side in division.sides]
    taken = [sources[0].start, *(side.stop for side in sources[:-1])]
    return [slice(max(start, side.start), side.stop) for start, side in zip(taken, sources, strict=True)]


def _block(resampling: ScoreResampling, *sides: tuple[slice, slice]) -> Block:
    """A block of its sides on the native grid, each with its own part on the prepared one."""
    (i, own_i), (j, own_j), (k, own_k) = sides
    return Block((i, j, k), resampling.source_box((i, j, k)), (own_i, own_j, own_k))


# ---- where to divide


def _num_windows(way: Sequence[Division]) -> int:
    """Windows of all sweeps."""
    return sum(prod(starts) for starts in zip(*(division.num_starts for division in way), strict=True))


def _divisions(
    resampling: ScoreResampling, sweeps: Sequence[Sweep], axis: int, *, most: int | None
) -> Iterator[Division]:
    """Divisions of an axis into 1, 2, ... sides, at most `most`, or up to sides of half a window step."""
    size, source_size = resampling.shape[axis], resampling.source_shape[axis]
    starts = {start for sweep in sweeps for start in sweep.sliding.starts(axis, source_size)}
    # Where a window begins, no other windows need to be computed for both sides than those that reach across.
    good = {resampling.num_ready(axis, start) for start in starts if start > 0} - {0, size}
    for number in range(1, min(size, most or 2 * len(starts)) + 1):
        cuts = [size * index // number for index in range(1, number)]
        near = sorted({min(good, key=lambda at: (abs(at - cut), at)) for cut in cuts}) if good else cuts
        for inner in [cuts] if near == cuts else [near, cuts]:
            sides = [slice(first, last) for first, last in pairwise([0, *inner, size])]
            sources = [resampling.source_side(axis, side) for side in sides]
            yield Division(
                tuple(sides),
                max(side.stop - side.start for side in sources),
                max(side.stop - side.start for side in sides),
                tuple(
                    sum(len(sweep.sliding.starts_within(axis, source_size, side)) for side in sources)
                    for sweep in sweeps
                ),
            )
