"""NIfTI-1, NIfTI-2 and Analyze files to `Volume` and back; nibabel reads and writes the bytes.

Legend: "file order" is the axis order on disk, (i, j, k[, t][, c]); everything handed out is in RAS order.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeHeader, AnalyzeImage
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import array_from_file
from numpy.typing import DTypeLike, NDArray

from pipeline.artifacts import atomic_path
from pipeline.errors import InputError, first_line
from pipeline.geometry import AxisOrder, Grid, Shape3, check_affine, format_shape
from pipeline.io.volume import SourceGrid, Volume

READ_SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".hdr.gz", ".img", ".hdr")
WRITE_SUFFIXES = (".nii.gz", ".nii")
LABEL_TOLERANCE = 1e-3
LARGEST_LABEL = 2**31
SLAB_VOXELS = 1 << 20


def is_nifti_name(name: str) -> bool:
    """Whether a folder's entry `name` is a volume.

    Of an Analyze pair only the `.img` is, so that a folder lists it once. Hidden files are none: they are half-written
    ones of a killed process, or resource forks of macOS (`._a.nii.gz`).
    """
    return not name.startswith(".") and name.lower().endswith((".nii.gz", ".nii", ".img.gz", ".img"))


def strip_nifti_suffix(name: str) -> str:
    """`a_0000.nii.gz` -> `a_0000`; a name without such a suffix comes back as it is."""
    for suffix in READ_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_source(path: Path) -> SourceGrid:
    """Read the header alone: shape, affine and axis order of a file.

    Returns:
        The grid in file order; `header` is nibabel's, and `header.get_data_shape()` tells the channels.

    Raises:
        InputError: No file, no NIfTI, or voxels or an affine that cannot be used.
    """
    return _open(path)[1]


def read_volume(path: Path) -> Volume:
    """Read an image as float32 in RAS order.

    Scaling (`scl_slope`, `scl_inter`) is applied in float64, slab by slab, so that peak memory is the file's own
    voxels plus the result.

    Returns:
        (C, I, J, K) C-contiguous: one channel for a 3D file, the last axis of a 4D (or `i, j, k, 1, c`) file otherwise.

    Raises:
        InputError: As `read_source`, or the voxels are truncated or corrupt.
    """
    image, source = _open(path)
    raw = _read_voxels(image, source)
    ras = source.order.grid_to_ras(source.grid)
    array = np.empty((raw.shape[0], *ras.shape), np.float32)
    for channel, voxels in zip(array, source.order.to_ras(raw), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            for slab, values in _scaled_slabs(voxels, image.dataobj):
                channel[slab] = values
    return Volume(array, ras, source)


def read_label(path: Path) -> Volume:
    """Read a label map in RAS order.

    Returns:
        (1, I, J, K) in the smallest of uint8, int16, uint16, int32, uint32 and int64 that holds the values. Values
        within 1e-3 of a whole number are taken as that number, because float files and scaling round.

    Raises:
        InputError: As `read_volume`, or the file has several channels, or values that are not whole numbers.
    """
    image, source = _open(path)
    _check_single_channel(source)
    raw = _read_voxels(image, source)
    ras = source.order.grid_to_ras(source.grid)
    voxels = source.order.to_ras(raw)[0]
    array = np.empty((1, *ras.shape), _label_dtype(voxels, image.dataobj, path))
    for slab, values in _scaled_slabs(voxels, image.dataobj):
        array[0, slab] = np.rint(values) if values.dtype.kind == "f" else values
    return Volume(array, ras, source)


def write_label(path: Path, array: NDArray[Any], source: SourceGrid) -> None:
    """Write class values on the grid they came from, atomically.

    Axis order, affine, sform and qform, zooms, units and byte order are the source header's. The dtype is the source's
    too where it holds the values exactly, otherwise the smallest integer that does. Scaling, intent, display range
    and header extensions describe the image, so they are reset. A file with channels gives a 3D label.

    Args:
        path: `.nii.gz` or `.nii`.
        array: (I, J, K) integers in RAS order.
        source: The grid to write on.

    Raises:
        InputError: The file cannot be written.
    """
    if array.dtype.kind not in "iub":
        raise ValueError(f"class values must be integers, not {array.dtype}")
    lowest, highest = (int(array.min()), int(array.max())) if array.size else (0, 0)
    own = _dtype_of(source.header)
    dtype = own if own is not None and _holds(own, lowest, highest) else smallest_integer(lowest, highest)
    _write(path, source.order.from_ras(array), source, dtype)


def write_volume(path: Path, volume: Volume, *, dtype: DTypeLike | None = None) -> None:
    """Write a volume atomically: on its source's grid and axis order, or in RAS order when it has no source.

    Args:
        path: `.nii.gz` or `.nii`.
        volume: (C, I, J, K); several channels become the file's fourth axis.
        dtype: On disk; by default the array's own (bool as uint8, float16 as float32).

    Raises:
        InputError: The file cannot be written.
    """
    source = volume.source or SourceGrid.in_ras_order(path, volume.grid)
    if not source.order.grid_to_ras(source.grid).is_close(volume.grid):
        raise ValueError("the volume is no longer on its source's grid; drop the source before writing")
    channels = source.order.from_ras(volume.array)
    voxels = channels[0] if volume.num_channels == 1 else np.moveaxis(channels, 0, -1)
    _write(path, voxels, source, np.dtype(dtype) if dtype is not None else _storable(volume.array.dtype))


def write_channels(
    path: Path, channels: Iterable[NDArray[Any]], num_channels: int, source: SourceGrid, *, slope: float
) -> None:
    """Write a 4D file channel by channel, atomically: no more than one is held.

    Args:
        path: `.nii.gz` or `.nii`.
        channels: (I, J, K) of `num_channels` channels in RAS order, uint16.
        num_channels: The file's fourth axis.
        source: The grid to write on, see `write_label`.
        slope: What the numbers are multiplied with when they are read.

    Raises:
        InputError: The file cannot be written.
    """
    header = _output_header(source)
    header.set_data_dtype(np.uint16)
    try:
        header.set_data_shape((*source.grid.shape, num_channels))
    except HeaderDataError as error:
        raise InputError(f"cannot have {num_channels} channels ({first_line(error)})", where=path) from error
    header.set_slope_inter(slope, 0)
    header["vox_offset"] = header.single_vox_offset
    dtype = np.dtype(np.uint16).newbyteorder(header.endianness)
    with atomic_path(path) as temporary, _opened(temporary) as stream:
        stream.write(header.binaryblock)
        stream.write(b"\0" * (header.single_vox_offset - len(header.binaryblock)))
        for voxels in channels:
            own = source.order.from_ras(voxels)
            for index in range(own.shape[2]):
                stream.write(own[:, :, index].astype(dtype, copy=False).tobytes(order="F"))


def _opened(path: Path) -> IO[bytes]:
    # Level 1: most of what is written channel by channel is zeros, and of the rest higher ones gain little.
    return cast(IO[bytes], gzip.open(path, "wb", compresslevel=1) if path.name.endswith(".gz") else path.open("wb"))


def smallest_integer(lowest: int, highest: int) -> np.dtype[Any]:
    """The first of uint8, int16, uint16, int32, uint32 and int64 that holds both values."""
    for name in ("uint8", "int16", "uint16", "int32", "uint32"):
        if _holds(np.dtype(name), lowest, highest):
            return np.dtype(name)
    return np.dtype("int64")


def _holds(dtype: np.dtype[Any], lowest: int, highest: int) -> bool:
    if dtype.kind in "iu":
        return bool(np.iinfo(dtype).min <= lowest and highest <= np.iinfo(dtype).max)
    return dtype.kind == "f" and max(-lowest, highest) <= 2 ** (np.finfo(dtype).nmant + 1)


def _dtype_of(header: Any) -> np.dtype[Any] | None:
    """Voxel type of the file that a NIfTI or Analyze header belongs to; None for headers of other formats."""
    return header.get_data_dtype() if isinstance(header, AnalyzeHeader) else None  # type: ignore[no-untyped-call]


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype({"bool": "uint8", "float16": "float32"}.get(dtype.name, dtype))


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn whatever nibabel, zlib or the file system raises while reading into one line."""
    fix = "Replace the file"
    try:
        yield
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else path.name
        raise InputError(f"the file {name} that belongs to it is missing", where=path, fix=fix) from error
    except ImageFileError as error:
        raise InputError("is not a NIfTI file, or its beginning is damaged", where=path, fix=fix) from error
    except HeaderDataError as error:
        raise InputError(f"has an unusable header ({first_line(error)})", where=path, fix=fix) from error
    except (EOFError, zlib.error, ValueError, OverflowError) as error:
        raise InputError(f"is truncated or corrupt ({first_line(error)})", where=path, fix=fix) from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.errno else "is truncated or corrupt"
        raise InputError(what if error.errno else f"{what} ({first_line(error)})", where=path, fix=fix) from error


