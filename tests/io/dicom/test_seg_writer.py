"""Segmentations that are written: valid by dciodvfy, at the source's places, and the same voxels by other readers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from pipeline.geometry import AxisOrder, Grid
from pipeline.io.dicom.frames import Frame, PixelFormat, Stack
from pipeline.io.dicom.seg_reader import iter_segments
from pipeline.io.dicom.seg_writer import write_segmentation
from pipeline.io.dicom.segment_codes import suggest_segment_codes
from pipeline.io.volume import SourceGrid

CT_CLASS, MR_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
CLASSES = {"background": 0, "liver": 2, "left kidney": 7, "spleen": 40}
CODES = suggest_segment_codes(["liver", "left kidney", "spleen"])
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((0.96, 0.28, 0.0), (-0.224, 0.768, 0.6))
# What tells the patient; must not be in any message, log line or path.
SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "PID-4711",
    "PatientBirthDate": "19700203",
    "AccessionNumber": "ACC-0815",
    "InstitutionName": "St Elsewhere",
}


def make_series(folder: Path, *, sop_class: str = CT_CLASS, axes: Any = AXIAL, size: Any = (7, 5, 4)) -> list[Path]:
    """Classic single-frame files of (columns, rows, slices), 0.7 x 1.3 mm pixels, 2.5 mm apart."""
    row, column = np.array(axes[0]), np.array(axes[1])
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    paths = []
    for number in range(size[2]):
        header = Dataset()
        header.SOPClassUID, header.SOPInstanceUID = sop_class, generate_uid()
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
        header.Modality = "CT" if sop_class == CT_CLASS else "MR"
        for keyword, value in SECRETS.items():
            setattr(header, keyword, value)
        header.StudyDate, header.StudyTime, header.StudyID, header.PatientSex = "20200102", "101010", "1", "F"
        header.ReferringPhysicianName, header.SeriesNumber, header.InstanceNumber = "", 3, number + 1
        header.Rows, header.Columns, header.PixelSpacing, header.SliceThickness = size[1], size[0], [1.3, 0.7], 2.5
        header.ImageOrientationPatient = [round(float(x), 6) for x in (*row, *column)]
        place = np.array([-12.123456, 7.5, 101.25]) + number * 2.5 * np.cross(row, column)
        header.ImagePositionPatient = [round(float(x), 6) for x in place]
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number}.dcm")
        folder.mkdir(parents=True, exist_ok=True)
        header.save_as(paths[-1], enforce_file_format=True)
    return paths


def make_source(paths: list[Path]) -> SourceGrid:
    """The stack of classic files, or of the frames of one enhanced file, sorted along the normal."""
    frames = []
    for path in paths:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        groups = header.get("PerFrameFunctionalGroupsSequence")
        if groups is None:
            frames.append(_frame(path, 0, header, header, header, header))
            continue
        shared = header.SharedFunctionalGroupsSequence[0]
        orientation, spacing = shared.PlaneOrientationSequence[0], shared.PixelMeasuresSequence[0]
        for index, group in enumerate(groups):
            frames.append(_frame(path, index, header, group.PlanePositionSequence[0], orientation, spacing))
    normal = np.cross(frames[0].row_direction, frames[0].column_direction)
    frames.sort(key=lambda frame: float(np.dot(frame.position, normal)))
    header = pydicom.dcmread(paths[0], stop_before_pixels=True)
    first, last = frames[0], frames[-1]
    step = (np.array(last.position) - first.position) / max(1, len(frames) - 1) if len(frames) > 1 else normal
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack(
        [
            np.array(first.row_direction) * first.column_spacing,
            np.array(first.column_direction) * first.row_spacing,
            step,
        ]
    )
    affine[:3, 3] = first.position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    grid = Grid((int(header.Columns), int(header.Rows), len(frames)), affine)
    pixels = PixelFormat(
        rows=header.Rows,
        columns=header.Columns,
        bits_allocated=16,
        bits_stored=16,
        high_bit=15,
        is_signed=True,
        samples=1,
        photometric="MONOCHROME2",
    )
    stack = Stack(name="series", frames=(tuple(frames),), phase_names=("",), pixels=pixels, grid=grid)
    return SourceGrid(paths[0].parent, grid, AxisOrder.of(affine), stack)


def _frame(path: Path, index: int, header: Any, position: Any, orientation: Any, spacing: Any) -> Frame:
    cosines = tuple(float(x) for x in orientation.ImageOrientationPatient)
    return Frame(
        path=path,
        index=index,
        instance_uid=str(header.get("SOPInstanceUID", "")),
        instance_number=None,
        position=tuple(float(x) for x in position.ImagePositionPatient),
        row_direction=cosines[:3],
        column_direction=cosines[3:],
        row_spacing=float(spacing.PixelSpacing[0]),
        column_spacing=float(spacing.PixelSpacing[1]),
    )


def make_label(source: SourceGrid, values: Any = (0, 2, 7)) -> np.ndarray:
    """Random class values in RAS order; the first slice stays empty."""
    shape = source.order.grid_to_ras(source.grid).shape
    label = np.random.default_rng(1).choice(np.array(values, np.uint8), shape)
    source.order.from_ras(label)[:, :, 0] = 0
    return label


def write(tmp_path: Path, source: SourceGrid, label: np.ndarray, **options: Any) -> Path:
    path = tmp_path / "out" / "seg.dcm"
    write_segmentation(path, label, source, **{"classes": CLASSES, "codes": CODES, **options})
    return path


def errors_of_dciodvfy(path: Path) -> list[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (dicom3tools) is not installed")
    result = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    lines = (result.stdout + result.stderr).splitlines()
    assert any("Segmentation" in line for line in lines)
    return [line for line in lines if line.startswith("Error")]


def classic(**options: Any) -> Callable[[Path, Path], list[Path]]:
    return lambda folder, shared: make_series(folder / "series", **options)


def real(pattern: str) -> Callable[[Path, Path], list[Path]]:
    return lambda folder, shared: sorted((shared / "dicom").glob(pattern))


SOURCES = {
    "ct": classic(),
    "mr": classic(sop_class=MR_CLASS),
    "oblique": classic(axes=OBLIQUE),
    "coronal": classic(axes=((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))),
    "one slice": classic(size=(7, 5, 1)),
}
REAL_SOURCES = {
    "hippocampus": real("hippocampus_crops/Study1/*/*.dcm"),
    "ct, 3 slices": real("seg_dcmqi/ct-3slice/*.dcm"),
    "enhanced": real("seg_dcmqi/23x38x3/multiframe/mf.dcm"),
    "sts mr": real("rtstruct_sts/dicom/STS_008/MR_T1/image/*.dcm"),
    "sts ct": real("rtstruct_sts/dicom/STS_002/CT/image/*.dcm"),
    "sts pet": real("rtstruct_sts/dicom/STS_002/PET/image/*.dcm"),
}


def check_written(path: Path, source: SourceGrid, label: np.ndarray) -> None:
    """No error by dciodvfy, and every reader finds the label's voxels."""
    assert errors_of_dciodvfy(path) == []
    expected = source.order.from_ras(label)
    for structure in iter_segments(path, source.grid, wanted=lambda name: True):
        np.testing.assert_array_equal(structure.mask, expected == CLASSES[structure.name])
    check_by_highdicom(path, source, expected)


