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

from pipeline.inference.sliding_window import WINDOWS_AHEAD, held_planes
from pipeline.inference.windows import Box, SlidingWindow, longest_axis
from pipeline.plan import GIB
from pipeline.preprocessing.score_resampling import ScoreResampling

FLOAT_BYTES = 4
# Of a voxel in which windows are compared: the first one's class in 16 bits, and three flags.
SEAM_BYTES = 5
# What is taken of finished planes at a time, and of that, scores of some classes; larger pieces are not faster. Of
# small volumes it is this share of what is gathered.
SLAB_BYTES = 64 << 20
CHUNK_BYTES = 16 << 20
SLAB_SHARE = 1 / 4
# Activations at full resolution that a U-Net has at a time in evaluation, in channels as they are and in channels as
# oneDNN's convolutions copy them, filled up to a multiple of 16. Fitted to peaks of single windows, 8 to 32 features.
LIVE_ACTIVATIONS, BLOCKED_ACTIVATIONS, CHANNELS_PER_BLOCK = 4.25, 2, 16
# Of smaller blocks glibc keeps the last ones that were freed: by default up to twice the largest at the end of the
# heap, and what fits nothing else between others (2 of 6 runs went up to 5 % over their bound without the latter).
SMALLEST_RETURNED_BYTES = 32 << 20
KEPT_BLOCKS = 3


@dataclass(frozen=True)
class Sweep:
    """One network on its way over a volume, or one of its mirrored passes.

    Attributes:
        sliding: The windows.
        num_features: Of the network, see `window_outputs.num_features`.
    """

    sliding: SlidingWindow
    num_features: int | None = None

    @property
    def of_features(self) -> bool:
        """Whether features are gathered in place of scores."""
        return self.num_features is not None and self.num_features < self.sliding.num_classes

    @property
    def gathered(self) -> int:
        """Channels that are gathered."""
        return self.num_features if self.of_features and self.num_features else self.sliding.num_classes


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
            network, which is an estimate, "waiting" for their turn meanwhile, and "seams" that are counted.
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
    num_features: int | None = None,
    max_bytes: int | None = None,
) -> PredictionMemory:
    """The way to predict a volume that computes the fewest windows within a bound, or the smallest where none is.

    Args:
        resampling: From the prepared to the native grid.
        sliding: The windows.
        num_channels: Of the image.
        num_features: Of the network, see `window_outputs.num_features`.
        max_bytes: Most that may be held beside network, image and result; None is no bound.
    """
    return plan_sweeps(resampling, [Sweep(sliding, num_features)], num_channels=num_channels, max_bytes=max_bytes)


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
    need = _Need(
        resampling=resampling,
        axis=axis,
        sweeps=tuple(sweeps),
        window_bytes=max(network_bytes(each.sliding, num_channels, each.num_features) for each in sweeps),
        waiting_bytes=sum(waiting_bytes(each.sliding, each.num_features) for each in sweeps),
        num_buffered=num_buffered,
    )
    ways = [(sum_of_parts(need.parts(way)), _num_windows(way), way) for way in product(*by_axis)]
    fitting = [(windows, taken, way) for taken, windows, way in ways if max_bytes is None or taken <= max_bytes]
    way = min(fitting or ways, key=lambda each: each[:2])[2]
    rows, chunk = need.pieces(way)
    sides = [zip(each.sides, _own_sides(resampling, n, each), strict=True) for n, each in enumerate(way)]
    return PredictionMemory(
        axis=axis,
        keep=_planes_kept(resampling, axis),
        of_features=any(sweep.of_features for sweep in sweeps),
        blocks=tuple(_block(resampling, *block) for block in product(*sides)),
        rows=rows,
        chunk=chunk,
        num_windows=_num_windows(way),
        fewest_windows=_num_windows([each[0] for each in by_axis]),
        parts=need.parts(way),
        num_sweeps=len(sweeps),
    )


