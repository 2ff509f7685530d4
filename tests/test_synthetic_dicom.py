"""Synthetic DICOM says what it was asked to say: checked with pydicom, nibabel, dcm2niix, dciodvfy and matplotlib."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline

from pipeline.geometry import AxisOrder, Grid
from pipeline.io.volume import SourceGrid, Volume
from pipeline.synthetic import make_synthetic_case
from pipeline.synthetic_dicom import (
    TRANSFER_SYNTAXES,
    PlantedIdentity,
    SeriesOptions,
    WrittenSeries,
    label_polygons,
    write_dose_report_screen,
    write_scout,
    write_secondary_capture,
    write_series,
    write_structures,
    write_text_report,
)
from pipeline.synthetic_dicom.faults import (
    copy_file,
    delete_attribute,
    drop_slice,
    duplicate_slice,
    flip_bit,
    jitter_spacing,
    mix_orientations,
    set_attribute,
    shift_in_plane,
    truncate_file,
)
from pipeline.synthetic_dicom.layout import decimal

SHAPE, SPACING = (13, 11, 7), (0.9, 1.1, 2.5)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def make_volume(degrees: float = 0.0, *, shear: float = 0.0, num_channels: int = 1, shape=SHAPE) -> Volume:
    """Whole numbers on an oblique grid, tilted as by a gantry where `shear` is the forward shift per mm of slice."""
    case = make_synthetic_case(3, shape=shape, spacing=SPACING, num_classes=2, oblique_degrees=degrees)
    affine = case.image.grid.affine.copy()
    affine[:3, 2] += affine[:3, 1] / SPACING[1] * shear * SPACING[2]
    array = np.concatenate([case.image.array * (n + 1) - 50 * n for n in range(num_channels)])
    return Volume(array, Grid(shape, affine))


def read_frames(series: WrittenSeries) -> np.ndarray:
    """(C, slices, rows, columns) as pydicom decodes them."""
    frames = []
    for phase, numbers in zip(series.paths, series.frame_numbers, strict=True):
        files = [pydicom.dcmread(path).pixel_array for path in phase]
        frames.append([f if f.ndim == 2 else f[n] for f, n in zip(files, numbers, strict=True)])
    return np.array(frames)


def nibabel_affine(paths: tuple[Path, ...]) -> np.ndarray:
    """File-order affine (columns, rows, slices) in RAS+, made of the headers of the first and the last slice alone."""
    first, last = (pydicom.dcmread(path) for path in (paths[0], paths[-1]))
    row, column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    step = np.subtract(last.ImagePositionPatient, first.ImagePositionPatient).astype(float) / (len(paths) - 1)
    spacing = [float(value) for value in first.PixelSpacing]
    matrix = np.column_stack([row * spacing[1], column * spacing[0], step])
    return RAS_TO_LPS @ nib.affines.from_matvec(matrix, [float(value) for value in first.ImagePositionPatient])


def reorder(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """To the closest canonical order, as nibabel does it."""
    image = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    return np.asarray(image.dataobj), image.affine


BITS = [(True, 16, 16), (False, 16, 12), (True, 16, 12), (False, 8, 8), (True, 8, 8), (True, 32, 32), (False, 32, 20)]


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(("is_signed", "allocated", "stored"), BITS)
@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
def test_pydicom_decodes_the_stored_values(syntax, is_signed, allocated, stored, enhanced, tmp_path: Path):
    options = SeriesOptions(
        transfer_syntax=syntax, is_signed=is_signed, bits_allocated=allocated, bits_stored=stored, enhanced=enhanced
    )
    if TRANSFER_SYNTAXES[syntax].is_encapsulated and allocated == 32:
        with pytest.raises(ValueError, match="are compressed"):
            write_series(tmp_path, make_volume(), options)
        return
    low, high = options.stored_range
    array = np.random.default_rng(0).integers(low, high, (1, 36, 33, 2), endpoint=True).astype(float)
    array[0, 0, 0] = low, high
    series = write_series(tmp_path, Volume(array, Grid(array.shape[1:], np.eye(4))), options)
    np.testing.assert_array_equal(read_frames(series), series.stored.values)
    np.testing.assert_array_equal(series.array, array)
    header = pydicom.dcmread(series.files[0])
    assert header.file_meta.TransferSyntaxUID == TRANSFER_SYNTAXES[syntax]
    assert (header.BitsAllocated, header.BitsStored, header.HighBit) == (allocated, stored, stored - 1)


def test_small_odd_images_are_refused_where_an_encoder_would_fail(tmp_path: Path):
    volume = make_volume(shape=(9, 11, 7))
    for syntax, bits in (("rle", 8), ("jpeg_lossless_sv1", 8), ("jpeg_2000", 16), ("jpeg_ls", 16)):
        with pytest.raises(ValueError, match=r"are compressed|rows and columns"):
            write_series(tmp_path, volume, SeriesOptions(transfer_syntax=syntax, bits_allocated=bits, slope=4))


def test_cleared_and_shifted_bits_hold_the_same_values(tmp_path: Path):
    volume = make_volume()
    volume.array[0, 0, 0, 0] = -700
    cleared = write_series(tmp_path / "a", volume, SeriesOptions(bits_stored=12, unused_bits="zero"))
    words = np.frombuffer(pydicom.dcmread(cleared.paths[0][0]).PixelData, "<u2").astype(int)[: 13 * 11]
    assert words.max() < 4096
    signed = np.where(words >= 2048, words - 4096, words)
    np.testing.assert_array_equal(signed, cleared.stored.values[0, 0].ravel())
    shifted = write_series(tmp_path / "b", volume, SeriesOptions(bits_stored=12, high_bit=15))
    words = np.frombuffer(pydicom.dcmread(shifted.paths[0][0]).PixelData, "<i2")[: 13 * 11]
    np.testing.assert_array_equal(words >> 4, shifted.stored.values[0, 0].ravel())
    assert pydicom.dcmread(shifted.paths[0][0]).HighBit == 15


@pytest.mark.parametrize("shear", [0.0, 0.3])
@pytest.mark.parametrize("degrees", [0.0, 17.0])
@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_headers_give_the_grid_back(slice_axis: int, degrees: float, shear: float, tmp_path: Path):
    volume = make_volume(degrees, shear=shear if slice_axis == 2 else 0.0)
    series = write_series(tmp_path, volume, SeriesOptions(slice_axis=slice_axis, slice_thickness=3.0))
    in_file = read_frames(series)[0].transpose(2, 1, 0)
    array, affine = reorder(in_file.astype(np.int32), nibabel_affine(series.paths[0]))
    np.testing.assert_array_equal(array, volume.array[0])
    np.testing.assert_allclose(affine, volume.grid.affine, atol=1e-6)
    np.testing.assert_allclose(series.affine, volume.grid.affine, atol=1e-12)
    np.testing.assert_array_equal(series.array, volume.array)
    assert pydicom.dcmread(series.files[0]).SliceThickness == 3


def test_rows_and_columns_that_are_not_at_right_angles_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="right angles"):
        write_series(tmp_path, make_volume(shear=0.3), SeriesOptions(slice_axis=0))


def test_the_usual_orientations_are_those_of_scanners(tmp_path: Path):
    for axis, expected in ((0, [0, 1, 0, 0, 0, -1]), (1, [1, 0, 0, 0, 0, -1]), (2, [1, 0, 0, 0, 1, 0])):
        series = write_series(tmp_path / str(axis), make_volume(), SeriesOptions(slice_axis=axis))
        assert pydicom.dcmread(series.files[0]).ImageOrientationPatient == expected


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PSR", "IAL"])
def test_a_source_order_decides_the_slices_which_run_along_the_normal(codes: str, tmp_path: Path):
    case = make_synthetic_case(5, shape=SHAPE, spacing=SPACING, oblique_degrees=8.0, axis_codes=codes)
    series = write_series(tmp_path, case.image)
    affine = nibabel_affine(series.paths[0])
    written = nib.aff2axcodes(affine)
    assert written[:2] == tuple(codes[:2])
    assert written[2] in {"RL": "RL", "LR": "RL", "SI": "SI"}.get(codes[2], "RLSI")
    assert np.linalg.det(affine[:3, :3]) > 0
    array, back = reorder(read_frames(series)[0].transpose(2, 1, 0).astype(np.int32), affine)
    np.testing.assert_array_equal(array, case.image.array[0])
    np.testing.assert_allclose(back, case.image.grid.affine, atol=1e-6)


def test_a_slope_per_slice_is_exact_and_near_the_intensities(tmp_path: Path):
    volume = make_volume()
    volume.array[:] = volume.array * np.linspace(0.1, 3, SHAPE[2])
    options = SeriesOptions(modality="PT", slope_per_slice=True)
    series = write_series(tmp_path, volume, options)
    slopes = [float(pydicom.dcmread(path).RescaleSlope) for path in series.paths[0]]
    assert len(set(slopes)) == SHAPE[2]
    expected = np.array(slopes)[:, None, None] * read_frames(series)[0]
    np.testing.assert_array_equal(series.layout.slices(series.array[0]), expected)
    np.testing.assert_allclose(series.array, volume.array, atol=max(slopes) / 2)


def test_slope_and_intercept_give_the_intensities_back(tmp_path: Path):
    volume = make_volume()
    series = write_series(tmp_path, volume, SeriesOptions(is_signed=False, slope=0.5, intercept=-1024))
    header = pydicom.dcmread(series.files[0])
    assert (header.RescaleSlope, header.RescaleIntercept) == (0.5, -1024)
    np.testing.assert_array_equal(series.array, volume.array)


def test_intensities_without_room_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="outside the stored range"):
        write_series(tmp_path, make_volume(), SeriesOptions(bits_allocated=8, is_signed=False))
    with pytest.raises(ValueError, match="do not fit"):
        SeriesOptions(bits_allocated=8, bits_stored=12)
    with pytest.raises(ValueError, match="intercept of 0"):
        SeriesOptions(slope_per_slice=True, intercept=3)


PHASES = ["TemporalPositionIdentifier", "EchoTime", "EchoNumbers", "DiffusionBValue"]
PHASES += ["TriggerTime", "AcquisitionNumber", "InversionTime"]


@pytest.mark.parametrize("keyword", PHASES)
def test_channels_are_told_apart_by_the_keyword(keyword: str, tmp_path: Path):
    volume = make_volume(num_channels=3)
    options = SeriesOptions(modality="MR", phase_keyword=keyword, phase_values=(1.0, 20.0, 300.0))
    series = write_series(tmp_path, volume, options)
    values = [{float(pydicom.dcmread(path)[keyword].value) for path in phase} for phase in series.paths]
    assert values == [{1.0}, {20.0}, {300.0}]
    assert len(series.files) == 3 * SHAPE[2]
    np.testing.assert_array_equal(read_frames(series), series.stored.values)
    if keyword == "EchoNumbers":
        with pytest.raises(ValueError, match="no place for"):
            write_series(tmp_path, volume, replace(options, enhanced=True))
        return
    multi = write_series(tmp_path / "multi", volume, replace(options, enhanced=True))
    assert len(multi.files) == 1
    np.testing.assert_array_equal(read_frames(multi), series.stored.values)


def test_channels_without_a_keyword_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="phase keyword"):
        write_series(tmp_path, make_volume(num_channels=2))


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_every_frame_of_a_multi_frame_file_lies_where_its_slice_does(modality: str, tmp_path: Path):
    volume = make_volume(12.0)
    classic = write_series(tmp_path / "a", volume, SeriesOptions(modality=modality))
    series = write_series(tmp_path / "b", volume, SeriesOptions(modality=modality, enhanced=True, slope=2))
    (path,) = series.files
    header = pydicom.dcmread(path)
    for k, number in enumerate(series.frame_numbers[0]):
        frame, slice_header = header.PerFrameFunctionalGroupsSequence[number], pydicom.dcmread(classic.paths[0][k])
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert position == slice_header.ImagePositionPatient
        assert frame.FrameContentSequence[0].InStackPositionNumber == k + 1
        assert frame.PixelValueTransformationSequence[0].RescaleSlope == 2
    assert list(series.frame_numbers[0]) != sorted(series.frame_numbers[0])


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.dcm")}


@pytest.mark.parametrize("enhanced", [False, True])
def test_a_seed_decides_every_byte(enhanced: bool, tmp_path: Path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        options = SeriesOptions(seed=seed, enhanced=enhanced)
        series = write_series(tmp_path / name, make_volume(9.0), options)
        write_structures(tmp_path / name / "rt.dcm", series, {"box": [square(2.0)]})
    first, again, other = (tree_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_uids_are_valid_and_shared_within_a_study(tmp_path: Path):
    series = [write_series(tmp_path / str(n), make_volume(), SeriesOptions(seed=n, series_number=n)) for n in (1, 2)]
    headers = [pydicom.dcmread(path) for one in series for path in one.files]
    uids = [header.SOPInstanceUID for header in headers]
    assert len(set(uids)) == len(uids)
    assert all(uid.is_valid for uid in uids)
    assert len({header.SeriesInstanceUID for header in headers}) == 2
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({header[keyword].value for header in headers}) == 1
    assert SeriesOptions(study_seed=9).study_uid != series[0].options.study_uid


def test_names_and_numbers_are_shuffled_by_wish(tmp_path: Path):
    shuffled = write_series(tmp_path / "a", make_volume())
    plain = write_series(tmp_path / "b", make_volume(), SeriesOptions(is_shuffled=False))
    assert list(plain.paths[0]) == sorted(plain.paths[0])
    assert list(shuffled.paths[0]) != sorted(shuffled.paths[0])
    for series in (shuffled, plain):
        numbers = [pydicom.dcmread(path).InstanceNumber for path in series.paths[0]]
        assert numbers == list(series.instance_numbers[0])
    assert list(plain.instance_numbers[0]) == list(range(1, SHAPE[2] + 1))


def test_the_planted_identity_is_in_every_file(tmp_path: Path):
    who = PlantedIdentity(**{name: f"planted{n}" for n, name in enumerate(asdict(PlantedIdentity()))} | FIXED)
    options = SeriesOptions(identity=who)
    series = write_series(tmp_path, make_volume(), options)
    others = [write_secondary_capture(tmp_path, options), write_text_report(tmp_path, options)]
    for path in series.files:
        data = path.read_bytes()
        assert all(value.encode() in data for value in asdict(who).values())
    for path in others:
        assert who.patient_name.encode() in path.read_bytes()


FIXED = {"birth_date": "19370428", "sex": "F", "age": "083Y"}


def square(half: float) -> np.ndarray:
    return np.array([[-half, -half, 0.0], [half, -half, 0.0], [half, half, 0.0], [-half, half, 0.0]])


def test_other_objects_say_what_they_are(tmp_path: Path):
    options = SeriesOptions(series_number=5, seed=5)
    scout = write_scout(tmp_path, make_volume(), options)
    header = pydicom.dcmread(scout.files[0])
    assert list(header.ImageType) == ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    assert header.pixel_array.shape == (SHAPE[2], SHAPE[0])
    capture = pydicom.dcmread(write_secondary_capture(tmp_path, options))
    assert (capture.PhotometricInterpretation, capture.pixel_array.shape) == ("RGB", (24, 32, 3))
    dose = pydicom.dcmread(write_dose_report_screen(tmp_path, options))
    assert dose.pixel_array.shape == (24, 32)
    assert "ImagePositionPatient" not in dose
    report = pydicom.dcmread(write_text_report(tmp_path, options))
    assert "PixelData" not in report
    assert report.ContentSequence[0].TextValue == "Nothing was seen."


def random_label(seed: int) -> np.ndarray:
    """(I, J, K) classes in pieces that touch, meet at corners, reach the border and have holes."""
    return np.random.default_rng(seed).choice([0, 1, 2], SHAPE, p=[0.5, 0.3, 0.2]).astype(np.uint8)


def mask_of(path: Path, name: str, series: WrittenSeries) -> np.ndarray:
    """(I, J, K) voxels whose centres an odd number of contours of their slice hold, by matplotlib."""
    header = pydicom.dcmread(path)
    number = next(roi.ROINumber for roi in header.StructureSetROISequence if roi.ROIName == name)
    contours = next(c for c in header.ROIContourSequence if c.ReferencedROINumber == number).ContourSequence
    grid = series.layout.grid
    mask = np.zeros(grid.shape, bool)
    centres = np.array(np.meshgrid(*map(np.arange, grid.shape[:2]), indexing="ij")).reshape(2, -1).T
    for contour in contours:
        points = np.array(contour.ContourData, float).reshape(-1, 3) * [-1, -1, 1]
        pixels = nib.affines.apply_affine(np.linalg.inv(grid.affine), points)
        k = round(pixels[0, 2])
        np.testing.assert_allclose(pixels[:, 2], k, atol=1e-3)
        uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
        assert uid == pydicom.dcmread(series.paths[0][k]).SOPInstanceUID
        mask[..., k] ^= Outline(pixels[:, :2]).contains_points(centres).reshape(grid.shape[:2])
    return series.layout.order.to_ras(mask)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_voxels_inside_the_contours_are_the_class(slice_axis: int, seed: int, tmp_path: Path):
    label = random_label(seed)
    enhanced = seed == 2
    series = write_series(tmp_path, make_volume(15.0), SeriesOptions(slice_axis=slice_axis, enhanced=enhanced))
    polygons = label_polygons(series, label, {1: "organ", 2: "lesion", 7: "absent"})
    path = write_structures(tmp_path / "rt.dcm", series, polygons)
    for value, name in ((1, "organ"), (2, "lesion")):
        np.testing.assert_array_equal(mask_of(path, name, series), label == value)
    assert [roi.ROIName for roi in pydicom.dcmread(path).StructureSetROISequence] == ["organ", "lesion", "absent"]
    assert polygons["absent"] == []


def test_faults_do_what_they_say(tmp_path: Path):
    series = write_series(tmp_path, make_volume(5.0))
    paths = series.paths[0]
    drop_slice(paths[0])
    assert not paths[0].exists()
    (twin,) = duplicate_slice(paths[1], changes_pixels=True).paths
    first, second = pydicom.dcmread(paths[1]), pydicom.dcmread(twin)
    assert first.ImagePositionPatient == second.ImagePositionPatient
    assert first.SOPInstanceUID != second.SOPInstanceUID == second.file_meta.MediaStorageSOPInstanceUID
    assert np.count_nonzero(first.pixel_array != second.pixel_array) == 1
    assert copy_file(paths[1], "deeper/copy").paths[0].read_bytes() == paths[1].read_bytes()
    before = pydicom.dcmread(paths[2])
    shift_in_plane(paths[2], 4.0)
    moved = np.subtract(pydicom.dcmread(paths[2]).ImagePositionPatient, before.ImagePositionPatient).astype(float)
    np.testing.assert_allclose(moved, 4 * np.array(before.ImageOrientationPatient[:3], float), atol=1e-6)
    mix_orientations([paths[3]])
    i, j = np.array(pydicom.dcmread(paths[3]).ImageOrientationPatient, float).reshape(2, 3)
    normal = RAS_TO_LPS[:3, :3] @ series.layout.normal
    np.testing.assert_allclose([i @ j, j @ j, j @ normal], [0, 1, 1], atol=1e-9)
    delete_attribute([paths[4]], "PixelSpacing")
    assert "PixelSpacing" not in pydicom.dcmread(paths[4])
    set_attribute([paths[4]], "Rows", 5)
    assert pydicom.dcmread(paths[4]).Rows == 5
    size = paths[5].stat().st_size
    truncate_file(paths[5], 0.5)
    assert paths[5].stat().st_size == size // 2
    data = paths[6].read_bytes()
    flip_bit(paths[6], -1)
    assert [a ^ b for a, b in zip(data, paths[6].read_bytes(), strict=True) if a != b] == [128]


def test_jitter_moves_slices_along_the_normal_only(tmp_path: Path):
    series = write_series(tmp_path, make_volume(5.0))
    jitter_spacing(series.paths[0], 0.4, seed=1)
    for k, path in enumerate(series.paths[0]):
        now = np.array(pydicom.dcmread(path).ImagePositionPatient, float) * [-1, -1, 1]
        by = now - series.layout.grid.affine[:3, 3] - k * series.layout.grid.affine[:3, 2]
        assert 0 <= abs(by @ series.layout.normal) <= 0.4
        np.testing.assert_allclose(np.cross(by, series.layout.normal), 0, atol=1e-6)
        assert (np.linalg.norm(by) > 1e-6) == (0 < k < SHAPE[2] - 1)


@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 3, -123456.789012345, 1e-12, 512.0, 2e9 / 3, -1e-9])
def test_decimal_strings_fit_and_are_near(value: float):
    text = decimal(value)
    assert len(text) <= 16
    assert text != "-0"
    assert math.isclose(float(text), value, rel_tol=1e-10, abs_tol=1e-9)


needs_dcm2niix = pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed")


def convert(folder: Path, out: Path) -> nib.Nifti1Image:
    out.mkdir()
    subprocess.run(["dcm2niix", "-f", "%s", "-o", out, folder], check=True, capture_output=True)
    (path,) = out.glob("*.nii")
    return nib.load(path)


@needs_dcm2niix
@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("degrees", [0.0, 14.0])
@pytest.mark.parametrize(("slice_axis", "modality"), [(0, "MR"), (1, "MR"), (2, "CT")])
def test_dcm2niix_makes_the_same_volume(slice_axis, modality, degrees: float, enhanced: bool, tmp_path: Path):
    volume = make_volume(degrees)
    options = SeriesOptions(
        slice_axis=slice_axis, modality=modality, enhanced=enhanced, slice_thickness=2.0, is_shuffled=not enhanced
    )
    write_series(tmp_path / "dicom", volume, options)
    image = convert(tmp_path / "dicom", tmp_path / "nifti")
    array, affine = reorder(np.asarray(image.dataobj), image.affine)
    np.testing.assert_array_equal(array, volume.array[0])
    np.testing.assert_allclose(affine, volume.grid.affine, atol=1e-3)


@needs_dciodvfy
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_classic_images_keep_to_the_standard(modality: str, tmp_path: Path):
    options = SeriesOptions(modality=modality, slope_per_slice=modality == "PT")
    series = write_series(tmp_path, make_volume(10.0), options)
    done = subprocess.run(["dciodvfy", series.files[0]], capture_output=True, text=True, check=False)
    assert "Error" not in done.stdout + done.stderr


def test_a_volume_with_a_source_can_be_cut_along_another_axis(tmp_path: Path):
    volume = make_volume()
    order = AxisOrder((0, 1, 2), (False, False, False))
    with_source = Volume(volume.array, volume.grid, SourceGrid(Path("none"), volume.grid, order))
    series = write_series(tmp_path, with_source, SeriesOptions(slice_axis=0))
    assert len(series.files) == SHAPE[0]
