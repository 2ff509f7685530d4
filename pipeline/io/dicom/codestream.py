"""Compressed frames looked at before they are decoded: whole, of the size that the header says, and well formed.

A decoder of damaged data may fill in what is missing, take minutes, or end the whole process, which no exception
handler can stop. So only one decoder is asked for each transfer syntax, and only for data that stand up to this look.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.io.dicom.frames import PixelFormat

# gdcm aborts on damaged JPEG-LS and JPEG 2000; it is asked only where nothing else decodes.
PLUGINS = {
    "1.2.840.10008.1.2.5": "pylibjpeg",
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "pillow",
    "1.2.840.10008.1.2.4.57": "gdcm",
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "gdcm",
    "1.2.840.10008.1.2.4.91": "gdcm",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
}
RLE = "1.2.840.10008.1.2.5"
# Start-of-frame markers that the syntaxes of JPEG may hold.
_BASELINE, _LOSSLESS, _JPEG_LS = (0xC0, 0xC1), (0xC3,), (0xF7,)
_STARTS = {"50": _BASELINE, "51": _BASELINE, "57": _LOSSLESS, "70": _LOSSLESS, "80": _JPEG_LS, "81": _JPEG_LS}
_END_OF_IMAGE = b"\xff\xd9"
_HUFFMAN_TABLES, _START_OF_SCAN, _RESTART_INTERVAL = 0xC4, 0xDA, 0xDD
_RESTARTS = range(0xD0, 0xD8)
_JP2_SIGNATURE, _J2K_START = b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51"
# A run of 128 bytes takes two.
_LARGEST_RLE_RATIO = 64


class DamagedFrameError(ValueError):
    """A compressed frame that is not what its header says, or not whole; the message holds nothing of the file."""


def check_frame(data: bytes, syntax: str, pixels: PixelFormat) -> None:
    """Look at a compressed frame without decoding it.

    Args:
        data: All bytes of the frame.
        syntax: Transfer syntax UID.
        pixels: What the header says of it.

    Raises:
        DamagedFrameError: It must not be given to a decoder.
    """
    if syntax == RLE:
        _rle_segments(data, pixels)
    elif syntax.removeprefix("1.2.840.10008.1.2.4.") in _STARTS:
        _check_jpeg(data.rstrip(b"\0"), _STARTS[syntax.rpartition(".")[2]], pixels)
    elif syntax in PLUGINS:
        _check_jpeg_2000(data.rstrip(b"\0"), pixels)


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise DamagedFrameError(what)


def _rle_segments(data: bytes, pixels: PixelFormat) -> list[bytes]:
    """The bytes of all pixels, highest first, each packed."""
    _require(len(data) >= 64, "is truncated")
    count, *offsets = struct.unpack("<16L", data[:64])
    _require(count == pixels.bits_allocated // 8 * pixels.samples, "holds another number of bytes per pixel")
    _require(not any(offsets[count:]), "has damaged segments")
    bounds = [*offsets[:count], len(data)]
    _require(bounds[0] == 64 and all(a < b for a, b in pairwise(bounds)), "has damaged segments")
    num_pixels = pixels.rows * pixels.columns
    shortest = min(b - a for a, b in pairwise(bounds))
    _require(shortest * _LARGEST_RLE_RATIO >= num_pixels, "holds fewer pixels than its size needs")
    return [data[start:end] for start, end in pairwise(bounds)]


def unpack_rle(data: bytes, pixels: PixelFormat) -> memoryview:
    """The pixels of an RLE frame as little endian words; of damaged frames, pylibjpeg's own function for them panics.

    Raises:
        DamagedFrameError: The frame holds another number of pixels.
    """
    from rle.rle import decode_segment  # type: ignore[import-not-found]

    segments = _rle_segments(data, pixels)
    words = np.empty((pixels.rows * pixels.columns, len(segments)), np.uint8)
    for place, segment in enumerate(reversed(segments)):
        found = np.frombuffer(decode_segment(segment), np.uint8)
        # A byte of padding makes a segment even.
        is_padded = len(found) == len(words) + 1 and segment[-1] == 0
        _require(len(found) == len(words) or is_padded, "has another size than the header says")
        words[:, place] = found[: len(words)]
    return words.reshape(-1).data


def _check_size(rows: int, columns: int, components: int, bits: int, pixels: PixelFormat) -> None:
    _require((rows, columns) == (pixels.rows, pixels.columns), "has another size than the header says")
    _require(components == pixels.samples, "has another number of samples than the header says")
    is_fitting = bits <= 8 if pixels.bits_allocated <= 8 else 1 < bits <= pixels.bits_allocated
    _require(is_fitting, "has other bits per pixel than the header says")


def _check_jpeg(data: bytes, starts: tuple[int, ...], pixels: PixelFormat) -> None:
    """Go from marker to marker: the frame, its tables, one scan, the end."""
    _require(data.startswith(b"\xff\xd8"), "does not begin as JPEG")
    _require(data.endswith(_END_OF_IMAGE), "is truncated")
    place, tables, restarts = 2, set[int](), False
    frame = b""
    while True:
        marker, content, place = _segment(data, place)
        if marker in starts:
            _require(not frame and len(content) == 9, "has a damaged start")
            bits, rows, columns, components = struct.unpack(">BHHB", content[:6])
            _check_size(rows, columns, components, bits, pixels)
            frame = content
        elif marker == _HUFFMAN_TABLES:
            tables |= _huffman_tables(content, is_lossless=starts == _LOSSLESS)
        elif marker == _RESTART_INTERVAL:
            restarts = any(content)
        elif marker == _START_OF_SCAN:
            break
        else:
            # Quantisation, thresholds of JPEG-LS, application data, comments.
            _require(marker in (0xDB, 0xF8, 0xFE, *range(0xE0, 0xF0)), "has an unknown part")
    _require(bool(frame) and len(content) == 6 and content[:2] == b"\x01" + frame[6:7], "has a damaged scan")
    if starts == _LOSSLESS:
        _check_lossless_scan(content, frame, tables, pixels)
    _check_scan(np.frombuffer(data, np.uint8)[place:], is_jpeg_ls=starts == _JPEG_LS, has_restarts=restarts)


def _check_scan(scan: NDArray[np.uint8], *, is_jpeg_ls: bool, has_restarts: bool) -> None:
    """Whether entropy-coded data hold no marker but restarts and, at their end, that of the end."""
    ones = np.flatnonzero(scan[:-1] == 0xFF)
    after = scan[ones + 1]
    # A byte of ones is followed by zero bits: eight in JPEG, one in JPEG-LS. Another byte of ones only fills up.
    is_marker = ((after >= 0x80) if is_jpeg_ls else (after != 0)) & (after != 0xFF)
    _require(bool(is_marker.any()), "has damaged pixels")
    *inner, last = after[is_marker].tolist()
    is_at_end = bool(is_marker[-1]) and last == _END_OF_IMAGE[1]
    _require(is_at_end and (has_restarts or not inner) and set(inner) <= set(_RESTARTS), "has damaged pixels")


def _check_lossless_scan(scan: bytes, frame: bytes, tables: set[int], pixels: PixelFormat) -> None:
    """What gdcm relies on without looking."""
    bits = frame[0]
    _require((bits > 8) == (pixels.bits_allocated > 8) and bits <= 16, "has other bits per pixel than the header says")
    _require(frame[7] == 0x11, "has subsampled pixels")
    table, predictor, last, shift = scan[2], scan[3], scan[4], scan[5]
    _require(table >> 4 in tables and 1 <= predictor <= 7 and last == 0 and shift < bits, "has a damaged scan")


def _segment(data: bytes, place: int) -> tuple[int, bytes, int]:
    """Marker, content and end of the part that begins at `place`."""
    while data[place : place + 2] == b"\xff\xff":
        place += 1
    _require(place + 4 <= len(data) and data[place] == 0xFF, "has damaged parts")
    marker, length = struct.unpack(">xBH", data[place : place + 4])
    end = place + 2 + length
    _require(length >= 2 and end <= len(data), "has damaged parts")
    return marker, data[place + 4 : end], end


def _huffman_tables(content: bytes, *, is_lossless: bool) -> set[int]:
    """Which tables a part defines; each has to be a code that can be read."""
    found, place = set[int](), 0
    while place < len(content):
        counts = content[place + 1 : place + 17]
        _require(len(counts) == 16 and content[place] & 0xEF < 4, "has a damaged table")
        symbols = content[place + 17 : place + 17 + sum(counts)]
        room = sum(count / 2**length for length, count in enumerate(counts, 1))
        _require(0 < sum(counts) == len(symbols) and room <= 1, "has a damaged table")
        _require(not is_lossless or max(symbols) <= 16, "has a damaged table")
        found.add(content[place])
        place += 17 + len(symbols)
    return found


def _check_jpeg_2000(data: bytes, pixels: PixelFormat) -> None:
    """The size, then from tile part to tile part to the end."""
    if data.startswith(_JP2_SIGNATURE):
        data = data[max(0, data.find(_J2K_START)) :]
    _require(data.startswith(_J2K_START) and len(data) > 44, "does not begin as JPEG 2000")
    _require(data.endswith(_END_OF_IMAGE), "is truncated")
    right, bottom, left, top, width, height = struct.unpack(">6L", data[8:32])
    components, depth, *sampling = struct.unpack(">HBBB", data[40:45])
    _check_size(bottom - top, right - left, components, (depth & 0x7F) + 1, pixels)
    _require(sampling == [1, 1], "has subsampled pixels")
    # Decoders get lost in a great many small tiles.
    _require(min(width, height) >= min(32, pixels.rows, pixels.columns), "has damaged tiles")
    place = 2
    while data[place : place + 2] != b"\xff\x90":
        place = _segment(data, place)[2]
    while data[place : place + 2] == b"\xff\x90" and place + 12 <= len(data):
        length = struct.unpack(">L", data[place + 6 : place + 10])[0] or len(data) - 2 - place
        _require(length >= 14, "has damaged tiles")
        place += length
    _require(place == len(data) - 2, "is truncated")
