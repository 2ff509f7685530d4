"""From intensities to stored values and back: what is written, kept as the truth that tests compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.io.volume import Volume
from pipeline.synthetic_dicom.layout import Layout, decimal
from pipeline.synthetic_dicom.modules import ENHANCED_SOP_CLASSES, SOP_CLASSES
from pipeline.synthetic_dicom.options import SeriesOptions


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredValues:
    """Whole numbers as they go into the files.

    Attributes:
        values: (C, slices, rows, columns).
        slopes: (C, slices), as their decimal strings read.
        intercept: As its decimal string reads.
    """

    values: NDArray[Any]
    slopes: NDArray[np.float64]
    intercept: float


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenSeries:
    """A series on disk, and what a reader should make of it.

    Attributes:
        folder: Where the files lie.
        paths: File of each phase and slice, `paths[phase][k]`, slices along the normal; the same file all over where
            the series is one multi-frame file.
        frame_numbers: (C, slices) number of the frame in its file, from 0.
        instance_numbers: (C, slices) as written.
        stored: What the files hold.
        layout: Order and grid of the slices.
        options: What was asked for.
        phase_values: One per channel.
    """

    folder: Path
    paths: tuple[tuple[Path, ...], ...]
    frame_numbers: NDArray[np.int64]
    instance_numbers: NDArray[np.int64]
    stored: StoredValues
    layout: Layout
    options: SeriesOptions
    phase_values: tuple[float, ...]

    @property
    def files(self) -> list[Path]:
        """Every file once, phase by phase in slice order."""
        return list(dict.fromkeys(path for phase in self.paths for path in phase))

    @property
    def sop_class(self) -> str:
        """Of the files."""
        classes = ENHANCED_SOP_CLASSES if self.options.enhanced else SOP_CLASSES
        return classes[self.options.modality]

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4, RAS order to RAS+ mm."""
        return np.asarray(self.layout.order.grid_to_ras(self.layout.grid).affine)

    @property
    def array(self) -> NDArray[np.float64]:
        """(C, I, J, K) intensities in RAS order, exactly `stored * slope + intercept`; computed on every call."""
        slopes = self.stored.slopes[:, :, None, None]
        intensities = self.stored.values * slopes + self.stored.intercept
        return np.stack([self.layout.from_slices(channel) for channel in intensities])

    @property
    def volume(self) -> Volume:
        """`array` on its grid."""
        return Volume.from_array(self.array, self.affine)


def make_stored(volume: Volume, layout: Layout, options: SeriesOptions) -> StoredValues:
    """The nearest stored values of all intensities.

    Raises:
        ValueError: An intensity has no place in the stored range.
    """
    low, high = options.stored_range
    intercept = float(decimal(options.intercept))
    shape = (volume.num_channels, *layout.slices(volume.array[0]).shape)
    values = np.empty(shape, f"{'i' if options.is_signed else 'u'}{options.bits_allocated // 8}")
    slopes = np.empty(shape[:2])
    for c, channel in enumerate(volume.array):
        for k, intensities in enumerate(layout.slices(channel)):
            slopes[c, k] = _slope(intensities, high, options)
            whole = np.rint((intensities - intercept) / slopes[c, k])
            if whole.min() < low or whole.max() > high:
                raise ValueError(f"{whole.min():g} to {whole.max():g} are outside the stored range {low} to {high}")
            values[c, k] = whole
    return StoredValues(values=values, slopes=slopes, intercept=intercept)


def _slope(intensities: NDArray[Any], high: int, options: SeriesOptions) -> float:
    """The slope of a slice, rounded up so that its largest value still fits."""
    if not options.slope_per_slice:
        return float(decimal(options.slope))
    largest = float(np.abs(intensities).max())
    return float(f"{largest / high * (1 + 1e-7):.8g}") if largest > 0 else 1.0
