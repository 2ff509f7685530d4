"""Series that can be read: real ones against their NIfTI, synthetic ones against what was written."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from scipy.ndimage import map_coordinates

from pipeline.errors import InputError
from pipeline.geometry import Grid
from pipeline.io.dicom.reader import dicom_files, read_series, read_stack_of
from pipeline.io.dicom.tilt import back_to_slices, upright
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import TRANSFER_SYNTAXES, SeriesOptions, write_series
from pipeline.synthetic_dicom.faults import set_attribute

# Series of `series/`, and the NIfTI beside each.
READABLE = """
failing/slicecount/001 generic/anatomical/001 generic/anatomical/001_implicit generic/anatomical/002_non_isotropic
generic/compressed/001 generic/compressed_j2k/001 generic/compressed_jpeg/001 generic/compressed_jpegls/001
generic/compressed_rle/001 hitachi/anatomical/001 hitachi/anatomical/001_implicit hyperfine/anatomical/001
siemens/anatomical/001 siemens/anatomical/001_implicit siemens_multiframe/anatomical/001
"""
SPACING = (0.9, 1.1, 2.5)
COMPRESSED = [name for name, syntax in TRANSFER_SYNTAXES.items() if syntax.is_encapsulated]


def make_volume(degrees: float = 17.0, shape=(13, 11, 7), *, shear: float = 0.0, scale: float = 1.0) -> Volume:
    """Whole numbers that differ everywhere on an oblique grid; `shear` shifts slices along j per mm."""
    turn = nib.eulerangles.euler2mat(np.radians(degrees), -np.radians(degrees) / 2, 0.1 * np.sign(degrees))
    affine = nib.affines.from_matvec(turn @ np.diag(SPACING), [-31.0, 12.5, 7.25])
    affine[:3, 2] += affine[:3, 1] / SPACING[1] * shear * SPACING[2]
    array = np.random.default_rng(1).permutation(np.prod(shape)).reshape(shape) * scale
    return Volume.from_array(array.astype(float), affine)


def assert_same(volume: Volume, path: Path, *, rtol: float = 0.0) -> None:
    expected = nib.as_closest_canonical(nib.load(path))
    values = np.asarray(expected.dataobj, np.float64)
    np.testing.assert_allclose(volume.array[0], values, rtol=rtol, atol=rtol * np.abs(values).max())
    assert Grid(values.shape, expected.affine).distance_mm(volume.grid) < 1e-3


@pytest.mark.parametrize("name", READABLE.split())
def test_real_series_equal_their_nifti(name: str, shared_data: Path):
    folder = shared_data / "dicom" / "series" / name
    volume = read_series(dicom_files(folder))
    for kind in ("ground_truth", "ground_truth_reoriented"):
        assert_same(volume, folder.parent / f"{folder.name}_{kind}.nii.gz", rtol=1e-7 if "002" in name else 0)


@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
@pytest.mark.parametrize(("modality", "rtol"), [("CT", 0.0), ("MR_T1", 0.0), ("PET", 2e-6)])
def test_ct_and_mr_of_patients_are_exact_and_pet_nearly(patient: str, modality: str, rtol: float, shared_data: Path):
    base = shared_data / "dicom" / "rtstruct_sts"
    volume = read_series(dicom_files(base / "dicom" / patient / modality / "image"))
    assert_same(volume, base / "nifti" / patient / f"{modality}_image.nii.gz", rtol=rtol)


def test_slices_of_pet_have_slopes_of_their_own(shared_data: Path):
    files = dicom_files(shared_data / "dicom" / "rtstruct_sts" / "dicom" / "STS_002" / "PET" / "image")
    assert len({frame.slope for frame in read_stack_of(files).frames[0]}) > 10


@pytest.mark.parametrize("number", range(1, 10))
def test_nine_encodings_of_a_mosaic_are_one_volume(number: int, shared_data: Path):
    folder = shared_data / "dicom" / "transfer_syntaxes"
    volume = read_series([folder / "In" / f"{number}.dcm"])
    assert volume.array.shape == (1, 64, 64, 35)
    assert_same(volume, folder / "Ref" / "1.nii")


def test_nine_encodings_together_are_duplicates(shared_data: Path):
    with pytest.raises(InputError, match="35 of 35 places hold more than one slice"):
        read_series(dicom_files(shared_data / "dicom" / "transfer_syntaxes" / "In"))


def test_blanked_uids_and_jpeg_2000_lie_on_the_grid_of_their_label(shared_data: Path):
    folder = shared_data / "many_labels_ct"
    files = [path for path in sorted((folder / "example_ct_dicom").iterdir()) if path.is_file()]
    header = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert "2000" in header.file_meta.TransferSyntaxUID.name
    volume = read_series(files)
    label = nib.as_closest_canonical(nib.load(folder / "example_seg_dicom.nii.gz"))
    assert Grid(label.shape, label.affine).distance_mm(volume.grid) < 1e-3
    assert float(header.SliceThickness) == 3
    np.testing.assert_allclose(volume.spacing[2], 2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gantrytilting", ["tilt of 14.0 degrees", "--allow_tilt"]),
        ("notavolume", ["all 4 slices lie at one place"]),
        ("sliceincrement", ["1 slice is missing", "5 mm apart", "28.11 and 38.11 mm"]),
        ("sliceorientation", ["2 different orientations"]),
    ],
)
def test_failing_series_end_in_a_line_that_says_why(name: str, words: list[str], shared_data: Path):
    files = dicom_files(shared_data / "dicom" / "series" / "failing" / name / "001")
    with pytest.raises(InputError) as caught:
        read_series(files)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("series ")
    assert all(word in message for word in words)


def sheared_truth(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(columns, rows, slices) and their RAS+ affine, straight from the headers."""
    slices = [pydicom.dcmread(path) for path in files]
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    slices.sort(key=lambda one: float(np.cross(row, column) @ np.array(one.ImagePositionPatient, float)))
    array = np.stack([one.pixel_array.T * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices], 2)
    positions = np.array([one.ImagePositionPatient for one in slices], float)
    down, across = map(float, slices[0].PixelSpacing)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine = nib.affines.from_matvec(np.column_stack([row * across, column * down, step]), positions[0])
    return array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def check_upright(volume: Volume, array: np.ndarray, affine: np.ndarray) -> None:
    """Linear interpolation in the sheared stack, computed by scipy in float64 at the centres of all voxels."""
    axes = volume.grid.affine[:3, :3] / np.linalg.norm(volume.grid.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    centres = np.indices(volume.grid.shape).reshape(3, -1)
    world = volume.grid.affine[:3, :3] @ centres + volume.grid.affine[:3, 3:]
    to_source = np.linalg.inv(affine)
    source = to_source[:3, :3] @ world + to_source[:3, 3:]
    expected = map_coordinates(array, source, order=1, mode="nearest").reshape(volume.grid.shape)
    last = np.array(array.shape)[:, None] - 1
    inside = ((source >= 0) & (source <= last)).all(axis=0).reshape(volume.grid.shape)
    outside = ((source < -1) | (source > last + 1)).any(axis=0).reshape(volume.grid.shape)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(volume.array[0][inside], expected[inside], atol=2e-3 * np.ptp(array), rtol=0)
    assert np.abs(volume.array[0][inside] - expected[inside]).mean() < 1e-5 * np.ptp(array)
    assert (volume.array[0][outside] == array.min()).all()
    # Nothing of the stack is lost: its corners lie within the new grid.
    corners = np.array(np.meshgrid(*[[0, n - 1] for n in array.shape], indexing="ij")).reshape(3, -1)
    found = nib.affines.apply_affine(np.linalg.inv(volume.grid.affine) @ affine, corners.T)
    assert found.min() > -1e-3
    assert (found <= np.array(volume.grid.shape) - 1 + 1e-3).all()


def test_a_tilted_series_is_resampled_on_request(shared_data: Path):
    files = dicom_files(shared_data / "dicom" / "series" / "failing" / "gantrytilting" / "001")
    check_upright(read_series(files, allow_tilt=True), *sheared_truth(files))


@pytest.mark.parametrize("shear", [0.25, -0.4])
def test_an_oblique_tilted_series_is_resampled_on_request(shear: float, tmp_path: Path):
    series = write_series(tmp_path, make_volume(shear=shear, shape=(15, 18, 9)))
    with pytest.raises(InputError, match=f"tilt of {np.degrees(np.arctan(abs(shear))):.1f} degrees"):
        read_series(series.files)
    check_upright(read_series(series.files, allow_tilt=True), *sheared_truth(series.files))


def test_labels_of_a_tilted_series_go_upright_and_back(tmp_path: Path):
    series = write_series(tmp_path, make_volume(shear=0.3, shape=(15, 24, 9)))
    image = read_series(series.files, allow_tilt=True)
    stack = read_stack_of(series.files, allow_tilt=True)
    block = np.zeros((1, *series.array.shape[1:]), np.uint8)
    block[0, 4:11, 8:16, 2:7], block[0, 4:8, 8:12, 2:7] = 1, 7
    native = Volume(block.copy(), image.source.order.grid_to_ras(stack.grid), image.source)
    label = upright(native, order=0)
    assert label.grid.shape == image.grid.shape
    assert label.grid.distance_mm(image.grid) <= 1e-9
    assert set(np.unique(label.array)) == {0, 1, 7}
    source = nib.affines.apply_affine(
        np.linalg.inv(series.affine) @ label.grid.affine, np.argwhere(label.array[0] == 7)
    )
    assert (np.abs(source - [5.5, 9.5, 4]).max(axis=0) <= np.array([1.5, 1.5, 2]) + 0.5 + 1e-6).all()
    back = back_to_slices(label)
    overlap = 2 * ((back.array == 1) & (block == 1)).sum() / ((back.array == 1).sum() + (block == 1).sum())
    assert overlap > 0.9


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
def test_every_syntax_and_modality_reads_what_was_written(syntax, modality, enhanced: bool, tmp_path: Path):
    options = SeriesOptions(
        modality=modality,
        transfer_syntax=syntax,
        enhanced=enhanced,
        is_signed=modality != "MR",
        slope_per_slice=modality == "PT",
        intercept=-1000 if modality == "CT" else 0,
        slope=0.5 if modality == "MR" else 1,
    )
    shape = (36, 33, 5) if syntax in COMPRESSED else (13, 11, 7)
    series = write_series(tmp_path, make_volume(shape=shape), options)
    volume = read_series(series.files)
    np.testing.assert_array_equal(volume.array, series.array.astype(np.float32))
    np.testing.assert_allclose(volume.grid.affine, series.affine, atol=1e-6)
    assert volume.source.num_channels == 1


BITS = [(True, 16, 12), (False, 16, 12), (True, 16, 9), (False, 8, 8), (True, 8, 8), (True, 8, 6), (True, 32, 32)]
BITS += [(False, 32, 32), (False, 32, 20), (True, 32, 20), (False, 16, 16)]


@pytest.mark.parametrize("syntax", ["explicit_le", "implicit_le", "explicit_be", "deflated"])
@pytest.mark.parametrize("unused", ["sign", "zero"])
@pytest.mark.parametrize(("is_signed", "allocated", "stored"), BITS)
def test_bits_are_taken_as_the_header_says(is_signed, allocated, stored, unused, syntax, tmp_path: Path):
    options = SeriesOptions(
        is_signed=is_signed,
        bits_allocated=allocated,
        bits_stored=stored,
        unused_bits=unused,
        transfer_syntax=syntax,
        slope=0.5,
        intercept=3,
    )
    low, high = options.stored_range
    stored_values = np.random.default_rng(0).integers(low, high, (9, 7, 4), endpoint=True)
    stored_values[0, 0, :2] = low, high
    series = write_series(tmp_path, Volume.from_array(stored_values * 0.5 + 3, make_volume().grid.affine), options)
    np.testing.assert_array_equal(read_series(series.files).array[0], (stored_values * 0.5 + 3).astype(np.float32))


@pytest.mark.parametrize("is_signed", [False, True])
def test_garbage_in_unused_bits_is_no_intensity(is_signed: bool, tmp_path: Path):
    """Overlays of old scanners lie there."""
    low = -2048 if is_signed else 0
    array = np.random.default_rng(0).integers(low, low + 4096, (9, 7, 4)).astype(float)
    options = SeriesOptions(bits_stored=12, is_signed=is_signed, unused_bits="zero")
    series = write_series(tmp_path, Volume.from_array(array, np.eye(4)), options)
    for path in series.files:
        words = np.frombuffer(pydicom.dcmread(path).PixelData, "<u2") & 0x0FFF
        noise = np.random.default_rng(2).integers(0, 16, words.shape).astype("<u2") << 12
        set_attribute([path], "PixelData", (words | noise).astype("<u2").tobytes())
    np.testing.assert_array_equal(read_series(series.files).array[0], array)


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize(("is_signed", "allocated", "stored"), [(True, 16, 12), (False, 16, 12), (False, 8, 8)])
def test_compressed_bits_are_taken_as_the_header_says(syntax, is_signed, allocated, stored, tmp_path: Path):
    options = SeriesOptions(
        is_signed=is_signed, bits_allocated=allocated, bits_stored=stored, transfer_syntax=syntax, slope=2, intercept=-5
    )
    low, high = options.stored_range
    array = np.random.default_rng(0).integers(low, high, (36, 34, 3), endpoint=True) * 2.0 - 5
    array[0, 0, :2] = low * 2 - 5, high * 2 - 5
    series = write_series(tmp_path, Volume.from_array(array, np.eye(4)), options)
    np.testing.assert_array_equal(read_series(series.files).array[0], array)


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [0.0, 17.0, -38.0])
def test_slices_along_any_axis_come_back_in_place(slice_axis, degrees, enhanced: bool, tmp_path: Path):
    options = SeriesOptions(modality="MR", slice_axis=slice_axis, enhanced=enhanced, slice_thickness=9.75)
    written = make_volume(degrees)
    series = write_series(tmp_path, written, options)
    volume = read_series(series.files)
    # Oblique by more than 45 degrees about two axes would turn RAS order; these are not.
    np.testing.assert_array_equal(volume.array, written.array)
    np.testing.assert_allclose(volume.grid.affine, written.grid.affine, atol=1e-6)
    columns, rows, slices = volume.source.grid.shape
    header = pydicom.dcmread(series.files[0])
    assert (columns, rows, slices) == (header.Columns, header.Rows, written.grid.shape[slice_axis])
    np.testing.assert_array_equal(volume.source.order.from_ras(volume.array)[0, :, :, 0].T, series.stored.values[0, 0])


