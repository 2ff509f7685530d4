"""How many processes preprocessing is worth: bounded by CPUs, by memory, and by the work there is."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from math import prod
from pathlib import Path

from pipeline.allocation import resolve_num_workers
from pipeline.datasets.dataset import Case
from pipeline.errors import InputError
from pipeline.io.image_file import read_layout, size_on_disk
from pipeline.plan import Plan

# One process takes a few seconds for so much, about what the others need to start.
FEW_BYTES = 24 << 20
NUM_LARGEST = 8
PROCESS_BYTES = 200 << 20
# Measured peaks: raw file, float32 copies and masks at native resolution, then spline coefficients and their
# transposed copies at the larger of both resolutions.
BYTES_PER_NATIVE_VOXEL = 20
BYTES_PER_RESAMPLED_VOXEL = 24


def fitting_num_workers(cases: Sequence[Case], plan: Plan, option: int | str) -> int:
    """The worker count: the option itself, or for "auto" what CPUs, memory and the amount of work allow."""
    sizes = {path: size_on_disk(path) for case in cases for path in case.images}
    if not isinstance(option, int) and sum(sizes.values()) < FEW_BYTES:
        return 1
    return resolve_num_workers(option, bytes_per_worker=estimate_case_bytes(cases, plan))


def estimate_case_bytes(cases: Sequence[Case], plan: Plan) -> int:
    """Memory that one process takes for the largest case, from the headers of the eight largest files."""
    sizes = [_estimate_bytes(native, resampled, plan) for native, resampled in _largest_voxels(cases, plan)]
    return PROCESS_BYTES + max(sizes, default=0)


def largest_case_voxels(cases: Sequence[Case], plan: Plan) -> tuple[int, int]:
    """Most voxels of an image as it is and at the plan's spacing, from the headers of the eight largest files."""
    sizes = _largest_voxels(cases, plan)
    native = max((voxels for voxels, _ in sizes), default=0)
    return native, max((resampled or voxels for voxels, resampled in sizes), default=0)


def _largest_voxels(cases: Sequence[Case], plan: Plan) -> list[tuple[int, int]]:
    """Voxels before and after resampling, 0 where there is none, of the largest files."""
    images = [path for case in cases for path in case.images]
    return [_count_voxels(path, plan) for path in nlargest(NUM_LARGEST, images, key=size_on_disk)]


def _count_voxels(path: Path, plan: Plan) -> tuple[int, int]:
    try:
        grid = read_layout(path).grid
    except InputError:
        # The case fails with this error when its turn comes.
        return 0, 0
    native = prod(grid.shape)
    growth = prod(now / target for now, target in zip(grid.spacing, plan.target_spacing, strict=True))
    return native, int(native * growth) if growth != 1.0 else 0


def _estimate_bytes(native: int, resampled: int, plan: Plan) -> int:
    # Shrinking takes what the larger grid does.
    larger = max(native, resampled) if resampled else 0
    return plan.num_channels * (BYTES_PER_NATIVE_VOXEL * native + 4 * larger) + BYTES_PER_RESAMPLED_VOXEL * larger
