"""Small cases of known geometry for tests, samples and benchmarks, and datasets made of them.

Everything is computed with operations that IEEE 754 rounds exactly (no array sine, exponential or matrix product) and
rounded to whole intensities, so that a seed gives the same voxels on every platform.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import write_text
from pipeline.geometry import Affine, AxisOrder, Grid, Shape3, Spacing
from pipeline.io.nifti import smallest_integer, write_volume
from pipeline.io.volume import SourceGrid, Volume

Modality = Literal["mr", "ct"]
Array = NDArray[np.float64]

MOST_OBLIQUE_DEGREES = 30.0
CHANNEL_NAMES: dict[Modality, tuple[str, ...]] = {
    "mr": ("T1", "T2", "FLAIR", "PD"),
    "ct": ("CT", "PET", "PET2", "PET3"),
}
# The box of organs in units of half the volume; the body around it is a rounded box that holds its corners.
ORGANS_HALF_WIDTH = 0.82
BODY_HALF_WIDTH = 0.97


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticCase:
    """An image and its label on one grid.

    Attributes:
        image: (C, I, J, K) float32 of whole numbers that int16 holds.
        label: (1, I, J, K) class values 0 to `num_classes` - 1, all of them present.
        num_classes: Classes with background.
        channel_names: One per channel.
    """

    image: Volume
    label: Volume
    num_classes: int
    channel_names: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """`background`, `organ_1`, `organ_2`, ..."""
        return ("background", *(f"organ_{value}" for value in range(1, self.num_classes)))


def make_synthetic_case(
    seed: int,
    *,
    shape: Shape3 = (40, 32, 24),
    spacing: Spacing = (1.0, 1.0, 1.0),
    num_channels: int = 1,
    num_classes: int = 3,
    oblique_degrees: float = 10.0,
    modality: Modality = "mr",
    axis_codes: str = "RAS",
) -> SyntheticCase:
    """A body with one organ per class, each in its own cell: ellipsoids for odd values, bent tubes for even ones.

    An organ's intensity depends on its class; noise, and for "mr" an unknown gain and a smooth bias, lie over it.
    Outside the body is 0 for "mr" and -1000 HU for "ct".

    Args:
        seed: Decides organs, noise, gain and position.
        shape: Voxels along right, anterior, superior.
        spacing: Millimetres along the same axes.
        num_channels: At most 4.
        num_classes: With background.
        oblique_degrees: Rotation of the grid against the scanner's axes, at most 30.
        modality: "ct" makes the first channel Hounsfield units.
        axis_codes: Order in which the voxels lie in a file that is written of the case, such as "LPS" or "PSR".

    Raises:
        ValueError: The classes have no room in the shape, or an argument is out of range.
    """
    if not 1 <= num_channels <= len(CHANNEL_NAMES[modality]) or abs(oblique_degrees) > MOST_OBLIQUE_DEGREES:
        raise ValueError(f"{num_channels} channels or {oblique_degrees} degrees are out of range")
    rng = np.random.Generator(np.random.PCG64(seed))
    grid = Grid(shape, _oblique_affine(rng, shape, spacing, oblique_degrees))
    source = _source_grid(grid, axis_codes)
    unit = tuple(_unit_axis(n, axis) for axis, n in enumerate(shape))
    label = _label(rng, unit, shape, num_classes)
    body = _body(unit)
    channels = [_channel(rng, label, body, unit, _Contrast.of(modality, n, num_classes)) for n in range(num_channels)]
    return SyntheticCase(
        image=Volume(np.stack(channels).astype(np.float32), grid, source),
        label=Volume(label[None], grid, source),
        num_classes=num_classes,
        channel_names=CHANNEL_NAMES[modality][:num_channels],
    )


def _oblique_affine(rng: np.random.Generator, shape: Shape3, spacing: Spacing, degrees: float) -> Affine:
    """Rotation about a fixed tilted axis (Rodrigues), centre of the volume within 20 mm of the scanner's."""
    x, y, z = 2 / 7, 3 / 7, 6 / 7
    # Rounded, because the last digit of sine and cosine differs between C libraries.
    c, s = round(math.cos(math.radians(degrees)), 12), round(math.sin(math.radians(degrees)), 12)
    rotation = [
        [c + x * x * (1 - c), x * y * (1 - c) - z * s, x * z * (1 - c) + y * s],
        [y * x * (1 - c) + z * s, c + y * y * (1 - c), y * z * (1 - c) - x * s],
        [z * x * (1 - c) - y * s, z * y * (1 - c) + x * s, c + z * z * (1 - c)],
    ]
    affine = np.eye(4)
    for row, centre in enumerate(rng.random(3) * 40 - 20):
        affine[row, :3] = [rotation[row][column] * spacing[column] for column in range(3)]
        half = [affine[row, column] * (shape[column] - 1) / 2 for column in range(3)]
        affine[row, 3] = centre - (half[0] + half[1] + half[2])
    return affine


