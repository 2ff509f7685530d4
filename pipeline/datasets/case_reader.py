"""Read one case's image and label onto one grid in RAS order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.datasets.case import Case
from pipeline.errors import InputError
from pipeline.geometry import Grid, format_shape, format_spacing
from pipeline.io.image_file import read_label, read_layout, read_volume
from pipeline.io.resample import resample_volume
from pipeline.io.volume import Volume
from pipeline.log import get_logger


def read_case_image(case: Case) -> Volume:
    """Read every channel of a case onto the grid of its first one.

    Returns:
        (C, I, J, K) float32 in RAS order; `source` is that of the first file. Channels on another grid are resampled
        linearly and said in the log.

    Raises:
        InputError: A file is missing or cannot be read, or one of several files holds more than one channel.
    """
    if not case.images:
        raise InputError("has no image", where=case.case_id)
    image, notes = stack_channels([read_volume(path) for path in case.images], case.case_id)
    for note in notes:
        get_logger().info("%s: %s", case.case_id, note)
    return image


def read_case_label(case: Case, *, grid: Grid | None = None) -> Volume:
    """Read the label of a case, checked to lie on its image's grid.

    Args:
        case: The case.
        grid: Its image's, in RAS order, where that was read; None reads the headers of its first channel for it, which
            for a DICOM series are those of all its files.

    Returns:
        (1, I, J, K) integers in RAS order: the values of the file, not class indices.

    Raises:
        InputError: The label is missing, cannot be read, holds fractions, or lies on another grid than the image.
    """
    if case.label is None:
        raise InputError("has no label", where=case.case_id)
    label = read_label(case.label)
    if grid is None and case.images:
        grid = read_layout(case.images[0]).grid
    if grid is not None and (mismatch := grid_mismatch(grid, label.grid)):
        raise InputError(mismatch, where=case.case_id, fix="Resample the label onto its image")
    return label


def stack_channels(volumes: Sequence[Volume], case_id: str) -> tuple[Volume, tuple[str, ...]]:
    """Put channels on the first one's grid, and say which ones had to be resampled.

    Args:
        volumes: One file each, in RAS order; a single one may hold several channels.
        case_id: For messages.
    """
    first = volumes[0]
    if len(volumes) == 1:
        return first, ()
    several = [index for index, volume in enumerate(volumes) if volume.num_channels > 1]
    if several:
        raise InputError(
            f"image file {several[0]} of {len(volumes)} holds {volumes[several[0]].num_channels} channels",
            where=case_id,
            fix="Give one file per channel, or one 4D file for all",
        )
    foreign = [index for index, volume in enumerate(volumes) if not first.grid.is_close(volume.grid)]
    arrays = [
        resample_volume(volume, first.grid).array if index in foreign else volume.array
        for index, volume in enumerate(volumes)
    ]
    target = describe_grid(first.grid)
    notes = tuple(
        f"channel {index} ({describe_grid(volumes[index].grid)}) is resampled to channel 0 ({target})"
        for index in foreign
    )
    return Volume(np.concatenate(arrays), first.grid, first.source), notes


def describe_grid(grid: Grid) -> str:
    """Shape and spacing, for messages."""
    return f"{format_shape(grid.shape)} at {format_spacing(grid.spacing)} mm"


def grid_mismatch(image: Grid, label: Grid) -> str:
    """How the grid of a label differs from its image's; "" when it does not."""
    if image.shape != label.shape:
        return f"the label has {format_shape(label.shape)} voxels, the image {format_shape(image.shape)}"
    if not image.is_close(label):
        return f"the label lies up to {image.distance_mm(label):.3g} mm away from the image (their affines differ)"
    return ""