def check_by_highdicom(path: Path, source: SourceGrid, expected: np.ndarray) -> None:
    import highdicom

    segmentation = highdicom.seg.segread(path)
    frames = source.header.frames[0]
    names = {item.SegmentNumber: item.SegmentLabel for item in segmentation.SegmentSequence}
    assert sorted(names) == list(range(1, len(names) + 1))
    classes = [CLASSES[name] for _, name in sorted(names.items())]
    assert set(classes) == set(np.unique(expected)) - {0}
    if "PerFrameFunctionalGroupsSequence" not in pydicom.dcmread(frames[0].path, stop_before_pixels=True):
        pixels = segmentation.get_pixels_by_source_instance([frame.instance_uid for frame in frames])
    else:
        pixels = segmentation.get_pixels_by_source_frame(frames[0].instance_uid, [f.index + 1 for f in frames])
    for layer, value in zip(np.moveaxis(pixels, -1, 0), classes, strict=True):
        np.testing.assert_array_equal(layer.T, expected == value)


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_written_is_valid_and_comes_back_voxel_by_voxel(kind: str, tmp_path: Path) -> None:
    source = make_source(SOURCES[kind](tmp_path, tmp_path))
    label = make_label(source)
    if kind == "one slice":
        label[0, 0, 0], label[1, 1, 0] = 2, 7
    check_written(write(tmp_path, source, label), source, label)


@pytest.mark.parametrize("kind", REAL_SOURCES)
def test_real_series_get_valid_segmentations(kind: str, shared_data: Path, tmp_path: Path) -> None:
    source = make_source(REAL_SOURCES[kind](tmp_path, shared_data))
    label = make_label(source)
    check_written(write(tmp_path, source, label), source, label)