def _source_grid(ras: Grid, axis_codes: str) -> SourceGrid:
    pairs = ("RL", "AP", "SI")
    axes = [next((a for a, code in enumerate(axis_codes.upper()) if code in pair), -1) for pair in pairs]
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"axis codes {axis_codes!r} do not name each direction once")
    order = AxisOrder((axes[0], axes[1], axes[2]), tuple(axis_codes.upper()[a] in "LPI" for a in axes))  # type: ignore[arg-type]
    file_shape = tuple(ras.shape[axes.index(file_axis)] for file_axis in range(3))
    lattice = Grid((file_shape[0], file_shape[1], file_shape[2]), np.eye(4))
    to_ras = np.rint(np.linalg.inv(order.grid_to_ras(lattice).affine))
    return SourceGrid(Path("synthetic"), Grid(lattice.shape, ras.affine @ to_ras), order)


def _unit_axis(size: int, axis: int) -> Array:
    """Voxel centres along one axis from -1 to 1, shaped to broadcast over (I, J, K)."""
    unit = (np.arange(size) * 2 + 1) / size - 1
    return unit.reshape([-1 if axis == other else 1 for other in range(3)])


def _body(unit: tuple[Array, ...]) -> NDArray[np.bool_]:
    """(I, J, K) inside of a box with round corners (sum of eighth powers)."""
    x, y, z = (u * u / BODY_HALF_WIDTH**2 for u in unit)
    return np.asarray(x * x * (x * x) + y * y * (y * y) + z * z * (z * z) <= 1)


def _label(rng: np.random.Generator, unit: tuple[Array, ...], shape: Shape3, num_classes: int) -> NDArray[Any]:
    """(I, J, K) with one organ per class, each within its own cell."""
    label = np.zeros(shape, smallest_integer(0, num_classes - 1))
    cells = _cells(num_classes - 1, shape)
    half = [ORGANS_HALF_WIDTH / n for n in cells]
    # With this room the thinnest organ is wider than the diagonal of a voxel's face, so it holds a voxel centre.
    if any(h * n < 4 for h, n in zip(half, shape, strict=True)):
        raise ValueError(f"{num_classes} classes have no room in {shape} voxels")
    for value, cell in zip(range(1, num_classes), product(*map(range, cells)), strict=False):
        centre = [-ORGANS_HALF_WIDTH + h * (2 * index + 1) for h, index in zip(half, cell, strict=True)]
        p, q, r = ((u - c) / h for u, c, h in zip(unit, centre, half, strict=True))
        label[_organ(rng, p, q, r, is_tube=value % 2 == 0)] = value
    return label


def _organ(rng: np.random.Generator, p: Array, q: Array, r: Array, *, is_tube: bool) -> NDArray[np.bool_]:
    """Mask of an organ in its cell's coordinates (-1 to 1), which it never leaves."""
    shift, size = rng.random(3) * 0.3 - 0.15, rng.random(3) * 0.2 + 0.6
    if not is_tube:
        a, b, c = (((x - d) / s) ** 2 for x, d, s in zip((p, q, r), shift, size, strict=True))
        return np.asarray(a + b + c <= 1)
    bend, radius = 2 * shift[0], 0.6 * size[1]
    across = (q - shift[1] - bend * (1 - 2 * p * p)) ** 2 + (r - shift[2]) ** 2
    return np.asarray((across <= radius * radius) & (np.abs(p) <= size[0] + 0.15))


def _cells(count: int, shape: Shape3) -> list[int]:
    """Cells along each axis, at least `count` in all: the axis with the thickest cells is divided next."""
    cells = [1, 1, 1]
    while math.prod(cells) < count:
        thickest = max(range(3), key=lambda axis: shape[axis] / cells[axis])
        cells[thickest] += 1
    return cells


@dataclass(frozen=True, kw_only=True)
class _Contrast:
    """Intensities of one channel: outside the body, of the body and of each organ, and what lies over them."""

    outside: float
    tissue: float
    organs: tuple[float, ...]
    noise: float
    has_bias: bool

    @classmethod
    def of(cls, modality: Modality, channel: int, num_classes: int) -> _Contrast:
        """Organs are spread evenly from the first to the last value; every second channel has them the other way."""
        is_hu = modality == "ct" and channel == 0
        first, last = (130.0, 400.0) if is_hu else (220.0, 400.0)
        step = (last - first) / max(1, num_classes - 2)
        organs = tuple(first + step * n for n in range(num_classes - 1))
        organs = organs[::-1] if channel % 2 else organs
        if is_hu:
            return cls(outside=-1000.0, tissue=40.0, organs=organs, noise=15.0, has_bias=False)
        return cls(outside=0.0, tissue=100.0, organs=organs, noise=10.0, has_bias=True)


