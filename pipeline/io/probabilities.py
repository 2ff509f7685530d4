"""Probabilities of all classes of a volume in a file, without all of them ever being in memory.

They come box by box, all classes of a box, and a file wants them class by class. So they go through an unnamed file in
the folder of the result, compressed, of which nothing is left even by a killed process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, cast

import blosc2
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import atomic_path
from pipeline.errors import InputError
from pipeline.geometry import Grid, Shape3
from pipeline.io import nifti
from pipeline.io.image_file import source_grid
from pipeline.io.volume import Volume

Box = tuple[slice, slice, slice]

SCHEMA_VERSION = 1
SUFFIX = ".b2nd"
# NIfTI knows no float16; 16-bit fractions of 1 are as small and finer near 1.
FRACTIONS = 65535
CHUNK_EDGE, BLOCK_EDGE = 128, 32
COMPRESSION = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
DISK_FIX = "Free some space or choose another folder"


class _Piece(NamedTuple):
    """Where the probabilities of a class in a box lie in the file."""

    box: Box
    offset: int
    size: int


class ProbabilitySpool:
    """Takes probabilities box by box, as a reducer does, and gives them class by class.

    Voxels that never come are background.

    Args:
        folder: Where the file lies; it is made where it is missing.
        shape: (I, J, K) of the native grid.
        labels: Value by class name, background first.
        as_fractions: Keep them as NIfTI will have them; otherwise as float16.
    """

    def __init__(self, folder: Path, shape: Shape3, labels: Mapping[str, int], *, as_fractions: bool) -> None:
        self._folder, self._shape, self._labels = folder, shape, dict(labels)
        self._dtype = np.dtype(np.uint16 if as_fractions else np.float16)
        self._pieces: list[list[_Piece]] = [[] for _ in labels]
        self._file: IO[bytes] | None = None
        self._end = 0

    @property
    def num_bytes(self) -> int:
        """Of a single class, which is there whole when it is written."""
        return self._dtype.itemsize * self._shape[0] * self._shape[1] * self._shape[2]

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Take probabilities (n, *box) of the classes from `first_class` on.

        Raises:
            InputError: The disk is full, or the folder cannot be written to.
        """
        for pieces, score in zip(self._pieces[first_class:], scores, strict=False):
            values = np.rint(np.clip(score, 0, 1) * FRACTIONS) if self._dtype.kind == "u" else score
            packed: bytes = blosc2.compress2(np.ascontiguousarray(values, self._dtype), typesize=2, **COMPRESSION)
            with _errors_named(self._folder):
                self._open().write(packed)
            pieces.append(_Piece(box, self._end, len(packed)))
            self._end += len(packed)

    def close(self, box: Box) -> None:
        """Nothing is left to do."""

    def write(self, path: Path, grid: Volume) -> None:
        """Write the file, atomically: blosc2 where it ends in `.b2nd`, NIfTI elsewhere.

        Args:
            path: Where to.
            grid: A volume on the native grid, with its source.

        Raises:
            InputError: The file cannot be written.
        """
        if path.name.endswith(SUFFIX):
            self._write_blosc2(path, grid.grid)
        else:
            source, slope = source_grid(path, grid), 1 / FRACTIONS
            nifti.write_channels(path, self._classes(), len(self._labels), source, slope=slope)

    def _write_blosc2(self, path: Path, grid: Grid) -> None:
        chunks, blocks = ((1, *(min(edge, size) for size in self._shape)) for edge in (CHUNK_EDGE, BLOCK_EDGE))
        with atomic_path(path) as temporary:
            try:
                array = blosc2.empty(
                    (len(self._labels), *self._shape),
                    dtype=self._dtype,
                    urlpath=str(temporary),
                    mode="w",
                    chunks=chunks,
                    blocks=blocks,
                    contiguous=True,
                    cparams=COMPRESSION,
                )
                meta = {"affine": grid.affine.tolist(), "labels": self._labels, "schema_version": SCHEMA_VERSION}
                array.schunk.vlmeta["voxfit"] = meta
                for index, probabilities in enumerate(self._classes()):
                    array[index] = probabilities
            except RuntimeError as error:
                # blosc2 does not say what the system said.
                raise InputError("cannot write (the disk may be full)", where=path, fix=DISK_FIX) from error

    def _classes(self) -> Iterator[NDArray[Any]]:
        """Probabilities (I, J, K) of every class."""
        for index, pieces in enumerate(self._pieces):
            one = FRACTIONS if self._dtype.kind == "u" else 1
            whole = np.full(self._shape, one if index == 0 else 0, self._dtype)
            for piece in pieces:
                part = whole[piece.box]
                whole[piece.box] = self._read(piece, part.shape)
            yield whole

    def _read(self, piece: _Piece, shape: tuple[int, ...]) -> NDArray[Any]:
        file = self._open()
        file.seek(piece.offset)
        found = np.empty(shape, self._dtype)
        blosc2.decompress2(file.read(piece.size), dst=found, nthreads=1)
        return found

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Its end is the object's: a prediction that begins anew has another, and the disk forgets this one.
            self._file = cast(IO[bytes], TemporaryFile(dir=self._folder))  # noqa: SIM115
        return self._file


def make_spool(path: Path, shape: Shape3, labels: Mapping[str, int]) -> ProbabilitySpool:
    """A spool beside the file that will be written."""
    return ProbabilitySpool(path.parent, shape, labels, as_fractions=not path.name.endswith(SUFFIX))


@contextmanager
def _errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write ({error.strerror or error})", where=folder, fix=DISK_FIX) from error


def read_probabilities(path: Path, classes: slice = slice(None)) -> Volume:
    """Read a file that `voxfit predict --save_probabilities` wrote.

    Args:
        path: `.b2nd` or `.nii.gz`.
        classes: Which class indices; of a `.b2nd` the others are not decompressed.

    Returns:
        (n, I, J, K) in RAS order, float16 of a `.b2nd`, else float32.

    Raises:
        InputError: The file cannot be read, or is no such file.
    """
    if not path.name.endswith(SUFFIX):
        found = nifti.read_volume(path)
        return Volume(found.array[classes], found.grid, found.source)
    if not path.is_file():
        raise InputError("no such file", where=path)
    try:
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        affine = np.array(array.schunk.vlmeta["voxfit"]["affine"])
        return Volume.from_array(array[classes], affine)
    except (RuntimeError, OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError("holds no probabilities of voxfit, or is damaged", where=path) from error