def test_neither_names_nor_numbers_nor_the_order_of_files_matter(tmp_path: Path):
    plain = write_series(tmp_path / "a", make_volume(), SeriesOptions(is_shuffled=False))
    shuffled = write_series(tmp_path / "b", make_volume(), SeriesOptions(is_shuffled=True, seed=3))
    assert [path.name for path in shuffled.paths[0]] != sorted(path.name for path in shuffled.paths[0])
    reference = read_series(plain.files)
    for seed in range(3):
        files = shuffled.files
        random.Random(seed).shuffle(files)
        volume = read_series(files, num_threads=1 + seed)
        np.testing.assert_array_equal(volume.array, reference.array)
        np.testing.assert_array_equal(volume.grid.affine, reference.grid.affine)


def test_numbers_that_run_against_the_slices_or_are_missing_do_not_matter(tmp_path: Path):
    series = write_series(tmp_path, make_volume(), SeriesOptions(is_shuffled=False))
    for number, path in enumerate(reversed(series.paths[0])):
        set_attribute([path], "InstanceNumber", number % 2)
    np.testing.assert_array_equal(read_series(series.files).array, series.array)


@pytest.mark.parametrize("enhanced", [False, True])
def test_the_array_lies_slice_by_slice_and_torch_takes_it(enhanced: bool, tmp_path: Path):
    series = write_series(tmp_path, make_volume(), SeriesOptions(slice_axis=1, enhanced=enhanced))
    volume = read_series(series.files)
    assert volume.array.dtype == np.float32
    assert min(volume.array.strides) > 0
    # Slices lie along j.
    assert np.argmax(volume.array.strides[1:]) == 1
    assert volume.array.transpose(0, 2, 3, 1).flags.c_contiguous
    assert torch.equal(torch.from_numpy(volume.array), torch.tensor(series.array, dtype=torch.float32))