def _channel(
    rng: np.random.Generator, label: NDArray[Any], body: NDArray[np.bool_], unit: tuple[Array, ...], contrast: _Contrast
) -> Array:
    """(I, J, K) whole intensities."""
    values = np.array([contrast.tissue, *contrast.organs])[label]
    # Four uniform numbers are nearly normal and, unlike a normal generator, involve no logarithm.
    a, b, c, d = rng.random((4, *label.shape))
    values += (a + b + c + d - 2) * (contrast.noise * math.sqrt(3))
    if contrast.has_bias:
        gain, slopes = 0.7 + 0.8 * rng.random(), rng.random(3) * 0.3 - 0.15
        bias = 1 + slopes[0] * unit[0] + slopes[1] * unit[1] * unit[1] + slopes[2] * unit[2]
        values *= gain * bias
    return np.where(body, np.rint(values), contrast.outside)


Cases = Mapping[str, SyntheticCase]


def write_msd_dataset(folder: Path, cases: Cases, *, test_cases: Cases | None = None, name: str = "synthetic") -> Path:
    """Write cases by id in the layout of the Medical Segmentation Decathlon; several channels go into 4D files.

    Returns:
        `folder`.
    """
    tests = test_cases or {}
    for case_id, case in cases.items():
        write_volume(folder / "imagesTr" / f"{case_id}.nii.gz", case.image, dtype=np.int16)
        write_volume(folder / "labelsTr" / f"{case_id}.nii.gz", case.label)
    for case_id, case in tests.items():
        write_volume(folder / "imagesTs" / f"{case_id}.nii.gz", case.image, dtype=np.int16)
    first = next(iter(cases.values()))
    description = {
        "name": name,
        "tensorImageSize": "3D" if len(first.channel_names) == 1 else "4D",
        "modality": {str(n): channel for n, channel in enumerate(first.channel_names)},
        "labels": {str(value): text for value, text in enumerate(first.class_names)},
        "numTraining": len(cases),
        "numTest": len(tests),
        "training": [
            {"image": f"./imagesTr/{case_id}.nii.gz", "label": f"./labelsTr/{case_id}.nii.gz"} for case_id in cases
        ],
        "test": [f"./imagesTs/{case_id}.nii.gz" for case_id in tests],
    }
    return _write_description(folder, description)


def write_nnunet_raw_dataset(folder: Path, cases: Cases, *, test_cases: Cases | None = None) -> Path:
    """Write cases by id in nnU-Net's raw layout: one file per channel with suffix `_0000`, `_0001`, ...

    Returns:
        `folder`.
    """
    for subfolder, group in (("imagesTr", cases), ("imagesTs", test_cases or {})):
        for case_id, case in group.items():
            _write_channels(
                case, [folder / subfolder / f"{case_id}_{n:04d}.nii.gz" for n in range(case.image.num_channels)]
            )
    for case_id, case in cases.items():
        write_volume(folder / "labelsTr" / f"{case_id}.nii.gz", case.label)
    first = next(iter(cases.values()))
    description = {
        "channel_names": {str(n): channel for n, channel in enumerate(first.channel_names)},
        "labels": {text: value for value, text in enumerate(first.class_names)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    return _write_description(folder, description)


def write_table_dataset(folder: Path, cases: Cases, *, patients: Mapping[str, str] | None = None) -> Path:
    """Write cases by id as files and a table `cases.csv` with columns case_id, image_<channel>..., label, patient.

    Args:
        folder: Where `cases.csv`, `images/` and `labels/` go; paths in the table are relative to it.
        cases: Case by case id.
        patients: Patient by case id; by default each case is its own.

    Returns:
        The table.
    """
    first = next(iter(cases.values()))
    rows = [["case_id", *(f"image_{channel}" for channel in first.channel_names), "label", "patient"]]
    for case_id, case in cases.items():
        images = [f"images/{case_id}_{channel}.nii.gz" for channel in case.channel_names]
        _write_channels(case, [folder / image for image in images])
        label = f"labels/{case_id}.nii.gz"
        write_volume(folder / label, case.label)
        rows.append([case_id, *images, label, (patients or {}).get(case_id, case_id)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(folder / "cases.csv", text.getvalue())
    return folder / "cases.csv"


def _write_channels(case: SyntheticCase, paths: list[Path]) -> None:
    for channel, path in zip(case.image.array, paths, strict=True):
        write_volume(path, Volume(channel[None], case.image.grid, case.image.source), dtype=np.int16)


def _write_description(folder: Path, description: dict[str, Any]) -> Path:
    write_text(folder / "dataset.json", json.dumps(description, indent=2) + "\n")
    return folder
