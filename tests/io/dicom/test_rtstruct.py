"""RT structure sets to masks: masks made by others from real files, and shapes known analytically, are the oracles."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.io.dicom.headers import read_header
from pipeline.io.dicom.rtstruct import iter_structures
from pipeline.io.dicom.structures import Structure

FRAME, SERIES = generate_uid(), generate_uid()
SHAPE = (30, 24, 7)
# Of the patient; none of it may be in any message. The dates and numbers are such as pydicom warns about by quoting.
PRIVATE = {
    "PatientName": "SECRET^JANE",
    "PatientID": "SECRET-4711",
    "PatientBirthDate": "SECRETDATE",
    "AccessionNumber": "SECRET-TOO-LONG-AN-ACCESSION",
    "InstitutionName": "SECRET CLINIC",
}

Loop = np.ndarray
Contour = tuple[str, str] | Loop


def make_grid(*, spacing: tuple[float, float, float] = (1, 1, 3), turn: Any = None, shear: float = 0.0) -> Grid:
    """File order of an axial series: i to the left, j to the back, k up; turned and sheared as asked."""
    shape = np.diag([-1.0, -1, 1]) @ np.diag(spacing)
    shape[1, 2] += shear * spacing[2]
    affine = nib.affines.from_matvec((np.eye(3) if turn is None else turn) @ shape, [41.5, 17.25, -102.4])
    return Grid(SHAPE, affine)


AXIAL = make_grid()
OBLIQUE = make_grid(turn=nib.eulerangles.euler2mat(0.4, -0.3, 0.9), spacing=(0.8, 1.1, 2.5))
SHEARED = make_grid(turn=nib.eulerangles.euler2mat(0.1, 0.2, 0), spacing=(1, 0.7, 3), shear=0.36)
WIDE = make_grid(spacing=(0.7, 1.4, 2))
GRIDS = pytest.mark.parametrize("grid", [AXIAL, OBLIQUE, SHEARED, WIDE], ids=["axial", "oblique", "sheared", "wide"])


def to_lps(grid: Grid, voxels: Any) -> np.ndarray:
    """Voxels (n, 3) to DICOM's patient millimetres."""
    return nib.affines.apply_affine(grid.affine, np.asarray(voxels, float)) * [-1, -1, 1]


def square(grid: Grid, k: float, low: float = 4.5, high: float = 12.5) -> Loop:
    """A loop through the borders of voxels; between them are 8 x 8 voxels by default."""
    return to_lps(grid, [(low, low, k), (high, low, k), (high, high, k), (low, high, k)])


def make_contour(contour: Contour) -> Dataset:
    item = Dataset()
    if isinstance(contour, tuple):
        item.ContourGeometricType, text = contour
        # As bytes: pydicom would refuse what the tests of malformed data need.
        item[0x30060050] = pydicom.DataElement(0x30060050, "OB", text.encode() + b" " * (len(text) % 2))
    else:
        item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(contour)
        item.ContourData = [f"{value:.9g}" for value in np.ravel(contour)]
    return item


