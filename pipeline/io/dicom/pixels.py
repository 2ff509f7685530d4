"""Pixels of frames: pydicom and its plugins decode them; here they are scaled and put in their place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.io.dicom.codestream import PLUGINS, RLE, DamagedFrameError, check_frame, unpack_rle
from pipeline.io.dicom.frames import Frame, PixelFormat, Stack
from pipeline.io.dicom.pixel_location import fragments_of
from pipeline.io.dicom.quiet import quiet_dicom

# Neighbouring slices share cache lines of the volume, so that a thread takes a run of them.
SLICES_PER_TASK = 16
# float32 holds every whole number up to here, so that whole slopes and intercepts need no float64.
LARGEST_EXACT = 2**24


class FrameReader:
    """Reads frames, one after the other, and keeps the file of the last one open.

    Args:
        pixels: Format of all frames.
    """

    def __init__(self, pixels: PixelFormat) -> None:
        self._pixels = pixels
        self._open: tuple[Path, BinaryIO] | None = None
        self._inflated: tuple[Path, Any] | None = None
        self._fragments: tuple[Path, list[tuple[int, int]]] | None = None
        self._sheet: tuple[Path, int, NDArray[Any]] | None = None

    def close(self) -> None:
        """Close the open file."""
        if self._open:
            self._open[1].close()
        self._open = None

    def stored(self, frame: Frame) -> NDArray[Any]:
        """Stored values (rows, columns) of a frame.

        Raises:
            InputError: The frame cannot be decoded, or is of another size.
        """
        try:
            sheet = self._decoded(frame)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=frame.path.name) from None
        except DamagedFrameError as error:
            what = f"frame {frame.index} cannot be decoded (it {error})"
            raise InputError(what, where=frame.path.name, fix="Replace the file") from None
        except Exception:
            # What decoders say may quote the file; the reason that a person can act on is that it is broken.
            fix = "Replace the file"
            raise InputError(f"frame {frame.index} cannot be decoded", where=frame.path.name, fix=fix) from None
        if sheet.shape != (self._pixels.rows, self._pixels.columns):
            raise InputError(f"frame {frame.index} has another size than the header says", where=frame.path.name)
        tile = frame.tile
        if tile is None:
            return sheet
        return sheet[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns]

    def _decoded(self, frame: Frame) -> NDArray[Any]:
        if frame.tile is None:
            return self._decode(frame)
        if self._sheet is None or self._sheet[:2] != (frame.path, frame.index):
            self._sheet = (frame.path, frame.index, self._decode(frame))
        return self._sheet[2]

    def _decode(self, frame: Frame) -> NDArray[Any]:
        from pydicom.pixels.decoders.base import get_decoder
        from pydicom.uid import UID

        if frame.data is None or frame.data.offset is None:
            return self._decode_whole_file(frame)
        syntax, source = frame.data.transfer_syntax, self._stream(frame.path)
        if frame.data.length is None:
            return decode_frame(self._compressed(source, frame), syntax, self._pixels)
        decoder = get_decoder(UID(syntax))
        source.seek(frame.data.offset)
        options = _decoder_options(self._pixels, num_frames=frame.data.num_frames)
        array: NDArray[Any] = decoder.as_array(source, index=frame.index, raw=True, **options)[0]
        return array

    def _compressed(self, source: BinaryIO, frame: Frame) -> bytes:
        """All bytes of a compressed frame; fragments are counted, since a table of offsets may be wrong or missing."""
        from pydicom.encaps import get_frame

        if frame.data is None or frame.data.offset is None:
            raise ValueError("no place of the pixels is known")
        source.seek(frame.data.offset)
        if self._fragments is None or self._fragments[0] != frame.path:
            self._fragments = (frame.path, fragments_of(source))
        found = self._fragments[1]
        if frame.data.num_frames == 1 and (len(found) == 1 or frame.data.transfer_syntax != RLE):
            return b"".join(_part(source, *fragment) for fragment in found)
        if len(found) == frame.data.num_frames:
            return _part(source, *found[frame.index])
        source.seek(frame.data.offset)
        return get_frame(source, frame.index, number_of_frames=frame.data.num_frames)

    def _decode_whole_file(self, frame: Frame) -> NDArray[Any]:
        from pydicom import dcmread
        from pydicom.pixels.utils import pixel_array

        if self._inflated is None or self._inflated[0] != frame.path:
            self._inflated = (frame.path, dcmread(frame.path, force=True))
        array: NDArray[Any] = pixel_array(self._inflated[1], index=frame.index, raw=True)
        return array

    def _stream(self, path: Path) -> BinaryIO:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, path.open("rb"))
        return self._open[1]


def decode_frame(data: bytes, syntax: str, pixels: PixelFormat) -> NDArray[Any]:
    """Stored values (rows, columns) of a compressed frame, which is looked at before a decoder gets it.

    Args:
        data: All bytes of the frame.
        syntax: Transfer syntax UID, one of `PLUGINS`.
        pixels: Format of the frame.

    Raises:
        DamagedFrameError: The frame is not what the format says; decoders raise others.
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID, ExplicitVRLittleEndian

    options = {**_decoder_options(pixels, num_frames=1), "index": 0, "raw": True}
    if syntax == RLE:
        unpacked: NDArray[Any] = get_decoder(ExplicitVRLittleEndian).as_array(unpack_rle(data, pixels), **options)[0]
        return unpacked
    check_frame(data, syntax, pixels)
    source, plugin = encapsulate([data], has_bot=False), PLUGINS[syntax]
    array: NDArray[Any] = get_decoder(UID(syntax)).as_array(source, decoding_plugin=plugin, **options)[0]
    return array


