"""DICOM segmentations to structures on the grid of their image, one at a time.

Frames go where their geometry says; the order of frames and the dimension indices mean nothing here. pydicom decodes
the pixels, but for packed bits. highdicom's `get_volume` reads all of these files too, but into a lattice that it makes
up from the frames that are there (165 slices for the two of a sparse one), not into the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.io.dicom.pixels import decode_frame
from pipeline.io.dicom.placement import read_pixel_format
from pipeline.io.dicom.seg_header import (
    Segment,
    SegmentFrame,
    background_value,
    read_dataset,
    read_frames,
    read_segments,
    seg_errors_named,
    segmentation_type,
    slice_spacing,
)
from pipeline.io.dicom.seg_placement import Placement, check_slice_spacing, place
from pipeline.io.dicom.structures import Structure

_Placed = tuple[SegmentFrame, Placement]

# A fraction that rounding brought just below the threshold is inside.
_FRACTION_ROUNDING = 1e-9


def iter_segments(
    path: Path, grid: Grid, *, wanted: Callable[[str], bool], threshold: float = 0.5
) -> Iterator[Structure]:
    """The segments of a file as masks on an image's grid, in the order in which they are described.

    One mask is made at a time. Where a segment has no frame is background, so one without any is an empty mask. The
    background of a label map (PixelPaddingValue, the code for background, or 0 where neither is given) is no segment.

    Args:
        path: The file.
        grid: Of the image, in its file order, with its RAS+ affine.
        wanted: Whether a segment of this name is wanted; others are not decoded.
        threshold: In FRACTIONAL files a voxel is inside where its fraction is at least this, in (0, 1].

    Raises:
        InputError: The file is damaged or no segmentation, its frames do not lie on the grid's voxels to a tenth of a
            voxel, set voxels lie outside of the grid, or a segment has two frames at one place.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be in (0, 1], got {threshold}")
    with seg_errors_named(path):
        dataset = read_dataset(path, with_pixels=True)
        segments = [segment for segment in read_segments(dataset) if not segment.is_background]
        source = _source(dataset, grid, threshold, {segment.number for segment in segments if wanted(segment.name)})
    for segment in segments:
        if wanted(segment.name):
            with seg_errors_named(path):
                mask = source.mask(segment.number)
            yield Structure(segment.name, segment.number, mask)


@dataclass(frozen=True, eq=False)
class _Masks:
    """Masks of a file whose frames belong to a segment each (BINARY, FRACTIONAL)."""

    dataset: Any
    grid: Grid
    lowest: float
    frames: dict[int, list[_Placed]]

    def mask(self, number: int) -> NDArray[np.bool_]:
        """(i, j, k); in Fortran order, in which a frame is a run of memory."""
        mask = np.zeros(self.grid.shape, bool, order="F")
        for placement, pixels in _decode(self.dataset, self.frames.get(number, [])):
            view, part = placement.window(mask, pixels >= self.lowest, 0)
            view |= part
        return mask


@dataclass(frozen=True, eq=False)
class _LabelMap:
    """Masks of a file whose pixels are numbers of segments (LABELMAP): the map is held, a mask made from it."""

    labels: NDArray[Any]

    def mask(self, number: int) -> NDArray[np.bool_]:
        """(i, j, k), in Fortran order."""
        mask: NDArray[np.bool_] = self.labels == number
        return mask


def _source(dataset: Any, grid: Grid, threshold: float, wanted: set[int]) -> _Masks | _LabelMap:
    described, frames = read_segments(dataset), read_frames(dataset)
    kind = segmentation_type(dataset)
    if unknown := {f.segment for f in frames if f.segment is not None} - {segment.number for segment in described}:
        raise InputError(f"has frames of segment {min(unknown)}, which it does not describe")
    frames = [frame for frame in frames if frame.segment is None or frame.segment in wanted]
    # Segments share the planes of the image: there are far fewer of those than frames.
    places = {plane: place(plane, grid) for plane in {frame.plane for frame in frames}}
    placed = [(frame, places[frame.plane]) for frame in frames]
    if placed:
        check_slice_spacing([placement for _, placement in placed], slice_spacing(dataset), grid)
    if kind == "LABELMAP":
        _check_places(placed)
        return _LabelMap(_label_map(dataset, grid, placed, described))
    by_segment: dict[int, list[_Placed]] = {number: [] for number in wanted}
    for frame, placement in placed:
        by_segment[frame.segment or 0].append((frame, placement))
    for own in by_segment.values():
        _check_places(own)
    return _Masks(dataset, grid, 1 if kind == "BINARY" else _lowest_value(dataset, threshold), by_segment)


