"""A volume as a DICOM series: one file per slice, or one multi-frame file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from pipeline.io.volume import Volume
from pipeline.synthetic_dicom.enhanced import make_enhanced
from pipeline.synthetic_dicom.layout import Layout, decimal, make_layout
from pipeline.synthetic_dicom.modules import (
    IMAGE_TYPES,
    SOP_CLASSES,
    add_frame_of_reference,
    add_modality,
    make_dataset,
    save,
    set_number,
)
from pipeline.synthetic_dicom.options import SeriesOptions
from pipeline.synthetic_dicom.pixels import set_pixel_data
from pipeline.synthetic_dicom.stored import StoredValues, WrittenSeries, make_stored


def write_series(folder: Path, volume: Volume, options: SeriesOptions | None = None) -> WrittenSeries:
    """Write `volume` as DICOM into `folder`, which may hold other series already.

    Args:
        folder: Made if missing. Files are named by the series number and a count: `S001_0001.dcm`, ...
        volume: (C, I, J, K) intensities in RAS order on any grid whose rows and columns are at right angles; oblique
            and tilted (sheared) ones as well.
        options: How; CT without compression by default.

    Raises:
        ValueError: The options cannot hold these intensities, or do not tell the channels apart.
    """
    options = options or SeriesOptions()
    layout = make_layout(volume, options.slice_axis)
    stored = make_stored(volume, layout, options)
    phases = _phase_values(volume.num_channels, options)
    numbers = _numbers(stored.values.shape[:2], options, salt=1)
    if options.enhanced:
        dataset = make_enhanced(stored, layout, options, phases, numbers)
        path = save(dataset, folder / f"S{options.series_number:03d}_0001.dcm", options)
        paths = tuple((path,) * numbers.shape[1] for _ in phases)
        frame_numbers, numbers = numbers, np.ones_like(numbers)
    else:
        paths = _write_slices(folder, stored, layout, options, phases, numbers)
        frame_numbers, numbers = np.zeros_like(numbers), numbers + 1
    return WrittenSeries(
        folder=folder,
        paths=paths,
        frame_numbers=frame_numbers,
        instance_numbers=numbers,
        stored=stored,
        layout=layout,
        options=options,
        phase_values=phases,
    )


def _phase_values(num_channels: int, options: SeriesOptions) -> tuple[float, ...]:
    values = options.phase_values or tuple(float(n + 1) for n in range(num_channels))
    if len(values) != num_channels or (num_channels > 1 and options.phase_keyword is None):
        raise ValueError(f"{num_channels} channels need a phase keyword and as many values")
    return values


def _numbers(shape: tuple[int, ...], options: SeriesOptions, salt: int) -> NDArray[np.int64]:
    """(C, slices) numbers from 0, shuffled if asked; by sorting, because a generator's own shuffle may change."""
    count = int(np.prod(shape))
    rng = np.random.Generator(np.random.PCG64([options.seed, salt]))
    numbers = np.argsort(rng.random(count)) if options.is_shuffled else np.arange(count)
    return numbers.astype(np.int64).reshape(shape)


def _write_slices(
    folder: Path,
    stored: StoredValues,
    layout: Layout,
    options: SeriesOptions,
    phases: tuple[float, ...],
    numbers: NDArray[np.int64],
) -> tuple[tuple[Path, ...], ...]:
    """Write one file per phase and slice; paths by phase and slice."""
    names = _numbers(numbers.shape, options, salt=2)
    paths: list[tuple[Path, ...]] = []
    for c, value in enumerate(phases):
        phase = []
        for k, number in enumerate(numbers[c]):
            dataset = _slice(stored, layout, options, (c, k), int(number) + 1)
            if options.phase_keyword is not None:
                set_number(dataset, options.phase_keyword, value)
            if options.phase_keyword == "TemporalPositionIdentifier":
                dataset.NumberOfTemporalPositions = len(phases)
            phase.append(save(dataset, folder / f"S{options.series_number:03d}_{names[c, k] + 1:04d}.dcm", options))
        paths.append(tuple(phase))
    return tuple(paths)


def _slice(
    stored: StoredValues, layout: Layout, options: SeriesOptions, place: tuple[int, int], number: int
) -> Dataset:
    """The classic image of one slice; `place` is its phase and slice."""
    phase, k = place
    dataset = make_dataset(options, SOP_CLASSES[options.modality], options.instance_uid(f"{phase} {k}"))
    dataset.ImageType = list(options.image_type or IMAGE_TYPES[options.modality])
    dataset.InstanceNumber = number
    add_frame_of_reference(dataset, options)
    add_modality(dataset, options)
    if options.modality == "PT":
        dataset.NumberOfSlices, dataset.ImageIndex = stored.values.shape[1], k + 1
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = layout.position(k), layout.orientation
    dataset.PixelSpacing = layout.pixel_spacing
    dataset.SliceThickness = decimal(options.slice_thickness or layout.slice_spacing)
    if options.modality == "MR":
        dataset.SpacingBetweenSlices = decimal(layout.slice_spacing)
    slope = float(stored.slopes[phase, k])
    if options.modality != "MR" or (slope, stored.intercept) != (1.0, 0.0):
        dataset.RescaleSlope, dataset.RescaleIntercept = _scale_text(slope), decimal(stored.intercept)
        if options.modality == "CT":
            dataset.RescaleType = "HU"
    set_pixel_data(dataset, stored.values[phase, k][None], options)
    return dataset


def _scale_text(slope: float) -> str:
    """A slope as its decimal string, which reads back as exactly this number."""
    return f"{slope:.10g}"
