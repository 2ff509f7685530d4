"""What is known of a series before its pixels are decoded: frames with their places, and stacks of frames in order.

Legend: positions and directions are DICOM's, in LPS+ millimetres; grids are RAS+ like everywhere else. The "file order"
of a stack is (i, j, k) = (columns, rows, slices): i runs along a row of pixels, j down the rows, k along the normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.geometry import Grid

Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the pixels of a file are stored; the same in all files of a stack.

    Attributes:
        rows, columns: Of a stored frame; of the whole sheet where a frame holds tiles.
        bits_allocated, bits_stored, high_bit: Of a pixel.
        is_signed: Two's complement.
        samples: Values per pixel; 1 for intensities.
        photometric: Photometric interpretation, such as "MONOCHROME2".
    """

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    samples: int
    photometric: str


@dataclass(frozen=True, kw_only=True)
class PixelData:
    """Where the pixels of a file are.

    Attributes:
        transfer_syntax: UID; how they are encoded.
        offset: Of the first byte of the element's value in the file; None where the file has to be inflated first.
        length: Bytes of the value; None for encapsulated (compressed) frames.
        num_frames: Frames in the file.
    """

    transfer_syntax: str
    offset: int | None
    length: int | None
    num_frames: int = 1


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A slice that is part of a stored frame (Siemens mosaic): its first row and column, and its size."""

    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One slice: where its pixels are, and where it lies.

    Attributes:
        path: The file.
        index: Number of the frame in its file, from 0.
        instance_uid: SOP instance of the file.
        instance_number: As the scanner counted; for messages only, None where it is missing.
        position: Centre of the first pixel, LPS+ mm.
        row_direction: Along a row of pixels (i rises); of unit length but for the rounding of the header.
        column_direction: Down a column of pixels (j rises); likewise.
        row_spacing, column_spacing: Distance between rows (along j), and between columns (along i), in mm.
        slope, intercept: Stored value to intensity.
        has_rescale: Whether the header gives the slope, and the intercept.
        phase: What tells frames at one position apart, by DICOM keyword, in the order it is looked at.
        thickness: Extent of the slice along the normal in mm, for a slice that has no neighbour; 0 where unknown.
        tile: Part of the stored frame, None for all of it.
        data: Where the file's pixels are; None reads the file anew.
    """

    path: Path
    index: int
    instance_uid: str
    instance_number: int | None
    position: Vector
    row_direction: Vector
    column_direction: Vector
    row_spacing: float
    column_spacing: float
    slope: float = 1.0
    intercept: float = 0.0
    has_rescale: tuple[bool, bool] = (False, False)
    phase: tuple[tuple[str, str], ...] = ()
    thickness: float = 0.0
    tile: Tile | None = None
    data: PixelData | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Frames of one series as a volume, in order and checked: nothing is missing, doubled or out of place.

    Attributes:
        name: The series for messages, without anything that tells the patient.
        frames: By phase and slice: `frames[phase][k]`; all phases hold the same positions.
        phase_names: One per phase, such as "EchoTime 2.4"; ("",) for a single phase.
        pixels: Format of all files.
        grid: (columns, rows, slices) and the RAS+ affine in file order; sheared where the gantry is tilted.
        series_uid, frame_of_reference: UIDs; "" where the files have none.
    """

    name: str
    frames: tuple[tuple[Frame, ...], ...]
    phase_names: tuple[str, ...]
    pixels: PixelFormat
    grid: Grid
    series_uid: str = ""
    frame_of_reference: str = ""