def test_large_intercepts_do_not_cancel_in_float32(tmp_path: Path):
    stored = 2**24 + np.arange(9 * 7 * 4).reshape(9, 7, 4)
    options = SeriesOptions(is_signed=False, bits_allocated=32, intercept=-(2**24))
    series = write_series(tmp_path, Volume.from_array((stored - 2**24).astype(float), np.eye(4)), options)
    np.testing.assert_array_equal(read_series(series.files).array[0], stored - 2**24)


def test_frames_of_one_file_are_found_without_or_against_a_table_of_offsets(tmp_path: Path):
    options = SeriesOptions(enhanced=True, transfer_syntax="rle")
    series = write_series(tmp_path, make_volume(shape=(12, 10, 6)), options)
    dataset = pydicom.dcmread(series.files[0])
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=6))
    for has_table in (True, False):
        dataset.PixelData = pydicom.encaps.encapsulate(frames, has_bot=has_table)
        dataset.save_as(series.files[0])
        np.testing.assert_array_equal(read_series(series.files).array, series.array)
    wrong = bytearray(pydicom.encaps.encapsulate(frames, has_bot=True))
    wrong[8:16] = wrong[12:16] + wrong[8:12]
    dataset.PixelData = bytes(wrong)
    dataset.save_as(series.files[0])
    np.testing.assert_array_equal(read_series(series.files).array, series.array)


