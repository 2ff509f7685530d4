"""Stored values to the bytes of DICOM's pixel data, plain or compressed without loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder

from pipeline.synthetic_dicom.options import TRANSFER_SYNTAXES, SeriesOptions

# pydicom's first choice for RLE ends the process on data it does not like; this one raises.
ENCODER_PLUGINS = {"rle": "pylibjpeg", "jpeg_ls": "pyjpegls", "jpeg_2000": "pylibjpeg"}
# OpenJPEG halves an image five times; the buffer of pyjpegls is too small for noise in a few pixels.
SMALLEST_SIDES = {"jpeg_2000": 32, "jpeg_ls": 12}


def set_pixel_data(dataset: Dataset, frames: NDArray[Any], options: SeriesOptions) -> None:
    """Add the pixel data of `frames` and what describes them.

    Args:
        dataset: Changed in place.
        frames: (frames, rows, columns) stored values, each within `options.stored_range`.
        options: Bits, sign and transfer syntax.

    Raises:
        ValueError: No encoder takes these bits in this transfer syntax.
    """
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = frames.shape[1:]
    dataset.BitsAllocated, dataset.BitsStored = options.bits_allocated, options.stored_bits
    dataset.HighBit, dataset.PixelRepresentation = options.top_bit, int(options.is_signed)
    words = _words(frames, options)
    if TRANSFER_SYNTAXES[options.transfer_syntax].is_encapsulated:
        dataset.PixelData = encapsulate([_encode(frame, options) for frame in words], has_bot=False)
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        return
    is_big = options.transfer_syntax == "explicit_be"
    data = words.astype(words.dtype.newbyteorder(">" if is_big else "<"), copy=False).tobytes()
    dataset.PixelData = data + bytes(len(data) % 2)
    is_bytes = options.bits_allocated == 8 and options.transfer_syntax != "implicit_le"
    dataset["PixelData"].VR = "OB" if is_bytes else "OW"


def _words(frames: NDArray[Any], options: SeriesOptions) -> NDArray[Any]:
    """Values as they lie in the file: shifted up to the high bit, and unused bits filled."""
    words = frames.astype(np.dtype(f"{'i' if options.is_signed else 'u'}{options.bits_allocated // 8}"))
    if options.unused_bits == "zero" and options.is_signed:
        unsigned = words.view(np.dtype(f"u{words.itemsize}"))
        words = (unsigned & unsigned.dtype.type((1 << options.stored_bits) - 1)).view(words.dtype)
    return words << (options.top_bit + 1 - options.stored_bits)


def _encode(frame: NDArray[Any], options: SeriesOptions) -> bytes:
    """One frame, compressed."""
    _check_compressible(frame, options)
    if options.transfer_syntax not in ENCODER_PLUGINS:
        return _encode_with_gdcm(frame, options)
    encoder = get_encoder(TRANSFER_SYNTAXES[options.transfer_syntax])
    return encoder.encode(
        frame,
        encoding_plugin=ENCODER_PLUGINS[options.transfer_syntax],
        rows=frame.shape[0],
        columns=frame.shape[1],
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=options.bits_allocated,
        bits_stored=options.stored_bits,
        pixel_representation=int(options.is_signed),
        photometric_interpretation="MONOCHROME2",
    )


def _check_compressible(frame: NDArray[Any], options: SeriesOptions) -> None:
    """Refuse what the encoders get wrong: some return nothing, and gdcm ends the whole process."""
    if options.top_bit != options.stored_bits - 1 or options.unused_bits != "sign":
        raise ValueError("shifted or cleared bits are written without compression only")
    fits = {8: options.stored_bits == 8, 16: options.stored_bits > 8}.get(options.bits_allocated, False)
    if not fits or frame.nbytes % 2:
        raise ValueError("only 8 of 8 bits or 9 to 16 of 16 are compressed, and an even number of bytes per slice")
    if options.transfer_syntax in SMALLEST_SIDES and min(frame.shape) < SMALLEST_SIDES[options.transfer_syntax]:
        raise ValueError(f"{options.transfer_syntax} needs {SMALLEST_SIDES[options.transfer_syntax]} rows and columns")


def _encode_with_gdcm(frame: NDArray[Any], options: SeriesOptions) -> bytes:
    """JPEG lossless, which pydicom does not encode."""
    import gdcm

    writer = gdcm.ImageWriter()  # keeps the image alive: gdcm counts references of its own
    image = writer.GetImage()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((frame.shape[1], frame.shape[0], 1))
    bits = options.bits_allocated, options.stored_bits, options.top_bit
    image.SetPixelFormat(gdcm.PixelFormat(1, *bits, int(options.is_signed)))
    kind = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.ImplicitVRLittleEndian))
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetByteStringValue(frame.tobytes())
    image.SetDataElement(element)
    return _changed(gdcm, image, TRANSFER_SYNTAXES[options.transfer_syntax])


def _changed(gdcm: Any, image: Any, syntax: str) -> bytes:
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(image)
    if not change.Change():
        raise ValueError(f"gdcm cannot encode these pixels as {syntax}")
    fragments = change.GetOutput().GetDataElement().GetSequenceOfFragments()
    parts = [fragments.GetFragment(n).GetByteValue().GetBuffer() for n in range(fragments.GetNumberOfFragments())]
    return b"".join(part.encode("utf-8", "surrogateescape") for part in parts)
