"""A DICOM series as a volume."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.allocation import allotted_cpus
from pipeline.errors import InputError
from pipeline.geometry import AxisOrder, format_shape
from pipeline.io.dicom.frames import Stack
from pipeline.io.dicom.headers import claims_dicom, is_candidate_name, read_header
from pipeline.io.dicom.pixels import read_stack
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.series import MOST_NAMED, Series, examine_series, group_by_series, name_of
from pipeline.io.dicom.tilt import upright
from pipeline.io.volume import SourceGrid, Volume

LOOK = "Look at it with `voxfit inspect`"


def read_series(paths: Sequence[Path], *, allow_tilt: bool = False, num_threads: int | None = None) -> Volume:
    """Read the files of one series as a volume.

    Slices are ordered by their positions, and each is scaled with its own slope and intercept. Time points, echoes and
    the like become channels. The in-file order of the result's source is (columns, rows, slices), and its `header` is
    the `Stack`.

    Args:
        paths: All files of the series, in any order.
        allow_tilt: Resample slices that are shifted evenly against each other (gantry tilt) onto a rectangular grid
            that covers them, linearly; what the slices do not cover takes the lowest value of the volume. Without it
            such a series is refused.
        num_threads: That decode; None takes the allotted CPUs, and one in a process that is a worker among others.

    Returns:
        (C, I, J, K) float32 in RAS order, in memory slice by slice as the files hold it: bringing it into another order
        takes as long as decoding it. Of a tilted series the grid is not the source's.

    Raises:
        InputError: The files are not one whole series of slices; the message names the series and what is wrong.
    """
    series = _whole_series(paths, allow_tilt=allow_tilt)
    stack = _stack_of(series)
    source = source_of(stack)
    ras = source.order.grid_to_ras(source.grid)
    array = _empty(len(stack.frames), source)
    try:
        threads = _sensible_threads() if num_threads is None else num_threads
        read_stack(stack, source.order.from_ras(array), num_threads=threads)
    except InputError as error:
        # People name files after patients.
        file = hide(error.where, series.identity)
        raise InputError(f"{file}: {error.what}", where=stack.name, fix=error.fix) from None
    return upright(Volume(array, ras, source))


def _sensible_threads() -> int:
    return allotted_cpus() if parent_process() is None else 1


def _empty(num_channels: int, source: SourceGrid) -> NDArray[np.float32]:
    """(C, I, J, K) in RAS order, whose memory is in the order of slices, rows and columns, without reversed axes."""
    columns, rows, slices = source.grid.shape
    try:
        voxels = np.empty((num_channels, slices, rows, columns), np.float32)
    except (MemoryError, ValueError):
        size = format_shape(source.grid.shape)
        raise InputError(f"has {size} voxels, for which there is no memory", where=source.header.name) from None
    # Memory axes of i, j, k in file order, taken in the order of RAS.
    axes = [(3, 2, 1)[axis] for axis in source.order.source_axis]
    view: NDArray[np.float32] = voxels.transpose(0, *axes)
    return view


def read_stack_of(paths: Sequence[Path], *, allow_tilt: bool = False) -> Stack:
    """The frames of a series in order, from the headers of its files alone.

    Raises:
        InputError: As `read_series`.
    """
    return _stack_of(_whole_series(paths, allow_tilt=allow_tilt))


def _whole_series(paths: Sequence[Path], *, allow_tilt: bool) -> Series:
    headers = [read_header(path) for path in paths]
    if not headers:
        raise InputError("no files of a series are given")
    several = group_by_series(headers)
    if len(several) > 1:
        names = ", ".join(name_of(group) for group in several[:MOST_NAMED])
        raise InputError(f"the files belong to {len(several)} series ({names})", fix=LOOK)
    return examine_series(headers, allow_tilt=allow_tilt)


def _stack_of(series: Series) -> Stack:
    if series.stack is None:
        raise InputError(refusal_of(series), where=series.name, fix=LOOK)
    return series.stack


def refusal_of(series: Series) -> str:
    """Why a series is not read, in one line."""
    return "; ".join(series.problems) or f"is no volume: {series.left_out}"


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files that lie in a folder itself, sorted; hidden files and a DICOMDIR are none.

    Raises:
        InputError: The folder, or a file in it, cannot be read.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and is_candidate_name(path.name))
        return [path for path in files if claims_dicom(path)]
    except OSError as error:
        raise InputError(f"a folder of DICOM files cannot be read ({error.strerror})", fix="Check its rights") from None


def source_of(stack: Stack) -> SourceGrid:
    """How a stack lies in its files; `path` is the first file of the lowest slice."""
    order = AxisOrder.of(stack.grid.affine)
    return SourceGrid(stack.frames[0][0].path, stack.grid, order, stack, len(stack.frames))
