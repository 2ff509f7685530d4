"""Images and labels by one path each, whatever stands behind it: NIfTI, a folder of DICOM, a reference to a series."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.io import nifti
from pipeline.io.dicom.references import (
    SERIES_SUFFIX,
    STRUCTURES_SUFFIX,
    anonymous_errors,
    files_behind,
    read_series_file,
)
from pipeline.io.volume import SourceGrid, Volume


@dataclass(frozen=True, eq=False)
class Layout:
    """What `read_volume` would give, without its voxels.

    Attributes:
        grid: Shape and affine in RAS order.
        num_channels: Number of channels.
    """

    grid: Grid
    num_channels: int


def is_image_path(path: Path) -> bool:
    """Whether `read_volume` or `read_label` knows this kind of file, told by its name; folders may hold DICOM."""
    name = path.name
    return nifti.is_nifti_name(name) or name.endswith((SERIES_SUFFIX, STRUCTURES_SUFFIX)) or path.is_dir()


def is_series(path: Path) -> bool:
    """Whether a path stands for a DICOM series."""
    return path.name.endswith(SERIES_SUFFIX) or path.is_dir()


def strip_suffix(name: str) -> str:
    """`a_0000.nii.gz` -> `a_0000`, `a.series.json` -> `a`; any other name comes back as it is."""
    for suffix in (SERIES_SUFFIX, STRUCTURES_SUFFIX):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return nifti.strip_nifti_suffix(name)


def source_files(path: Path) -> tuple[Path, ...]:
    """All files that the voxels behind `path` come from.

    Raises:
        InputError: A reference is wrong, or a file that it lists is not there.
    """
    if path.is_dir():
        from pipeline.io.dicom.reader import dicom_files

        return tuple(dicom_files(path))
    return files_behind(path)


def size_on_disk(path: Path) -> int:
    """Bytes of all files behind `path`; what is missing or cannot be told counts nothing."""
    try:
        return sum(file.stat().st_size for file in source_files(path) if file.is_file())
    except (InputError, OSError):
        return 0


def read_layout(path: Path) -> Layout:
    """Read headers alone.

    Raises:
        InputError: As `read_volume`.
    """
    series = _series(path)
    if series is None:
        source = nifti.read_source(path)
        return Layout(source.order.grid_to_ras(source.grid), source.num_channels)
    from pipeline.io.dicom.reader import read_stack_of, source_of
    from pipeline.io.dicom.tilt import upright_grid

    with anonymous_errors(series[0]):
        stack = read_stack_of(series[0], allow_tilt=series[1])
    return Layout(upright_grid(source_of(stack)), len(stack.frames))


def read_volume(path: Path) -> Volume:
    """Read an image as float32 in RAS order.

    Args:
        path: NIfTI, a folder that holds the files of one DICOM series, or a `.series.json`.

    Returns:
        (C, I, J, K); see `pipeline.io.nifti.read_volume` and `pipeline.io.dicom.reader.read_series`.

    Raises:
        InputError: Nothing is there, or it cannot be used.
    """
    series = _series(path)
    if series is None:
        return nifti.read_volume(path)
    from pipeline.io.dicom.reader import read_series

    with anonymous_errors(series[0]):
        return read_series(series[0], allow_tilt=series[1])


def read_label(path: Path) -> Volume:
    """Read a label map in RAS order.

    Args:
        path: NIfTI, or a `.structures.json`.

    Returns:
        (1, I, J, K) whole numbers; see `pipeline.io.nifti.read_label` and `pipeline.io.dicom.labels.read_structures`.

    Raises:
        InputError: Nothing is there, or it cannot be used.
    """
    if not path.name.endswith(STRUCTURES_SUFFIX):
        return nifti.read_label(path)
    from pipeline.io.dicom.labels import read_structures

    return read_structures(path)


def write_label(path: Path, label: Volume) -> None:
    """Write class values as NIfTI on the grid they came from: the file's own, or the label's where that is another.

    Args:
        path: `.nii.gz` or `.nii`.
        label: (1, I, J, K) integers in RAS order.

    Raises:
        InputError: The file cannot be written.
    """
    nifti.write_label(path, label.array[0], source_grid(path, label))


def write_map(path: Path, values: Volume) -> None:
    """Write values of every voxel as NIfTI, on the grid that `write_label` takes.

    Args:
        path: `.nii.gz` or `.nii`.
        values: (1, I, J, K) float32 in RAS order.

    Raises:
        InputError: The file cannot be written.
    """
    nifti.write_volume(path, Volume(values.array, values.grid, source_grid(path, values)))


def source_grid(path: Path, volume: Volume) -> SourceGrid:
    """The grid of the file that a volume came from, or the volume's own where that is another."""
    source = volume.source
    if source is None or not source.order.grid_to_ras(source.grid).is_close(volume.grid):
        return SourceGrid.in_ras_order(path, volume.grid)
    return source


def _series(path: Path) -> tuple[tuple[Path, ...], bool] | None:
    """The files of a DICOM series and whether it may be tilted; None for what is no series."""
    if path.name.endswith(SERIES_SUFFIX):
        return read_series_file(path)
    if not path.is_dir():
        return None
    from pipeline.io.dicom.reader import dicom_files

    files = dicom_files(path)
    if not files:
        # Its name may be that of a patient; whoever shows this names the case.
        raise InputError("a folder holds no DICOM files", fix="Give a NIfTI file or the folder of a DICOM series")
    return tuple(files), False
