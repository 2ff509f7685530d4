"""Which case and which box of voxels the n-th training patch is: a pure function of the seed and n.

Legend: `index` is the number of a training sample since the start of training, over all epochs and processes. Nothing
here remembers what was drawn before, so a resumed run, or one with other data workers, sees the same patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.store import CaseRecord, PatchLocation

VoxelReader = Callable[[str, int], NDArray[np.int32]]

# Told apart from the streams of single samples, whose third word is zero.
_ORDER_STREAM = 0x6F726472


@dataclass(frozen=True)
class PatchChoice:
    """One training patch.

    Attributes:
        record: The case it is cut from.
        location: The box; its start may be negative and its end may pass the volume.
        centre_class: Class index of the voxel it was aimed at, or None for a uniform position.
    """

    record: CaseRecord
    location: PatchLocation
    centre_class: int | None


class PatchSampler:
    """Chooses training patches, stateless by sample number.

    Cases come in passes: each pass is a seeded permutation of all cases, so each is seen equally often. Patches that
    aim at foreground are spread evenly instead of drawn: sample n aims when `ceil((n + 1) f) > ceil(n f)`, so any
    run of m samples, such as the micro-batches of one effective batch, holds m * f of them, rounded up or down (the
    idea is nnU-Net's fixed share per batch, Isensee et al. 2021, carried over to accumulation). Such a patch is
    centred on a random voxel of a class drawn uniformly from those present in the case, so that rare classes are
    seen as often as common ones; a case without foreground gets a uniform position. Every box is then moved to
    overlap its volume as far as possible; along axes where the volume is smaller than the patch it is centred.

    Args:
        records: The cases to draw from, in any order.
        patch_size: Patch along i, j, k.
        foreground_fraction: Share of samples that aim at foreground, 0 to 1.
        seed: At least 0.

    Raises:
        InputError: There are no cases, or an option is out of range.
    """

    def __init__(
        self, records: Sequence[CaseRecord], *, patch_size: Shape3, foreground_fraction: float, seed: int
    ) -> None:
        if not records:
            raise InputError("there are no cases to draw patches from")
        if seed < 0:
            raise InputError(f"seed: must be at least 0, got {seed}")
        if not 0 <= foreground_fraction <= 1:
            raise InputError(f"foreground_fraction: must be 0 to 1, got {foreground_fraction}")
        self.patch_size = patch_size
        self.foreground_fraction = foreground_fraction
        self.seed = seed
        self._records = tuple(sorted(records, key=lambda record: record.case_id))
        self._pass_order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def choose(self, index: int, rng: np.random.Generator, read_voxels: VoxelReader) -> PatchChoice:
        """The patch of sample `index`.

        Args:
            index: Global sample number.
            rng: The sample's own generator, `default_rng([seed, index])`.
            read_voxels: Gives voxels (N, 3) of a class of a case, as `CaseStore.foreground_voxels` does.
        """
        record = self.record_of(index)
        centre_class: int | None = None
        present = [c for c, count in enumerate(record.voxels_by_class) if c > 0 and count > 0]
        if present and self.is_foreground(index):
            centre_class = present[int(rng.integers(len(present)))]
            voxels = read_voxels(record.case_id, centre_class)
            centre = voxels[int(rng.integers(len(voxels)))]
            start = tuple(int(c) - size // 2 for c, size in zip(centre, self.patch_size, strict=True))
        else:
            start = tuple(int(rng.integers(min(0, n - p), max(0, n - p) + 1)) for n, p in self._sizes(record))
        location = PatchLocation(self._within(record, start), self.patch_size)
        return PatchChoice(record, location, centre_class)

    def is_foreground(self, index: int) -> bool:
        """Whether sample `index` aims at foreground."""
        fraction = self.foreground_fraction
        return math.ceil((index + 1) * fraction) > math.ceil(index * fraction)

    def record_of(self, index: int) -> CaseRecord:
        """The case of sample `index`."""
        number, position = divmod(index, len(self._records))
        if self._pass_order[0] != number:
            order = np.random.default_rng([self.seed, number, _ORDER_STREAM]).permutation(len(self._records))
            self._pass_order = (number, order)
        return self._records[int(self._pass_order[1][position])]

    def _sizes(self, record: CaseRecord) -> list[tuple[int, int]]:
        return list(zip(record.shape, self.patch_size, strict=True))

    def _within(self, record: CaseRecord, start: Sequence[int]) -> Shape3:
        i, j, k = (
            min(max(s, 0), n - p) if n >= p else -((p - n) // 2)
            for s, (n, p) in zip(start, self._sizes(record), strict=True)
        )
        return i, j, k