def _lowest_value(dataset: Any, threshold: float) -> float:
    """The lowest stored value that is inside."""
    largest = int(dataset.get("MaximumFractionalValue") or 0)
    if largest < 1:
        raise InputError("is FRACTIONAL but lacks MaximumFractionalValue")
    return threshold * largest - _FRACTION_ROUNDING


def _check_places(placed: list[_Placed]) -> None:
    """Refuse two frames of a segment at one place: of several points in time, neither is the mask."""
    if len({placement.box(frame.plane) for frame, placement in placed}) < len(placed):
        number = placed[0][0].segment
        of = f" of segment {number}" if number is not None else ""
        raise InputError(f"has two frames{of} at one place", fix="Give a segmentation of one point in time")


def _label_map(dataset: Any, grid: Grid, placed: list[_Placed], described: list[Segment]) -> NDArray[Any]:
    background = background_value(dataset)
    labels = np.full(grid.shape, background, np.uint8 if dataset.BitsAllocated <= 8 else np.uint16, order="F")
    known = {background, *(segment.number for segment in described)}
    for placement, pixels in _decode(dataset, placed):
        found = np.flatnonzero(np.bincount(pixels.ravel()))
        if unknown := set(found.tolist()) - known:
            raise InputError(f"has voxels of segment {min(unknown)}, which it does not describe")
        view, part = placement.window(labels, pixels, background)
        view[...] = part
    return labels


def _decode(dataset: Any, placed: list[_Placed]) -> Iterator[tuple[Placement, NDArray[np.unsignedinteger[Any]]]]:
    """The places and the stored pixels (rows, columns) of frames."""
    if not placed:
        return
    indices = [frame.index for frame, _ in placed]
    for (_, placement), pixels in zip(placed, _pixels(dataset, indices), strict=True):
        yield placement, pixels


def _pixels(dataset: Any, indices: list[int]) -> Iterator[NDArray[Any]]:
    syntax = dataset.file_meta.TransferSyntaxUID
    if dataset.BitsAllocated == 1 and not syntax.is_encapsulated:
        if not syntax.is_little_endian:
            raise InputError("has bits in big-endian words, which is not supported")
        # pydicom 3.0 reads a byte too few of frames that begin and end within bytes (5 x 7 pixels, frame 1).
        return (_unpacked(dataset, index) for index in indices)
    if syntax.is_encapsulated:
        return _decompressed(dataset, indices)
    from pydicom.pixels.utils import iter_pixels

    return iter_pixels(dataset, indices=indices, raw=True)


def _decompressed(dataset: Any, indices: list[int]) -> Iterator[NDArray[Any]]:
    """Frames that were looked at before they are decoded: damaged ones can end the process."""
    from pydicom.encaps import generate_frames

    num_frames, wanted = int(dataset.NumberOfFrames), set(indices)
    frames = enumerate(generate_frames(dataset.PixelData, number_of_frames=num_frames))
    compressed = {index: data for index, data in frames if index in wanted}
    pixels = read_pixel_format(dataset)
    return (decode_frame(compressed[index], str(dataset.file_meta.TransferSyntaxUID), pixels) for index in indices)


def _unpacked(dataset: Any, index: int) -> NDArray[np.uint8]:
    """A frame of one bit per pixel; frames follow each other without a gap, so they need not begin at a byte."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    first, end = index * rows * columns, (index + 1) * rows * columns
    packed = np.frombuffer(dataset.PixelData, np.uint8)[first // 8 : (end + 7) // 8]
    bits = np.unpackbits(packed, bitorder="little")[first % 8 :][: end - first]
    if bits.size < end - first:
        raise InputError("is truncated")
    return bits.reshape(rows, columns)
