"""Crop to the box of non-zero voxels: scanners and skull-stripping leave wide margins of exact zeros."""

from __future__ import annotations

from pipeline.io.volume import Volume, foreground_box
from pipeline.store import PatchLocation


def foreground_location(volume: Volume) -> PatchLocation:
    """The box that holds every voxel that is not 0 in any channel; the whole volume when all are 0.

    Images whose air is not 0 (CT: -1000) keep their size.
    """
    i, j, k = foreground_box(volume.array)
    return PatchLocation((i.start, j.start, k.start), (i.stop - i.start, j.stop - j.start, k.stop - k.start))