def _open(path: Path) -> tuple[Any, SourceGrid]:
    """The lazy nibabel image and the checked grid of a file."""
    image = _load(path)
    _check_voxel_type(path, image.dataobj.dtype)
    shape = _spatial_shape(path, image.shape)
    check_affine(image.affine, str(path))
    try:
        order = AxisOrder.of(image.affine)
    except InputError as error:
        raise InputError(error.what, where=path, fix=error.fix) from error
    num_channels = int(np.prod(image.shape[3:]))
    return image, SourceGrid(path, Grid(shape, np.asarray(image.affine, float)), order, image.header, num_channels)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise InputError("is a folder" if path.is_dir() else "no such file", where=path, fix="Give a NIfTI file")
    with _errors_named(path):
        image = nib.load(path)
    if not isinstance(image, AnalyzeImage):
        raise InputError(f"is a {type(image).__name__}, not NIfTI", where=path, fix="Convert it to .nii.gz")
    return image


def _check_voxel_type(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.names is not None:
        kind = "".join(dtype.names)
        raise InputError(f"holds {kind} colours, not intensities", where=path, fix="Convert it to one value per voxel")
    if dtype.kind not in "iuf":
        raise InputError(f"holds {dtype.name} voxels", where=path, fix="Convert it to real numbers (magnitude)")


def _spatial_shape(path: Path, shape: tuple[int, ...]) -> Shape3:
    """The first three axes; the rest may hold at most one axis longer than one voxel, the channels."""
    if min(shape, default=0) < 1:
        raise InputError(f"holds no voxels (shape {format_shape(shape)})", where=path, fix="Replace the file")
    if len(shape) < 3 or sum(n > 1 for n in shape[3:]) > 1:
        text = f"has {len(shape)} axes ({format_shape(shape)}), a volume has 3, or 4 with channels"
        raise InputError(text, where=path, fix="Give a 3D file, or a 4D file with channels last")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _check_single_channel(source: SourceGrid) -> None:
    shape = source.header.get_data_shape()
    if source.num_channels != 1:
        text = f"is {len(shape)}D ({format_shape(shape)}), a label is 3D"
        raise InputError(text, where=source.path, fix="Give a 3D file with one class value per voxel")


def _read_voxels(image: Any, source: SourceGrid) -> NDArray[Any]:
    """(C, i, j, k) unscaled voxels of the file's own dtype, in file order.

    The stream is read to its end, because gzip compares its checksum only there.
    """
    proxy = image.dataobj
    with _errors_named(source.path), ImageOpener(image.file_map["image"].filename) as stream:
        opened: Any = stream
        raw = array_from_file(proxy.shape, proxy.dtype, opened, offset=proxy.offset, mmap=False)
        while opened.read(1 << 20):
            pass
    return np.moveaxis(raw.reshape((*source.grid.shape, -1), order="F"), -1, 0)


def _scaled_slabs(voxels: NDArray[Any], proxy: Any) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Slabs of (I, J, K) `voxels` along the first axis with the file's slope and intercept applied in float64."""
    slope, inter = float(proxy.slope), float(proxy.inter)
    thickness = max(1, SLAB_VOXELS // max(1, voxels[0].size))
    for start in range(0, voxels.shape[0], thickness):
        slab = slice(start, start + thickness)
        values = voxels[slab]
        yield slab, values if (slope, inter) == (1.0, 0.0) else values.astype(np.float64) * slope + inter


def _label_dtype(voxels: NDArray[Any], proxy: Any, path: Path) -> np.dtype[Any]:
    """The smallest dtype for the label values, checked to be whole numbers."""
    lowest, highest = np.inf, -np.inf
    num_bad, example = 0, 0.0
    for _, values in _scaled_slabs(voxels, proxy):
        if values.dtype.kind == "f" or values.dtype.itemsize == 8:
            with np.errstate(invalid="ignore"):
                whole = np.abs(values - np.rint(values)) <= LABEL_TOLERANCE
            bad = ~(whole & (np.abs(values) < LARGEST_LABEL))
            num_bad += int(bad.sum())
            example = float(values[bad][0]) if bad.any() else example
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
    if num_bad:
        text = f"label values must be whole numbers below 2^31, found {example:.4g} ({num_bad} such voxels)"
        raise InputError(text, where=path, fix="Give one class value per voxel")
    return smallest_integer(int(np.rint(lowest)), int(np.rint(highest)))


def _write(path: Path, voxels: NDArray[Any], source: SourceGrid, dtype: np.dtype[Any]) -> None:
    if not path.name.lower().endswith(WRITE_SUFFIXES):
        raise InputError("is not a NIfTI name", where=path, fix="End it in .nii.gz")
    header = _output_header(source)
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(dtype)
    kind: Any = Nifti2Image if isinstance(header, Nifti2Header) else Nifti1Image
    # Without an affine nibabel leaves the header's sform and qform as they are, to the bit.
    image = kind(voxels.astype(dtype, copy=False), None, header, dtype=dtype)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _output_header(source: SourceGrid) -> Any:
    """A single-file header with the source's geometry and nothing that describes its intensities."""
    if not isinstance(source.header, Nifti1Header):
        return _fresh_header(source.grid)
    kind: Any = Nifti2Header if isinstance(source.header, Nifti2Header) else Nifti1Header
    header = kind(source.header.binaryblock, endianness=source.header.endianness, check=False)
    header["magic"] = kind.default_structarr()["magic"]
    for field in ("scl_slope", "scl_inter", "cal_max", "cal_min", "vox_offset"):
        header[field] = 0
    header.set_intent("none")
    return header


def _fresh_header(grid: Grid) -> Any:
    header: Any = Nifti1Header()  # type: ignore[no-untyped-call]
    header.set_data_shape(grid.shape)
    header.set_sform(grid.affine, code="scanner")
    header.set_qform(grid.affine, code="scanner")
    header.set_xyzt_units("mm")
    return header