def make_dataset(rois: dict[str, Iterable[Contour]]) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", generate_uid()
    with pydicom.config.disable_value_validation():
        for keyword, value in PRIVATE.items():
            setattr(dataset, keyword, value)
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, frame.FrameOfReferenceUID = SERIES, FRAME
    study.RTReferencedSeriesSequence = Sequence([series])
    frame.RTReferencedStudySequence = Sequence([study])
    dataset.ReferencedFrameOfReferenceSequence = Sequence([frame])
    dataset.StructureSetROISequence, dataset.ROIContourSequence = Sequence(), Sequence()
    for number, (name, contours) in enumerate(rois.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, FRAME
        drawn.ReferencedROINumber = number
        drawn.ContourSequence = Sequence([make_contour(contour) for contour in contours])
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(drawn)
    dataset.ApprovalStatus = "UNAPPROVED"
    return dataset


def save(dataset: Dataset, path: Path, syntax: str = ImplicitVRLittleEndian) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID", "1.2.840.10008.5.1.4.1.1.481.3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pydicom.config.disable_value_validation():
            dataset.save_as(path, enforce_file_format=True)
    return path


def draw(path: Path, grid: Grid = AXIAL, wanted: Callable[[str], bool] = lambda name: True) -> list[Structure]:
    return list(iter_structures(path, grid, wanted=wanted))


def draw_one(contours: Iterable[Contour], grid: Grid, folder: Path) -> np.ndarray:
    (structure,) = draw(save(make_dataset({"a": contours}), folder / "rs.dcm"), grid)
    assert structure.mask.shape == grid.shape
    return structure.mask


@pytest.fixture(autouse=True)
def nothing_leaks(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> Iterable[None]:
    """No test of this file lets a warning, or a log line with the patient's data or a folder, get out."""
    caplog.set_level(logging.DEBUG)
    yield
    records = caplog.get_records("call")
    assert {record.name for record in records} <= {"voxfit.rtstruct"}
    said = "".join(record.getMessage() for record in records)
    assert "SECRET" not in said
    assert "/" not in said
    assert [str(item.message) for item in recwarn] == []


def refused(path: Path, grid: Grid = AXIAL) -> str:
    """The message of the refusal, checked to be one line that tells nothing of the patient or of folders."""
    with pytest.raises(InputError) as caught:
        draw(path, grid)
    return check_message(caught.value)


def check_message(error: InputError) -> str:
    message = str(error)
    assert "\n" not in message
    assert "SECRET" not in message
    assert "/" not in message
    assert error.__suppress_context__ or error.__context__ is None
    assert error.where
    assert error.fix
    return message


MODALITIES = [(patient, modality) for patient in ("STS_002", "STS_008") for modality in ("CT", "MR_T1", "PET")]


@pytest.mark.parametrize(("patient", "modality"), MODALITIES)
class TestRealStructureSets:
    def test_masks_equal_those_that_others_made(self, patient: str, modality: str, shared_data: Path):
        root = sts_root(shared_data)
        image = nib.load(root / "nifti" / patient / f"{modality}_mask.nii.gz")
        expected = np.asarray(image.dataobj) > 0
        path = root / "dicom" / patient / modality / "mask" / "RS.dcm"
        for grid in (Grid(image.shape, image.affine), grid_of_series(path.parent.parent / "image")):
            (structure,) = draw(path, grid)
            dice = 2 * (structure.mask & expected).sum() / (structure.mask.sum() + expected.sum())
            assert dice == 1.0
            np.testing.assert_array_equal(structure.mask, expected)

    def test_the_header_names_structure_series_and_space(self, patient: str, modality: str, shared_data: Path):
        folder = sts_root(shared_data) / "dicom" / patient / modality
        image = pydicom.dcmread(sorted((folder / "image").iterdir())[0], stop_before_pixels=True)
        found = read_header(folder / "mask" / "RS.dcm")
        assert found.structure_names == (f"GTV_Mass_{modality}",)
        assert found.referenced_series == (image.SeriesInstanceUID,)
        assert found.frame_of_reference == image.FrameOfReferenceUID

    def test_the_series_of_another_modality_is_refused_or_gives_another_grid(
        self, patient: str, modality: str, shared_data: Path
    ):
        folder = sts_root(shared_data) / "dicom" / patient / modality
        grid = grid_of_series(folder / "image")
        half = grid.affine.copy()
        half[:3, 3] += half[:3, 2] / 2
        assert "off the nearest slice" in refused(folder / "mask" / "RS.dcm", Grid(grid.shape, half))


def sts_root(shared_data: Path) -> Path:
    root = shared_data / "dicom" / "rtstruct_sts"
    if not root.is_dir():
        pytest.skip("real structure sets are not beside the project (../shared/data/dicom/rtstruct_sts)")
    return root


def grid_of_series(folder: Path) -> Grid:
    """From the headers alone, for axial series."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    first, second = sorted(headers, key=lambda header: float(header.ImagePositionPatient[2]))[:2]
    position = np.array(first.ImagePositionPatient, float)
    row, column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    step = np.array(second.ImagePositionPatient, float) - position
    axes = np.stack([row * first.PixelSpacing[1], column * first.PixelSpacing[0], step], axis=1)
    flip = np.diag([-1.0, -1, 1])
    return Grid((first.Columns, first.Rows, len(headers)), nib.affines.from_matvec(flip @ axes, flip @ position))


@GRIDS
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_circle_holds_the_centres_within_its_radius(grid: Grid, seed: int, tmp_path: Path):
    rng = np.random.default_rng(seed)
    # The plane of the slice is that of the grid's i and j, also where k is not at right angles to it.
    along, _ = np.linalg.qr(grid.affine[:3, :2])
    k, radius = int(rng.integers(0, SHAPE[2])), rng.uniform(2, 9)
    centre = nib.affines.apply_affine(grid.affine, [*rng.uniform(0, 1, 2) * SHAPE[:2], k])
    angles = np.linspace(0, 2 * np.pi, 1500, endpoint=False) * rng.choice([-1, 1])
    circle = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) @ along.T
    mask = draw_one([circle * [-1, -1, 1]], grid, tmp_path)
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    distance = np.linalg.norm(nib.affines.apply_affine(grid.affine, voxels) - centre, axis=-1)
    expected = (distance < radius) & (voxels[..., 2] == k)
    # 1500 chords lie up to 2e-5 mm within the circle.
    clear = np.abs(distance - radius) > 1e-3
    np.testing.assert_array_equal(mask[clear], expected[clear])
    assert expected.any()


@GRIDS
def test_holes_islands_and_disjoint_contours_combine_by_exclusive_or(grid: Grid, tmp_path: Path):
    loops = [square(grid, 2), square(grid, 2, 6.5, 9.5)[::-1], square(grid, 2, 14.5, 17.5), square(grid, 4)]
    expected = np.zeros(SHAPE, bool)
    expected[5:13, 5:13, [2, 4]] = True
    expected[7:10, 7:10, 2] = False
    expected[15:18, 15:18, 2] = True
    np.testing.assert_array_equal(draw_one(loops, grid, tmp_path), expected)
    as_xor = [("CLOSEDPLANAR_XOR", "\\".join(f"{value:.9g}" for value in loop.ravel())) for loop in loops]
    np.testing.assert_array_equal(draw_one(as_xor, grid, tmp_path), expected)


@GRIDS
def test_a_keyhole_is_a_hole(grid: Grid, tmp_path: Path):
    outer, inner = square(grid, 3), square(grid, 3, 6.5, 9.5)
    keyhole = np.vstack([outer, outer[:1], inner[:1], inner[::-1]])
    expected = np.zeros(SHAPE, bool)
    expected[5:13, 5:13, 3] = True
    expected[7:10, 7:10, 3] = False
    np.testing.assert_array_equal(draw_one([keyhole], grid, tmp_path), expected)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("is_undefined_length", [False, True])
def test_every_encoding_reads_alike(syntax: str, is_undefined_length: bool, tmp_path: Path):
    dataset = make_dataset({"a": [square(AXIAL, 1)], "b": [square(AXIAL, 5)]})
    for keyword in ("StructureSetROISequence", "ROIContourSequence"):
        dataset[keyword].is_undefined_length = is_undefined_length
    path = save(dataset, tmp_path / "rs.dcm", syntax)
    assert [np.argwhere(s.mask)[0].tolist() for s in draw(path)] == [[5, 5, 1], [5, 5, 5]]
    assert [s.mask.sum() for s in draw(path)] == [64, 64]
    assert read_header(path).structure_names == ("a", "b")


def test_only_wanted_structures_are_drawn_and_others_may_be_unusable(tmp_path: Path):
    rois = {"bad": [("CLOSED_PLANAR", "1\\2")], "good": [square(AXIAL, 1)]}
    path = save(make_dataset(rois), tmp_path / "rs.dcm")
    (structure,) = draw(path, wanted=lambda name: name == "good")
    assert (structure.name, structure.number) == ("good", 2)
    assert draw(path, wanted=lambda name: False) == []


def test_an_error_of_the_callers_choice_is_the_callers(tmp_path: Path):
    path = save(make_dataset({"a": [square(AXIAL, 1)]}), tmp_path / "rs.dcm")
    with pytest.raises(ZeroDivisionError):
        iter_structures(path, AXIAL, wanted=lambda name: bool(1 / 0))


def test_names_keep_their_characters_and_may_occur_twice(tmp_path: Path):
    dataset = make_dataset({" Hüfte ": [square(AXIAL, 1)], "b": [square(AXIAL, 2)]})
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StructureSetROISequence[1].ROIName = "Hüfte"
    path = save(dataset, tmp_path / "rs.dcm")
    assert read_header(path).structure_names == ("Hüfte", "Hüfte")
    assert [(s.name, s.number) for s in draw(path)] == [("Hüfte", 1), ("Hüfte", 2)]


def test_references_that_the_file_leaves_out_are_empty(tmp_path: Path):
    dataset = make_dataset({"a": [square(AXIAL, 1)]})
    dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = ""
    assert read_header(save(dataset, tmp_path / "a.dcm")).frame_of_reference == FRAME
    del dataset.ReferencedFrameOfReferenceSequence
    found = read_header(save(dataset, tmp_path / "b.dcm"))
    assert (found.referenced_series, found.frame_of_reference) == ((), "")
    assert len(draw(tmp_path / "b.dcm")) == 1


@GRIDS
def test_contours_may_lie_a_tenth_of_a_slice_off_but_not_more(grid: Grid, tmp_path: Path):
    near, exact = [square(grid, 2.098), square(grid, 2.902)], [square(grid, 2), square(grid, 3)]
    np.testing.assert_array_equal(draw_one(near, grid, tmp_path), draw_one(exact, grid, tmp_path))
    path = save(make_dataset({"tumour": [square(grid, 2), square(grid, 3.108)]}), tmp_path / "rs.dcm")
    message = refused(path, grid)
    distance = 0.108 / np.linalg.norm(np.linalg.inv(grid.affine)[2, :3])
    assert "rs.dcm, structure 'tumour': a contour lies" in message
    assert f"{distance:.2f} mm off the nearest slice at x, y, z =" in message
    assert any(f"= {x:.2f}, {y:.2f}, {z:.2f} mm (LPS)" in message for x, y, z in square(grid, 3.108))


@GRIDS
def test_contours_that_lean_across_slices_are_refused(grid: Grid, tmp_path: Path):
    loop = to_lps(grid, [(4, 4, 2), (12, 4, 2), (12, 12, 3), (4, 12, 3)])
    assert "off the nearest slice" in refused(save(make_dataset({"a": [loop]}), tmp_path / "rs.dcm"), grid)


@pytest.mark.parametrize("k", [-1, 7])
def test_a_structure_longer_than_the_image_is_refused_and_never_cut(k: int, tmp_path: Path):
    path = save(make_dataset({"cord": [square(AXIAL, 0), square(AXIAL, 6), square(AXIAL, k)]}), tmp_path / "rs.dcm")
    message = refused(path)
    x, y, z = square(AXIAL, k)[0]
    assert "structure 'cord': 1 of 3 contours lie before the first slice or behind the last" in message
    assert f"such as at x, y, z = {x:.2f}, {y:.2f}, {z:.2f} mm (LPS)" in message


def test_contours_beyond_the_image_in_its_plane_are_cut_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    expected = np.zeros(SHAPE, bool)
    expected[20:, 20:, 1] = True
    np.testing.assert_array_equal(draw_one([square(AXIAL, 1, 19.5, 99)], AXIAL, tmp_path), expected)
    assert caplog.messages == ["rs.dcm, structure 'a': 1 contour(s) reach beyond the image and are cut at its border"]


@pytest.mark.parametrize("place", [(40, 50), (-50, -9)])
def test_a_structure_beside_the_image_is_refused(place: tuple[float, float], tmp_path: Path):
    path = save(make_dataset({"a": [square(AXIAL, 1, *place), square(AXIAL, 2, *place)]}), tmp_path / "rs.dcm")
    assert "structure 'a': all contours lie beside the image" in refused(path)


def test_what_is_not_closed_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    line = ("OPEN_PLANAR", "1\\2\\3\\4\\5\\6")
    rois = {
        "a": [line, line, ("POINT", "1\\2\\3"), square(AXIAL, 1), square(AXIAL, 1)[:2]],
        "points": [("POINT", "1\\2\\3"), ("SECRET", "1")],
        "nothing": [],
        "short": [("CLOSED_PLANAR", "")],
    }
    (structure,) = draw(save(make_dataset(rois), tmp_path / "rs.dcm"))
    assert structure.mask.sum() == 64
    assert caplog.messages == [
        "rs.dcm, structure 'a': 2 contour(s) left out, not closed: OPEN_PLANAR",
        "rs.dcm, structure 'a': 1 contour(s) left out, not closed: POINT",
        "rs.dcm, structure 'a': 1 contour(s) of less than 3 points left out",
        "rs.dcm, structure 'points': 1 contour(s) left out, not closed: POINT",
        "rs.dcm, structure 'points': 1 contour(s) left out, not closed: unknown type",
        "rs.dcm, structure 'points': no closed contours, left out",
        "rs.dcm, structure 'nothing': no closed contours, left out",
        "rs.dcm, structure 'short': 1 contour(s) of less than 3 points left out",
        "rs.dcm, structure 'short': no closed contours, left out",
    ]


def test_a_structure_without_an_entry_for_contours_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset = make_dataset({"a": [square(AXIAL, 1)], "empty": []})
    del dataset.ROIContourSequence[1]
    assert [s.name for s in draw(save(dataset, tmp_path / "rs.dcm"))] == ["a"]
    assert caplog.messages == ["rs.dcm, structure 'empty': no closed contours, left out"]


def test_slices_between_contours_stay_empty_with_one_word(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mask = draw_one([square(AXIAL, k) for k in (0, 2, 5)], AXIAL, tmp_path)
    assert np.flatnonzero(mask.any(axis=(0, 1))).tolist() == [0, 2, 5]
    (message,) = caplog.messages
    assert "structure 'a': 3 slice(s) without a contour between" in message


def test_a_contour_exported_twice_does_not_erase_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert draw_one([square(AXIAL, 1), square(AXIAL, 1)], AXIAL, tmp_path).sum() == 64
    assert caplog.messages == ["rs.dcm, structure 'a': 1 contour(s) are there twice, taken once"]


def test_a_structure_smaller_than_a_voxel_has_an_empty_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert not draw_one([square(AXIAL, 1, 4.6, 4.9)], AXIAL, tmp_path).any()
    assert "too small" in caplog.text


def change(keyword: str, index: int, **values: Any) -> Callable[[Dataset], None]:
    """Set elements of an item of a sequence, or take them out with None."""

    def apply(dataset: Dataset) -> None:
        item = dataset[keyword][index]
        for name, value in values.items():
            delattr(item, name) if value is None else setattr(item, name, value)

    return apply


def change_data(text: str) -> Callable[[Dataset], None]:
    def apply(dataset: Dataset) -> None:
        dataset.ROIContourSequence[0].ContourSequence[0] = make_contour(("CLOSED_PLANAR", text))

    return apply


def change_type(kind: str) -> Callable[[Dataset], None]:
    return lambda dataset: setattr(dataset.ROIContourSequence[0].ContourSequence[0], "ContourGeometricType", kind)


MALFORMED: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "values not by threes": (change_data("1\\2\\3\\4"), "structure 'tumour': a contour of 4 values"),
    "not a number": (change_data("1\\2\\3\\SECRET\\5\\6"), "structure 'tumour': contour data that are not numbers"),
    "an empty value": (change_data("1\\2\\\\4\\5\\6"), "structure 'tumour': contour data that are not numbers"),
    "nan": (change_data("1\\2\\nan\\4\\5\\6\\7\\8\\9"), "structure 'tumour': a contour with a point at no finite"),
    "infinite": (change_data("1\\2\\1e999\\4\\5\\6\\7\\8\\9"), "structure 'tumour': a contour with a point at no"),
    "beyond reason": (change_data("1\\2\\1e300\\4\\5\\6\\7\\8\\9"), "structure 'tumour': a contour with a point at no"),
    "no type": (change_type(""), "structure 'tumour': a contour without a geometric type"),
    "no names": (lambda d: delattr(d, "StructureSetROISequence"), "rs.dcm: holds no StructureSetROISequence"),
    "no contours": (lambda d: delattr(d, "ROIContourSequence"), "rs.dcm: holds no ROIContourSequence"),
    "empty contours": (lambda d: d.ROIContourSequence.clear(), "rs.dcm: holds no ROIContourSequence"),
    "contours of nobody": (change("ROIContourSequence", 1, ReferencedROINumber=9), "number 9, which has no name"),
    "contours of no number": (change("ROIContourSequence", 1, ReferencedROINumber=None), "truncated or malformed"),
    "contours twice": (change("ROIContourSequence", 1, ReferencedROINumber=1), "two sets of contours of 'tumour'"),
    "no name": (change("StructureSetROISequence", 1, ROIName=""), "rs.dcm: structure number 2 has no name"),
    "no number": (change("StructureSetROISequence", 1, ROINumber=None), "truncated or malformed"),
    "a number twice": (change("StructureSetROISequence", 1, ROINumber=1), "'tumour' and 'b' are both structure number"),
    "two spaces": (
        change("StructureSetROISequence", 1, ReferencedFrameOfReferenceUID="1.2.3"),
        "rs.dcm: its structures lie in 2 frames of reference",
    ),
    "another class": (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "no RT structure set"),
    "no class": (lambda d: delattr(d, "SOPClassUID"), "no RT structure set"),
}


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=["implicit", "explicit"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_in_one_line(name: str, syntax: str, tmp_path: Path):
    spoil, expected = MALFORMED[name]
    dataset = make_dataset({"tumour": [square(AXIAL, 1)], "b": [square(AXIAL, 2)]})
    assert len(draw(save(dataset, tmp_path / "rs.dcm", syntax))) == 2
    spoil(dataset)
    assert expected in refused(save(dataset, tmp_path / "rs.dcm", syntax))


def test_what_is_no_dicom_file_is_refused(tmp_path: Path):
    text, empty = tmp_path / "a.txt", tmp_path / "empty.dcm"
    text.write_text("SECRET " * 100)
    empty.write_bytes(b"")
    cases = {text: "is not DICOM", empty: "is not DICOM", tmp_path: "is a folder", tmp_path / "no.dcm": "no such file"}
    for path, expected in cases.items():
        with pytest.raises(InputError, match=f"^{path.name}: {expected}"):
            draw(path)


def test_a_grid_without_an_inverse_is_refused(tmp_path: Path):
    path = save(make_dataset({"a": [square(AXIAL, 1)]}), tmp_path / "rs.dcm")
    with pytest.raises(InputError, match=r"^the image's grid: the affine is singular"):
        draw(path, Grid(SHAPE, np.diag([1.0, 1, 0, 1])))


@pytest.mark.parametrize("is_undefined_length", [False, True])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_a_file_cut_anywhere_is_refused_or_complete_in_its_contours(
    syntax: str, is_undefined_length: bool, tmp_path: Path
):
    dataset = make_dataset({"tumour": [square(AXIAL, 1)], "b": [square(AXIAL, 2), square(AXIAL, 3)]})
    for keyword in ("StructureSetROISequence", "ROIContourSequence"):
        dataset[keyword].is_undefined_length = is_undefined_length
    whole = save(dataset, tmp_path / "whole.dcm", syntax).read_bytes()
    path, accepted = tmp_path / "rs.dcm", 0
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        try:
            found = draw(path)
        except InputError as error:
            check_message(error)
        else:
            accepted += 1
            assert [s.mask.sum() for s in found] == [64, 128], size
    # Only cuts between the contours and the end: one last element of 10 bytes and its header.
    assert accepted <= 3


@pytest.mark.parametrize("is_undefined_length", [False, True])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_file_cut_within_its_contours_is_called_truncated(syntax: str, is_undefined_length: bool, tmp_path: Path):
    dataset = make_dataset({"tumour": [square(AXIAL, k) for k in range(7)]})
    dataset["ROIContourSequence"].is_undefined_length = is_undefined_length
    path = save(dataset, tmp_path / "rs.dcm", syntax)
    path.write_bytes(path.read_bytes()[:-200])
    assert "rs.dcm: is truncated" in refused(path)
    if not is_undefined_length:
        assert read_header(path).structure_names == ("tumour",)
    # The preamble, "DICM", the element that tells the length of the file meta group, and that group.
    meta_length = pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength
    path.write_bytes(path.read_bytes()[: 128 + 4 + 12 + meta_length])
    with pytest.raises(InputError, match=r"rs\.dcm: is truncated\."):
        draw(path)


def test_contour_data_that_are_longer_than_their_place_are_refused(tmp_path: Path):
    dataset = make_dataset({"tumour": [square(AXIAL, 1)]})
    del dataset.ApprovalStatus
    path = save(dataset, tmp_path / "rs.dcm")
    content = path.read_bytes()
    at = content.index(b"\x06\x30\x50\x00") + 4
    length = int.from_bytes(content[at : at + 4], "little")
    path.write_bytes(content[:at] + (length + 60).to_bytes(4, "little") + content[at + 4 :])
    assert "structure 'tumour': contour data that end too soon" in refused(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_wrong_bytes_is_drawn_or_refused_and_tells_nothing(data: st.DataObject, tmp_path: Path):
    path = tmp_path / "whole.dcm"
    if not path.exists():
        save(make_dataset({"tumour": [square(AXIAL, 1)], "b": [square(AXIAL, 2)]}), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "rs.dcm").write_bytes(content)
    for read in (draw, read_header):
        try:
            read(tmp_path / "rs.dcm")
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert "SECRET" not in message


@pytest.mark.parametrize("mode", [pydicom.config.WARN, pydicom.config.RAISE])
def test_values_that_pydicom_would_quote_are_read_and_not_quoted(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = make_dataset({"a": [square(AXIAL, 1)]})
    roi, series = Dataset(), Dataset()
    with pydicom.config.disable_value_validation():
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = 1, "a" * 70, "SECRET frame"
        series.SeriesInstanceUID = "SECRET series"
    dataset.StructureSetROISequence = Sequence([roi])
    frame = dataset.ReferencedFrameOfReferenceSequence[0]
    frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence = Sequence([series])
    path = save(dataset, tmp_path / "rs.dcm")
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", mode)
    assert read_header(path).referenced_series == ("SECRET series",)
    assert [s.name for s in draw(path)] == ["a" * 70]


def test_numbers_that_are_none_are_not_quoted(tmp_path: Path):
    path = save(make_dataset({"a": [square(AXIAL, 1)]}), tmp_path / "rs.dcm")
    number = b"\x06\x30\x22\x00\x02\x00\x00\x00" + b"1 "
    content = path.read_bytes()
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, number[:-2] + b"S:"))
    message = refused(path)
    assert "rs.dcm: is truncated or malformed" in message
    assert "S:" not in message


def test_pydicom_speaks_again_afterwards(tmp_path: Path):
    before = (pydicom.config.settings.reading_validation_mode, logging.getLogger("pydicom").disabled)
    draw(save(make_dataset({"a": [square(AXIAL, 1)]}), tmp_path / "rs.dcm"))
    refused(tmp_path / "no.dcm")
    assert (pydicom.config.settings.reading_validation_mode, logging.getLogger("pydicom").disabled) == before
