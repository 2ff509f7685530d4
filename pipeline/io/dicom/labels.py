"""The label of a DICOM series from the structure sets and segmentations that were drawn on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from logging import LogRecord
from pathlib import Path

from pipeline.artifacts import read_artifact
from pipeline.errors import InputError
from pipeline.io.dicom.frames import Stack
from pipeline.io.dicom.headers import Header, read_header
from pipeline.io.dicom.privacy import hide
from pipeline.io.dicom.reader import read_stack_of, source_of
from pipeline.io.dicom.references import StructuresFile, anonymous_errors, identity_behind, read_series_file
from pipeline.io.dicom.rtstruct import iter_structures
from pipeline.io.dicom.rtstruct_file import RT_STRUCTURE_SET
from pipeline.io.dicom.seg_header import SEGMENTATION_CLASSES
from pipeline.io.dicom.seg_reader import iter_segments
from pipeline.io.dicom.structures import ComposedLabel, Structure, class_index, compose_label
from pipeline.io.dicom.tilt import upright
from pipeline.io.volume import Volume
from pipeline.log import get_logger


def read_structures(path: Path) -> Volume:
    """Read a label on the grid of its series.

    Structures become classes as the file says; voxels of several classes are counted in the log.

    Args:
        path: A `.structures.json`.

    Returns:
        (1, I, J, K) class values in RAS order, on the grid that `read_series` gives the image.

    Raises:
        InputError: A file is missing or damaged, or a structure does not lie on the series.
    """
    content = read_artifact(path, StructuresFile)
    files, allow_tilt = read_series_file(path.parent / content.series)
    objects = [path.parent / name for name in content.objects]
    with anonymous_errors(files):
        source = source_of(read_stack_of(files, allow_tilt=allow_tilt))

    def wanted(name: str) -> bool:
        return class_index(name, content.classes) is not None

    structures = _all_structures(objects, source.header, wanted, content.threshold)
    try:
        with _anonymous_log([files[0], *objects]), anonymous_errors([files[0], *objects]):
            smaller_wins = content.overlap == "smaller"
            composed = compose_label(structures, content.classes, source.grid.shape, smaller_wins=smaller_wins)
    except InputError as error:
        raise InputError(
            f"{error.where}: {error.what}" if error.where else error.what, where=path, fix=error.fix
        ) from None
    _report(path, composed)
    array = source.order.to_ras(composed.array)[None]
    return upright(Volume(array, source.order.grid_to_ras(source.grid), source), order=0)


def iter_object(
    path: Path, stack: Stack, *, wanted: Callable[[str], bool], threshold: float = 0.5
) -> Iterator[Structure]:
    """Structures of one object, whichever kind it is; see `iter_structures` and `iter_segments`.

    Raises:
        InputError: It is neither a structure set nor a segmentation, was drawn in another space than that of the stack,
            or as these say.
    """
    header = read_header(path)
    _check_space(header, stack)
    if header.sop_class == RT_STRUCTURE_SET:
        return iter_structures(path, stack.grid, wanted=wanted)
    if header.sop_class in SEGMENTATION_CLASSES:
        return iter_segments(path, stack.grid, wanted=wanted, threshold=threshold)
    raise InputError("is neither a structure set nor a segmentation", where=path.name)


def _check_space(header: Header, stack: Stack) -> None:
    """Refuse structures of another series in another frame of reference: the same millimetres are another place."""
    if stack.series_uid in header.referenced_series:
        return
    spaces = {header.frame_of_reference, stack.frame_of_reference} - {""}
    if len(spaces) > 1:
        fix = "Give the structures that were drawn on this series"
        raise InputError("was drawn in another frame of reference", where=header.path.name, fix=fix)


def _all_structures(
    objects: Sequence[Path], stack: Stack, wanted: Callable[[str], bool], threshold: float
) -> Iterator[Structure]:
    for path in objects:
        yield from iter_object(path, stack, wanted=wanted, threshold=threshold)


@contextmanager
def _anonymous_log(files: Sequence[Path]) -> Iterator[None]:
    """Within, what is logged of structures does not tell whom `files` show."""
    identity = cache(lambda: identity_behind(files))

    def hidden(record: LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage(), identity()), ()
        return True

    logger = get_logger("rtstruct")
    logger.addFilter(hidden)
    try:
        yield
    finally:
        logger.removeFilter(hidden)


def _report(path: Path, composed: ComposedLabel) -> None:
    for (under, over), count in composed.overlaps.items():
        text = "%s: %d voxels are in both %s and %s; they are taken as %s"
        get_logger("dicom").warning(text, path.name, count, under, over, over)
