"""Where the pixels of a DICOM file begin, and whether all of them are there, without reading them."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from pipeline.io.dicom.codestream import PLUGINS
from pipeline.io.dicom.frames import PixelData, PixelFormat

_LONG_VRS = (b"OB", b"OW", b"UN", b"OF", b"OD", b"OL", b"OV")
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = (0x7FE0, 0x0010)
_PLAIN_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_ITEM, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)


class PixelDataMissingError(Exception):
    """There is no pixel data, or not all of it; the message says which."""


def locate_pixel_data(stream: BinaryIO, syntax: str, *, is_implicit: bool, is_little: bool) -> PixelData:
    """Read the head of the element that `stream` stands before.

    Args:
        stream: Where pydicom stopped before the pixels.
        syntax: Transfer syntax UID.
        is_implicit: Elements carry no VR.
        is_little: Little endian.

    Raises:
        PixelDataMissingError: No such element follows, or the file ends within it.
    """
    order = "<" if is_little else ">"
    head = stream.read(8)
    if len(head) < 8 or struct.unpack(f"{order}HH", head[:4]) != _PIXEL_DATA:
        raise PixelDataMissingError("has no pixel data")
    if is_implicit:
        length = struct.unpack(f"{order}L", head[4:])[0]
    elif head[4:6] in _LONG_VRS:
        length = struct.unpack(f"{order}L", _exactly(stream, 4))[0]
    else:
        raise PixelDataMissingError("has damaged pixel data")
    offset = stream.tell()
    if (length == _UNDEFINED) != (syntax in PLUGINS) or syntax not in (*PLUGINS, *_PLAIN_SYNTAXES):
        raise PixelDataMissingError("has pixel data in an encoding that is damaged or not supported")
    if length == _UNDEFINED:
        if not fragments_of(stream):
            raise PixelDataMissingError("has no pixel data")
        return PixelData(transfer_syntax=syntax, offset=offset, length=None)
    if offset + length > _size(stream):
        raise PixelDataMissingError("is truncated (the file ends within its pixel data)")
    return PixelData(transfer_syntax=syntax, offset=offset, length=length)


def check_size(pixels: PixelFormat, data: PixelData) -> None:
    """Compare the bytes of uncompressed pixels with what their size needs; the length of compressed ones says nothing.

    Raises:
        PixelDataMissingError: Bytes are missing, or there are more than padding; a row or a column is no padding.
    """
    if data.length is None:
        return
    num_bits = pixels.rows * pixels.columns * pixels.samples * data.num_frames * pixels.bits_allocated
    surplus = data.length - (num_bits + 7) // 8
    if surplus < 0:
        raise PixelDataMissingError("is truncated (it holds fewer pixels than its size needs)")
    if surplus > max(1, min(pixels.rows, pixels.columns) * pixels.bits_allocated // 8 - 1):
        raise PixelDataMissingError("holds more pixels than its size says")


def fragments_of(stream: BinaryIO) -> list[tuple[int, int]]:
    """Offset and length of the fragments of compressed pixels, without the table of offsets before them.

    Args:
        stream: At the first byte of the element's value. They are little endian in every compressed syntax.

    Raises:
        PixelDataMissingError: The file ends among them, or they are damaged.
    """
    size, found = _size(stream), list[tuple[int, int]]()
    while True:
        group, element, length = struct.unpack("<HHL", _exactly(stream, 8))
        if (group, element) == _SEQUENCE_END:
            return found[1:]
        if (group, element) != _ITEM or length == _UNDEFINED:
            raise PixelDataMissingError("has damaged compressed pixel data")
        offset = stream.tell()
        if offset + length > size:
            raise PixelDataMissingError("is truncated (the file ends within its pixel data)")
        found.append((offset, length))
        stream.seek(length, os.SEEK_CUR)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise PixelDataMissingError("is truncated (the file ends within its pixel data)")
    return found


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size