def _decoder_options(pixels: PixelFormat, *, num_frames: int) -> dict[str, Any]:
    return {
        "rows": pixels.rows,
        "columns": pixels.columns,
        "samples_per_pixel": 1,
        "photometric_interpretation": pixels.photometric or "MONOCHROME2",
        "bits_allocated": pixels.bits_allocated,
        "bits_stored": pixels.bits_stored,
        "pixel_representation": int(pixels.is_signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": "OW" if pixels.bits_allocated > 8 else "OB",
        "number_of_frames": num_frames,
    }


def _part(source: BinaryIO, offset: int, length: int) -> bytes:
    source.seek(offset)
    return source.read(length)


def read_stack(stack: Stack, array: NDArray[np.float32], *, num_threads: int) -> None:
    """Fill `array` with the intensities of a stack: stored value x slope + intercept, each slice with its own.

    Args:
        stack: Frames in order.
        array: (phases, columns, rows, slices), in any layout; every voxel is written.
        num_threads: Reading, scaling and most decoders release the interpreter's lock.

    Raises:
        InputError: A frame cannot be decoded.
    """
    num_slices = stack.grid.shape[2]
    runs = [
        (phase, range(start, min(start + SLICES_PER_TASK, num_slices)))
        for phase in range(len(stack.frames))
        for start in range(0, num_slices, SLICES_PER_TASK)
    ]
    with quiet_dicom(), ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(lambda run: _read_run(stack, array, *run), runs):
            pass


def _read_run(stack: Stack, array: NDArray[np.float32], phase: int, slices: range) -> None:
    reader = FrameReader(stack.pixels)
    try:
        for k in slices:
            frame = stack.frames[phase][k]
            _write_scaled(reader.stored(frame), frame, array[phase, :, :, k].T)
    finally:
        reader.close()


def _write_scaled(stored: NDArray[Any], frame: Frame, out: NDArray[np.float32]) -> None:
    """Write the intensities of stored values, in the precision that rounds only once, to float32.

    Args:
        stored: (rows, columns).
        frame: Slope and intercept.
        out: (rows, columns); written in one pass where nothing has to be rounded in between.
    """
    is_whole = frame.slope == 1.0 and frame.intercept.is_integer()
    if is_whole and stored.dtype.itemsize <= 2 and abs(frame.intercept) < LARGEST_EXACT - 2**16:
        np.add(stored, np.float32(frame.intercept), out=out, dtype=np.float32, casting="unsafe")
    elif (frame.slope, frame.intercept) == (1.0, 0.0):
        out[...] = stored
    else:
        out[...] = stored * np.float64(frame.slope) + frame.intercept