def _own_sides(resampling: ScoreResampling, axis: int, division: _Division) -> list[slice]:
    sources = [resampling.source_side(axis, side) for side in division.sides]
    taken = [sources[0].start, *(side.stop for side in sources[:-1])]
    return [slice(max(start, side.start), side.stop) for start, side in zip(taken, sources, strict=True)]


def _block(resampling: ScoreResampling, *sides: tuple[slice, slice]) -> Block:
    """A block of its sides on the native grid, each with its own part on the prepared one."""
    (i, own_i), (j, own_j), (k, own_k) = sides
    return Block((i, j, k), resampling.source_box((i, j, k)), (own_i, own_j, own_k))


def _planes_kept(resampling: ScoreResampling, axis: int) -> int:
    return 0 if resampling.is_identity(axis) else 1


# ---- where to divide


@dataclass(frozen=True)
class _Division:
    """One axis divided into sides of blocks.

    Attributes:
        sides: On the grid of the result.
        longest_source, longest_native: Voxels of the longest side on both grids.
        num_starts: Windows along the axis by sweep, those that reach into two sides counted for both.
    """

    sides: tuple[slice, ...]
    longest_source: int
    longest_native: int
    num_starts: tuple[int, ...]


def _num_windows(way: Sequence[_Division]) -> int:
    """Windows of all sweeps."""
    return sum(prod(starts) for starts in zip(*(division.num_starts for division in way), strict=True))


def _divisions(
    resampling: ScoreResampling, sweeps: Sequence[Sweep], axis: int, *, most: int | None
) -> Iterator[_Division]:
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
            yield _Division(
                tuple(sides),
                max(side.stop - side.start for side in sources),
                max(side.stop - side.start for side in sides),
                tuple(
                    sum(len(sweep.sliding.starts_within(axis, source_size, side)) for side in sources)
                    for sweep in sweeps
                ),
            )


# ---- what it takes


@dataclass(frozen=True, kw_only=True)
class _Need:
    """What a way to divide a volume takes.

    Attributes:
        resampling: From the prepared to the native grid.
        axis: Of the sweeps.
        sweeps: The networks.
        window_bytes: What a window takes in the network.
        waiting_bytes: What windows take that are through it.
        num_buffered: Values that reducers keep of every voxel of a slab of the result.
    """

    resampling: ScoreResampling
    axis: int
    sweeps: tuple[Sweep, ...]
    window_bytes: int
    waiting_bytes: int
    num_buffered: int

    @property
    def gathered(self) -> int:
        """Channels of all sweeps."""
        return sum(sweep.gathered for sweep in self.sweeps)

    def parts(self, way: Sequence[_Division]) -> dict[str, int]:
        """Bytes by what takes them: of the largest block, should one have the longest of all sides."""
        source, native = self._planes(way)
        rows, chunk = self.pieces(way)
        taken = min(int(rows * self._zoom) + 2, self.resampling.source_shape[self.axis]) * source
        # Features of the source in one piece, scores of a chunk of classes there and three times beside, and the
        # running maximum.
        copied = sum(sweep.gathered for sweep in self.sweeps if sweep.of_features)
        slab = (copied + chunk) * taken + (3 * chunk + 3 + self.num_buffered) * rows * native
        # Chunks that were freed and are kept by glibc.
        slab += 2 * chunk * taken
        if len(self.sweeps) > 1:
            # Probabilities of a chunk, their mean and their spread, and what normalises them.
            slab += (3 * chunk + 2 * len(self.sweeps)) * taken
        return {
            "means": self._gathered_bytes(source),
            "slab": FLOAT_BYTES * slab,
            "window": self.window_bytes,
            "waiting": self.waiting_bytes,
            "seams": sum(seam_bytes(sweep, self._held_planes(sweep) * source) for sweep in self.sweeps),
        }

    def pieces(self, way: Sequence[_Division]) -> tuple[int, int]:
        """Planes of the result at a time, and classes at a time."""
        source, native = self._planes(way)
        slab = min(SLAB_BYTES, SLAB_SHARE * self._gathered_bytes(source))
        rows = max(1, int(slab / (FLOAT_BYTES * self.gathered * source * self._zoom)))
        rows = min(rows, self.resampling.shape[self.axis])
        voxels = rows * max(native, source * self._zoom)
        chunk = max(1, int(min(CHUNK_BYTES, SLAB_SHARE * slab) / (FLOAT_BYTES * voxels)))
        return rows, min(chunk, self.sweeps[0].sliding.num_classes)

    def _gathered_bytes(self, source: int) -> int:
        """Means and the sum of their weights."""
        held = sum((sweep.gathered + 1) * self._held_planes(sweep) for sweep in self.sweeps)
        return FLOAT_BYTES * held * source

    def _held_planes(self, sweep: Sweep) -> int:
        keep = _planes_kept(self.resampling, self.axis)
        return held_planes(sweep.sliding, self.axis, self.resampling.source_shape, keep)

    def _planes(self, way: Sequence[_Division]) -> tuple[int, int]:
        """Voxels of a plane of the largest block on both grids."""
        across = [division for axis, division in enumerate(way) if axis != self.axis]
        return prod(each.longest_source for each in across), prod(each.longest_native for each in across)

    @property
    def _zoom(self) -> float:
        """Planes of the source for a plane of the result."""
        return self.resampling.source_shape[self.axis] / self.resampling.shape[self.axis]


