"""What a way to predict a volume takes: bytes by what takes them, and what is handed on at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from pipeline.inference.sliding_window import held_planes
from pipeline.inference.window_memory import library_bytes
from pipeline.inference.window_outputs import Network, gathers_features, num_features
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.forward_memory import FLOAT_BYTES
from pipeline.preprocessing.score_resampling import ScoreResampling

# Of a voxel in which windows are compared: the first one's class in 16 bits, and three flags.
SEAM_BYTES = 5
# What is taken of finished planes at a time, and of that, scores of some classes; larger pieces are not faster. Of
# small volumes it is this share of what is gathered.
SLAB_BYTES = 64 << 20
CHUNK_BYTES = 16 << 20
# Where planes are not interpolated, so that a piece needs no planes beside its own: features that stay in a CPU's cache
# while all classes are made from them take 0.57 (8 features) to 0.9 (32) of the time of larger pieces.
CACHED_SLAB_BYTES = 8 << 20
SLAB_SHARE = 1 / 4


@dataclass(frozen=True)
class Sweep:
    """One network on its way over a volume, or one of its mirrored passes.

    Attributes:
        sliding: The windows.
        network: None stands for one that gives scores.
    """

    sliding: SlidingWindow
    network: Network | None = None

    @property
    def of_features(self) -> bool:
        """Whether features are gathered in place of scores."""
        return self.network is not None and gathers_features(self.network, self.sliding.num_classes)

    @property
    def gathered(self) -> int:
        """Channels that are gathered."""
        features = num_features(self.network) if self.network is not None and self.of_features else None
        return self.sliding.num_classes if features is None else features


@dataclass(frozen=True)
class Division:
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


def planes_kept(resampling: ScoreResampling, axis: int) -> int:
    """Planes that are handed on once more along an axis."""
    return 0 if resampling.is_identity(axis) else 1


@dataclass(frozen=True, kw_only=True)
class Need:
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

    def parts(self, way: Sequence[Division]) -> dict[str, int]:
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
            "libraries": max(library_bytes(sweep.sliding) for sweep in self.sweeps),
            "seams": sum(self._seam_bytes(sweep, source) for sweep in self.sweeps),
        }

    def pieces(self, way: Sequence[Division]) -> tuple[int, int]:
        """Planes of the result at a time, and classes at a time."""
        source, native = self._planes(way)
        slab = min(SLAB_BYTES, SLAB_SHARE * self._gathered_bytes(source))
        taken = min(CACHED_SLAB_BYTES, slab) if self.resampling.is_identity(self.axis) else slab
        rows = max(1, int(taken / (FLOAT_BYTES * self.gathered * source * self._zoom)))
        rows = min(rows, self.resampling.shape[self.axis])
        voxels = rows * max(native, source * self._zoom)
        chunk = max(1, int(min(CHUNK_BYTES, SLAB_SHARE * slab) / (FLOAT_BYTES * voxels)))
        return rows, min(chunk, self.sweeps[0].sliding.num_classes)

    def _gathered_bytes(self, source: int) -> int:
        """Means and the sum of their weights."""
        held = sum((sweep.gathered + 1) * self._held_planes(sweep) for sweep in self.sweeps)
        return FLOAT_BYTES * held * source

    def _seam_bytes(self, sweep: Sweep, source: int) -> int:
        return seam_bytes(sweep.sliding, gathered=sweep.gathered, held_voxels=self._held_planes(sweep) * source)

    def _held_planes(self, sweep: Sweep) -> int:
        keep = planes_kept(self.resampling, self.axis)
        return held_planes(sweep.sliding, self.axis, self.resampling.source_shape, keep)

    def _planes(self, way: Sequence[Division]) -> tuple[int, int]:
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


def seam_bytes(sliding: SlidingWindow, *, gathered: int, held_voxels: int) -> int:
    """What counting seams takes: classes and flags of voxels, and what mirrored passes of windows add up to.

    Args:
        sliding: The windows that are compared; 0 bytes where they are not.
        gathered: Channels that are added up.
        held_voxels: Of the prepared grid, at a time.
    """
    if not sliding.count_seams:
        return 0
    summed = sliding.window_batch * prod(sliding.window) * gathered
    return SEAM_BYTES * held_voxels + (FLOAT_BYTES * summed if sliding.tta_axes else 0)
