"""Segmentations that are written: valid by dciodvfy, at the source's places, and the same voxels by other readers."""

from __future__ import annotations

import logging
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from pipeline.errors import InputError
from pipeline.geometry import AxisOrder, Grid
from pipeline.io.dicom.frames import Frame, PixelFormat, Stack, Tile
from pipeline.io.dicom.headers import read_header
from pipeline.io.dicom.seg_reader import iter_segments
from pipeline.io.dicom.seg_source import read_segmentation_source
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


def make_series(
    folder: Path, *, sop_class: str = CT_CLASS, axes: Any = AXIAL, size: Any = (7, 5, 4), shift: float = 0.0
) -> list[Path]:
    """Classic single-frame files of (columns, rows, slices), 0.7 x 1.3 mm pixels, 2.5 mm apart.

    Each slice is shifted by `shift` mm along its columns, as by a tilted gantry.
    """
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
        place = np.array([-12.123456, 7.5, 101.25]) + number * (2.5 * np.cross(row, column) + shift * column)
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
    "tilted gantry": classic(shift=0.6),
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


def test_an_independent_reader_finds_the_voxels_at_their_places(tmp_path: Path) -> None:
    if shutil.which("dcm2niix") is None:
        pytest.skip("dcm2niix is not installed")
    import nibabel as nib

    source = make_source(make_series(tmp_path / "series", axes=OBLIQUE))
    label = make_label(source, (0, 2))
    path = write(tmp_path, source, label)
    subprocess.run(["dcm2niix", "-z", "n", "-f", "seg", "-o", tmp_path, path], check=True, capture_output=True)
    image = nib.load(tmp_path / "seg.nii")
    found = np.argwhere(np.asarray(image.dataobj) > 0)
    to_source = np.linalg.inv(source.grid.affine) @ image.affine
    places = found @ to_source[:3, :3].T + to_source[:3, 3]
    np.testing.assert_allclose(places, np.rint(places), atol=1e-3)
    expected = np.argwhere(source.order.from_ras(label) == 2)
    assert sorted(map(tuple, np.rint(places).astype(int).tolist())) == sorted(map(tuple, expected.tolist()))


# ---- what the object says


def test_frames_lie_where_the_source_lies_to_the_digit(tmp_path: Path) -> None:
    paths = make_series(tmp_path / "series", axes=OBLIQUE)
    source = make_source(paths)
    dataset = pydicom.dcmread(write(tmp_path, source, make_label(source)))
    headers = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, paths)}
    assert dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient == (
        headers[source.header.frames[0][0].instance_uid].ImageOrientationPatient
    )
    for group in dataset.PerFrameFunctionalGroupsSequence:
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        header = headers[reference.ReferencedSOPInstanceUID]
        assert group.PlanePositionSequence[0].ImagePositionPatient == header.ImagePositionPatient
        assert reference.ReferencedSOPClassUID == CT_CLASS
        assert reference.SpatialLocationsPreserved == "YES"
        assert "ReferencedFrameNumber" not in reference


def test_the_study_is_kept_and_the_series_is_new(tmp_path: Path) -> None:
    paths = make_series(tmp_path / "series", sop_class=MR_CLASS)
    source, header = make_source(paths), pydicom.dcmread(paths[0])
    path = write(tmp_path, source, make_label(source))
    dataset = pydicom.dcmread(path)
    same = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyInstanceUID")
    for keyword in (*same, "StudyID", "StudyDate", "StudyTime", "FrameOfReferenceUID"):
        assert dataset[keyword].value == header[keyword].value, keyword
    assert dataset.SeriesInstanceUID != header.SeriesInstanceUID
    assert (dataset.Modality, dataset.SeriesNumber, dataset.Manufacturer) == ("SEG", 1003, "voxfit")
    assert "InstitutionName" not in dataset
    assert read_header(path).referenced_series == (header.SeriesInstanceUID,)
    instances = dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [i.ReferencedSOPInstanceUID for i in instances] == [f.instance_uid for f in source.header.frames[0]]
    assert {i.ReferencedSOPClassUID for i in (*instances, *dataset.SourceImageSequence)} == {MR_CLASS}