def test_a_frame_in_several_fragments_is_put_together(tmp_path: Path):
    series = write_series(tmp_path, make_volume(shape=(36, 33, 4)), SeriesOptions(transfer_syntax="jpeg_2000"))
    for path in series.files:
        dataset = pydicom.dcmread(path)
        (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
        dataset.PixelData = pydicom.encaps.encapsulate([frame], fragments_per_frame=3, has_bot=False)
        dataset.save_as(path)
    np.testing.assert_array_equal(read_series(series.files).array, series.array)


def test_a_single_slice_takes_its_thickness(tmp_path: Path):
    options = SeriesOptions(slice_thickness=4.5)
    series = write_series(tmp_path, make_volume(shape=(13, 11, 1)), options)
    np.testing.assert_allclose(read_series(series.files).spacing, (0.9, 1.1, 4.5), atol=1e-6)


def round_headers(files: list[Path], position_decimals: int, cosine_decimals: int = 6) -> None:
    """As scanners write them."""
    for path in files:
        dataset = pydicom.dcmread(path)
        for keyword, decimals in (
            ("ImagePositionPatient", position_decimals),
            ("ImageOrientationPatient", cosine_decimals),
        ):
            dataset[keyword].value = [f"{float(value):.{decimals}f}" for value in dataset[keyword].value]
        dataset.save_as(path)


@pytest.mark.parametrize(
    ("spacing", "decimals", "count"), [(0.625, 3, 300), (0.625, 2, 90), (1 / 3, 2, 300), (0.5, 4, 90), (3.27, 2, 90)]
)
def test_rounded_headers_of_many_oblique_slices_are_no_fault(spacing, decimals: int, count: int, tmp_path: Path):
    shape, affine = (5, 4, count), make_volume(23.0).grid.affine
    affine[:3, 2] *= spacing / SPACING[2]
    array = np.arange(np.prod(shape)).reshape(shape).astype(float)
    series = write_series(tmp_path, Volume.from_array(array, affine))
    round_headers(series.files, decimals)
    volume = read_series(series.files)
    np.testing.assert_array_equal(volume.array[0], array)
    assert volume.grid.distance_mm(Grid(shape, affine)) < 10**-decimals * 1.5


@pytest.mark.parametrize("moved", [0.1, 0.06])
def test_a_slice_out_of_place_by_more_than_the_tolerance_is_refused(moved: float, tmp_path: Path):
    series = write_series(tmp_path, make_volume())
    path = series.paths[0][3]
    position = np.array(pydicom.dcmread(path).ImagePositionPatient, float)
    normal = series.layout.normal * [-1, -1, 1]
    set_attribute([path], "ImagePositionPatient", [f"{value:.6f}" for value in position + moved * normal])
    with pytest.raises(InputError, match="unevenly spaced"):
        read_series(series.files)


def test_slices_of_a_microscope_may_be_missing_too(tmp_path: Path):
    volume = make_volume(shape=(13, 11, 9))
    grid = Grid(volume.grid.shape, volume.grid.affine @ np.diag([0.01, 0.01, 0.004, 1]))
    series = write_series(tmp_path, Volume(volume.array, grid))
    np.testing.assert_array_equal(read_series(series.files).array, series.array)
    series.paths[0][4].unlink()
    with pytest.raises(InputError, match="1 slice is missing"):
        read_series([path for path in series.files if path.exists()])


def test_a_table_that_moves_sideways_is_a_tilt_and_one_that_jumps_is_refused(tmp_path: Path):
    for name, shifts, words in (("drift", np.arange(7) * 0.2, "tilt"), ("jump", [0, 0, 0, 4, 4, 4, 4], "away from")):
        series = write_series(tmp_path / name, make_volume(0.0))
        for path, shift in zip(series.paths[0], shifts, strict=True):
            x, y, z = map(float, pydicom.dcmread(path).ImagePositionPatient)
            set_attribute([path], "ImagePositionPatient", [f"{value:.6f}" for value in (x, y + shift, z)])
        with pytest.raises(InputError, match=words):
            read_series(series.files)


def test_a_scout_within_a_series_is_left_out(tmp_path: Path):
    volume = make_volume()
    series = write_series(tmp_path, volume)
    scout = write_series(tmp_path / "s", make_volume(shape=(20, 17, 1)), SeriesOptions(slice_axis=1, seed=9))
    set_attribute(scout.files, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    set_attribute(scout.files, "SeriesInstanceUID", series.options.series_uid)
    np.testing.assert_array_equal(read_series([*series.files, *scout.files]).array, volume.array)


def test_slopes_per_slice_of_mr_and_negative_slopes_are_read(tmp_path: Path):
    series = write_series(tmp_path, make_volume(), SeriesOptions(modality="MR", slope=2))
    expected = series.array.copy()
    for k, path in enumerate(series.paths[0]):
        set_attribute([path], "RescaleSlope", f"{-1.25 - k}")
        set_attribute([path], "RescaleIntercept", f"{10 * k}")
    slices = series.stored.values[0] * (-1.25 - np.arange(7))[:, None, None] + 10 * np.arange(7)[:, None, None]
    expected = series.layout.from_slices(slices)
    np.testing.assert_array_equal(read_series(series.files).array[0], expected.astype(np.float32))


def test_nothing_changes_in_the_files(tmp_path: Path):
    series = write_series(tmp_path, make_volume(), replace(SeriesOptions(), transfer_syntax="deflated"))
    before = [path.read_bytes() for path in series.files]
    read_series(series.files)
    assert [path.read_bytes() for path in series.files] == before