def sum_of_parts(parts: Mapping[str, int]) -> int:
    """Bytes of what is there at the same time: of a slab and of windows in the network the larger."""
    together = {name: value for name, value in parts.items() if name not in ("slab", "window")}
    return sum(together.values()) + max(parts["slab"], parts["window"])


def seam_bytes(sweep: Sweep, held_voxels: int) -> int:
    """What counting seams takes: classes and flags of voxels, and what mirrored passes of windows add up to.

    Args:
        sweep: Which windows are compared; 0 bytes where it counts no seams.
        held_voxels: Of the prepared grid, at a time.
    """
    if not sweep.sliding.count_seams:
        return 0
    summed = sweep.sliding.window_batch * prod(sweep.sliding.window) * sweep.gathered
    return SEAM_BYTES * held_voxels + (FLOAT_BYTES * summed if sweep.sliding.tta_axes else 0)


def window_bytes(sliding: SlidingWindow, num_channels: int, num_features: int | None) -> int:
    """Windows at once, in the network and through it, see `network_bytes` and `waiting_bytes`."""
    return network_bytes(sliding, num_channels, num_features) + waiting_bytes(sliding, num_features)


def network_bytes(sliding: SlidingWindow, num_channels: int, num_features: int | None) -> int:
    """What a network has alive of the windows at once: an estimate, for networks of others a low one."""
    voxels = FLOAT_BYTES * sliding.window_batch * prod(sliding.window)
    channels = num_features if num_features is not None else sliding.num_classes
    kept = KEPT_BLOCKS * channels if voxels * channels < SMALLEST_RETURNED_BYTES else 0
    if num_features is None:
        return voxels * (2 * num_channels + 2 * channels + kept)
    blocked = -(-num_features // CHANNELS_PER_BLOCK) * CHANNELS_PER_BLOCK
    live = LIVE_ACTIVATIONS * num_features + BLOCKED_ACTIVATIONS * blocked
    return int(voxels * (2 * num_channels + live + kept))


def waiting_bytes(sliding: SlidingWindow, num_features: int | None) -> int:
    """Of windows that are through the network and wait for their turn, beside those that are in it."""
    if sliding.threads is None:
        return 0
    channels = num_features if num_features is not None else sliding.num_classes
    return FLOAT_BYTES * sliding.window_batch * prod(sliding.window) * WINDOWS_AHEAD * channels