def test_segments_say_what_they_are_and_who_made_them(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    dataset = pydicom.dcmread(write(tmp_path, source, make_label(source, (0, 7))))
    (segment,) = dataset.SegmentSequence
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (segment.SegmentNumber, segment.SegmentLabel) == (1, "left kidney")
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", "voxfit")
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion
    assert "CodingSchemeIdentificationSequence" not in dataset


def test_classes_without_a_code_get_a_private_one_that_is_declared(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    path = write(tmp_path, source, make_label(source), codes={})
    dataset = pydicom.dcmread(path)
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in dataset.SegmentSequence]
    assert [(k.CodingSchemeDesignator, k.CodeMeaning) for k in kinds] == [
        ("99VOXFIT", "liver"),
        ("99VOXFIT", "left kidney"),
    ]
    assert dataset.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99VOXFIT"
    assert errors_of_dciodvfy(path) == []


def test_names_in_any_script_and_of_any_length_are_kept_as_far_as_dicom_goes(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    classes = {"background": 0, "肝臓": 2, "long " * 20: 7}
    path = write(tmp_path, source, make_label(source), classes=classes, codes=suggest_segment_codes(classes))
    assert read_header(path).structure_names == ("肝臓", ("long " * 20)[:64].strip())
    assert errors_of_dciodvfy(path) == []


def test_classes_without_a_voxel_are_not_described(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    path = write(tmp_path, source, make_label(source, (0, 2, 40)))
    assert read_header(path).structure_names == ("liver", "spleen")
    assert {s.number: int(s.mask.sum()) > 0 for s in iter_segments(path, source.grid, wanted=lambda name: True)} == {
        1: True,
        2: True,
    }


@pytest.mark.parametrize("kind", ["ct", "one slice"])
def test_an_empty_result_is_a_valid_object_that_says_what_was_looked_for(kind: str, tmp_path: Path) -> None:
    source = make_source(SOURCES[kind](tmp_path, tmp_path))
    label = np.zeros_like(make_label(source))
    path = write(tmp_path, source, label)
    assert errors_of_dciodvfy(path) == []
    assert read_header(path).structure_names == ("liver", "left kidney", "spleen")
    assert pydicom.dcmread(path).NumberOfFrames == 3
    assert not any(s.mask.any() for s in iter_segments(path, source.grid, wanted=lambda name: True))


def test_two_runs_differ_in_uids_and_dates_alone(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    label = make_label(source)
    first, second = (pydicom.dcmread(write(tmp_path / run, source, label)) for run in "ab")
    differing = {a.keyword for a in first if a != second[a.tag]}
    own = {"SOPInstanceUID", "SeriesInstanceUID", "DimensionOrganizationSequence", "DimensionIndexSequence"}
    dates = {"InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime"}
    assert differing <= own | dates | {"ContributingEquipmentSequence"}


def test_frames_of_an_enhanced_file_are_referred_to_by_number(shared_data: Path, tmp_path: Path) -> None:
    source = make_source(REAL_SOURCES["enhanced"](tmp_path, shared_data))
    frames = source.header.frames[0]
    dataset = pydicom.dcmread(write(tmp_path, source, make_label(source)))
    for group in dataset.PerFrameFunctionalGroupsSequence:
        (reference,) = group.DerivationImageSequence[0].SourceImageSequence
        place = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        assert [f.index + 1 for f in frames if f.position == place] == [reference.ReferencedFrameNumber]
        assert reference.ReferencedSOPInstanceUID == frames[0].instance_uid
    assert len(dataset.SourceImageSequence) == 1


def test_tiles_of_a_mosaic_refer_to_their_file_and_keep_their_own_places(tmp_path: Path) -> None:
    (path,) = make_series(tmp_path / "series", sop_class=MR_CLASS, size=(7, 5, 1))
    source = make_source(make_series(tmp_path / "slices", sop_class=MR_CLASS))
    uid = str(pydicom.dcmread(path).SOPInstanceUID)
    tiles = tuple(
        replace(frame, path=path, instance_uid=uid, tile=Tile(row=0, column=7 * k, rows=5, columns=7))
        for k, frame in enumerate(source.header.frames[0])
    )
    source = replace(source, header=replace(source.header, frames=(tiles,)))
    label = make_label(source)
    out = write(tmp_path, source, label)
    assert errors_of_dciodvfy(out) == []
    references = [
        group.DerivationImageSequence[0].SourceImageSequence[0]
        for group in pydicom.dcmread(out).PerFrameFunctionalGroupsSequence
    ]
    assert {(r.ReferencedSOPInstanceUID, r.SpatialLocationsPreserved) for r in references} == {(uid, "NO")}
    expected = source.order.from_ras(label)
    for structure in iter_segments(out, source.grid, wanted=lambda name: True):
        np.testing.assert_array_equal(structure.mask, expected == CLASSES[structure.name])


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL", "BINARY"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_what_highdicom_writes_is_read(kind: str, syntax: str, tmp_path: Path) -> None:
    import highdicom

    if kind == "BINARY" and syntax == RLELossless:
        pytest.skip("RLE cannot hold single bits")
    # JPEG 2000 needs frames of at least 32 x 32.
    source = make_source(make_series(tmp_path / "series", size=(40, 35, 3)))
    label = make_label(source)
    own = pydicom.dcmread(write(tmp_path, source, label))
    headers = read_segmentation_source(source.header).headers
    frames = np.ascontiguousarray(source.order.from_ras(label).T)
    segmentation = highdicom.seg.Segmentation(
        headers,
        np.searchsorted([0, 2, 7], frames).astype(np.uint8),
        kind,
        [highdicom.seg.SegmentDescription.from_dataset(segment) for segment in own.SegmentSequence],
        *(generate_uid(), 1, generate_uid(), 1, "maker", "model", "1", "1"),
        transfer_syntax_uid=syntax,
    )
    segmentation.save_as(tmp_path / "a.dcm")
    masks = {s.name: s.mask for s in iter_segments(tmp_path / "a.dcm", source.grid, wanted=lambda name: True)}
    assert list(masks) == ["liver", "left kidney"]
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, source.order.from_ras(label) == CLASSES[name])


# ---- what goes wrong


def edit_headers(paths: list[Path], edit: Callable[[Dataset], None]) -> list[Path]:
    for path in paths:
        header = pydicom.dcmread(path)
        edit(header)
        header.save_as(path)
    return paths


@pytest.mark.parametrize(
    "keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID"]
)
def test_a_source_without_identity_is_refused_in_one_line(keyword: str, tmp_path: Path) -> None:
    def edit(header: Dataset) -> None:
        del header[keyword]

    source = make_source(edit_headers(make_series(tmp_path / "series"), edit))
    with pytest.raises(InputError, match=f"lacks {keyword}") as caught:
        write(tmp_path, source, make_label(source))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_the_standard_requires_and_the_source_lacks_is_empty(tmp_path: Path) -> None:
    gone = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")

    def edit(header: Dataset) -> None:
        for keyword in (*gone, "StudyTime", "ReferringPhysicianName", "SliceThickness", "SeriesNumber"):
            del header[keyword]

    source = make_source(edit_headers(make_series(tmp_path / "series"), edit))
    path = write(tmp_path, source, make_label(source))
    dataset = pydicom.dcmread(path)
    assert all(keyword in dataset and not dataset[keyword].value for keyword in gone)
    assert errors_of_dciodvfy(path) == []


def test_values_without_the_standards_form_do_not_get_in_the_way(tmp_path: Path) -> None:
    def edit(header: Dataset) -> None:
        header.PatientSex, header.StudyID, header.PatientAge = "X", "x" * 17, "33"
        header.StudyDate = "2020-13-99"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = make_source(edit_headers(make_series(tmp_path / "series"), edit))
        path = write(tmp_path, source, make_label(source))
        dataset = pydicom.dcmread(path)
    assert (dataset.PatientSex, dataset.StudyID, dataset.StudyDate) == ("", "", "")
    assert "PatientAge" not in dataset
    assert errors_of_dciodvfy(path) == []


def test_names_in_another_character_set_are_kept(tmp_path: Path) -> None:
    def edit(header: Dataset) -> None:
        header.SpecificCharacterSet, header.PatientName = "ISO_IR 100", "Müller^Jörg"

    source = make_source(edit_headers(make_series(tmp_path / "series"), edit))
    path = write(tmp_path, source, make_label(source))
    assert str(pydicom.dcmread(path).PatientName) == "Müller^Jörg"
    assert errors_of_dciodvfy(path) == []


def test_a_source_that_is_no_series_is_refused(tmp_path: Path) -> None:
    grid = Grid((3, 3, 3), np.eye(4))
    source = SourceGrid(tmp_path / "a.nii.gz", grid, AxisOrder((0, 1, 2), (False, False, False)))
    with pytest.raises(InputError, match="no DICOM series"):
        write(tmp_path, source, np.zeros((3, 3, 3), np.uint8))


def test_labels_that_do_not_fit_are_defects(tmp_path: Path) -> None:
    source = make_source(make_series(tmp_path / "series"))
    label = make_label(source)
    with pytest.raises(ValueError, match="no class"):
        write(tmp_path, source, np.where(label == 2, 3, label))
    with pytest.raises(ValueError, match="no label map"):
        write(tmp_path, source, label[1:])
    with pytest.raises(ValueError, match="no label map"):
        write(tmp_path, source, label.astype(float))


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    source = make_source(make_series(tmp_path / "series"))
    path = write(tmp_path, source, make_label(source))
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "save_as", fail)
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path, source, make_label(source))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---- privacy


def test_nothing_that_tells_the_patient_is_said(tmp_path: Path, caplog: Any, capfd: Any, monkeypatch: Any) -> None:
    def edit(header: Dataset) -> None:
        header.PatientID, header.AccessionNumber = SECRETS["PatientID"] * 20, SECRETS["AccessionNumber"] * 5

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        source = make_source(edit_headers(make_series(tmp_path / "series"), edit))
        label = make_label(source)
        warnings.simplefilter("always")
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            path = write(tmp_path, source, label)
            list(iter_segments(path, source.grid, wanted=lambda name: True))
            assert logging.getLogger("highdicom").level == logging.NOTSET
        assert not caught
        assert not [record for record in caplog.records if record.name.startswith(("pydicom", "highdicom"))]

        def fail(*args: Any, **kwargs: Any) -> None:
            raise ValueError(f"{SECRETS}")

        monkeypatch.setattr("highdicom.seg.Segmentation", fail)
        with pytest.raises(InputError) as error:
            write(tmp_path, source, label)
    said = " ".join([caplog.text, *capfd.readouterr(), str(error.value), str(path.relative_to(tmp_path))])
    assert not [secret for secret in SECRETS.values() if secret in said]
    assert "cannot be made" in said
