"""Files to volumes and back: nibabel's own reading and reorienting is the oracle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from pipeline.io.nifti import (
    is_nifti_name,
    read_label,
    read_source,
    read_volume,
    strip_nifti_suffix,
    write_label,
    write_volume,
)
from pipeline.io.volume import Volume

# What describes intensities and not where they lie: written anew.
RESET_FIELDS = {"scl_slope", "scl_inter", "cal_max", "cal_min", "vox_offset", "intent_code", "intent_name"}
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([0.9, 1.2, 2.5]), [-31.0, 12.5, 7.25]
)
RNG = np.random.default_rng(7)
VOXELS = RNG.integers(-500, 1500, (9, 7, 5)).astype(np.int16)


def save(image: nib.filebasedimages.FileBasedImage, path: Path) -> Path:
    nib.save(image, path)
    return path


def save_in_order(codes: str, voxels: np.ndarray, path: Path) -> Path:
    """Save the same lattice with its axes in the order and directions of `codes`."""
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(codes)))
    turned = nib.orientations.apply_orientation(voxels, change)
    return save(nib.Nifti1Image(turned, OBLIQUE @ inv_ornt_aff(change, voxels.shape)), path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "IAL", "SRP", "ALI"])
def test_every_axis_order_reads_to_the_same_voxels(codes: str, tmp_path: Path):
    volume = read_volume(save_in_order(codes, VOXELS, tmp_path / "a.nii.gz"))
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    np.testing.assert_allclose(volume.grid.affine, OBLIQUE, atol=1e-5)
    assert nib.aff2axcodes(volume.source.grid.affine) == tuple(codes)


def test_reading_agrees_with_closest_canonical_of_nibabel(tmp_path: Path):
    path = save_in_order("PSR", VOXELS, tmp_path / "a.nii.gz")
    canonical = nib.as_closest_canonical(nib.load(path))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], canonical.get_fdata())
    np.testing.assert_allclose(volume.grid.affine, canonical.affine, atol=1e-9)


def test_scaling_is_honoured_to_float32_precision(tmp_path: Path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint16)
    values = RNG.random((9, 7, 5)) * 3000 - 1024
    path = save(nib.Nifti1Image(values, OBLIQUE, header), tmp_path / "scaled.nii.gz")
    expected = nib.load(path).get_fdata(dtype=np.float64)
    assert nib.load(path).dataobj.slope != 1
    np.testing.assert_array_equal(read_volume(path).array[0], expected.astype(np.float32))


def test_large_intercepts_do_not_cancel_in_float32(tmp_path: Path):
    stored = (2**31 + np.arange(24).reshape(4, 3, 2)).astype(np.uint32)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint32)
    image = nib.Nifti1Image(stored, OBLIQUE, header)
    image.header.set_slope_inter(1, -(2.0**31))
    path = tmp_path / "inter.nii"
    image.to_filename(path)
    np.testing.assert_array_equal(
        read_volume(path).array[0], np.asarray(nib.load(path).dataobj.get_unscaled()) - 2.0**31
    )


def test_whole_numbers_up_to_two_million_are_exact(tmp_path: Path):
    stored = RNG.integers(0, 2_000_000, (8, 7, 6)).astype(np.int32)
    path = save(nib.Nifti1Image(stored, OBLIQUE), tmp_path / "big.nii")
    np.testing.assert_array_equal(read_volume(path).array[0].astype(np.int64), stored)


def test_the_last_axis_of_a_4d_file_becomes_channels(tmp_path: Path):
    stored = RNG.random((9, 7, 5, 3)).astype(np.float32)
    turned = stored[::-1].transpose(2, 0, 1, 3)
    affine = nib.as_closest_canonical(nib.Nifti1Image(stored, OBLIQUE)).affine
    change = np.array([[0, -1, 0, 8], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = read_volume(save(nib.Nifti1Image(turned, affine @ change), tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(volume.array, np.moveaxis(stored, -1, 0))
    np.testing.assert_allclose(volume.grid.affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize(("shape", "channels"), [((6, 5, 4, 1), 1), ((6, 5, 4, 1, 3), 3), ((6, 5, 1), 1)])
def test_axes_of_length_one_are_no_channels(shape: tuple[int, ...], channels: int, tmp_path: Path):
    stored = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    volume = read_volume(save(nib.Nifti1Image(stored, OBLIQUE), tmp_path / "a.nii.gz"))
    assert volume.array.shape == (channels, *shape[:3])
    np.testing.assert_array_equal(volume.array[-1], stored.reshape(*shape[:3], channels)[..., -1])


@pytest.mark.parametrize("kind", [nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair])
def test_other_nifti_kinds_read_alike(kind: type, tmp_path: Path):
    name = "a.nii.gz" if kind is nib.Nifti2Image else "a.img"
    path = save(kind(VOXELS, OBLIQUE), tmp_path / name)
    for readable in {path, path.with_name(path.name.replace(".img", ".hdr"))}:
        np.testing.assert_array_equal(read_volume(readable).array[0], VOXELS)


def test_big_endian_files_read_to_native_numbers_and_stay_big_endian(tmp_path: Path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    path = save(nib.Nifti1Image(VOXELS, OBLIQUE, header), tmp_path / "a.nii")
    volume = read_label(path)
    assert volume.array.dtype.isnative
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    write_label(tmp_path / "b.nii.gz", volume.array[0], volume.source)
    assert nib.load(tmp_path / "b.nii.gz").header.endianness == ">"


def test_read_source_tells_shape_and_channels_without_the_voxels(tmp_path: Path):
    path = save(nib.Nifti1Image(np.zeros((6, 5, 4, 2), np.int16), OBLIQUE), tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:400])
    source = read_source(path)
    assert source.grid.shape == (6, 5, 4)
    assert source.header.get_data_shape() == (6, 5, 4, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 255), "uint8"),
        ((-1, 3), "int16"),
        ((0, 40000), "uint16"),
        ((-1, 40000), "int32"),
        ((0, 2**31 - 1), "int32"),
    ],
)
def test_labels_take_the_smallest_type_that_holds_them(values: tuple[int, int], expected: str, tmp_path: Path):
    stored = np.resize(np.array(values, np.float64), (4, 3, 2))
    label = read_label(save(nib.Nifti1Image(stored, OBLIQUE), tmp_path / "a.nii.gz"))
    assert label.array.dtype == expected
    np.testing.assert_array_equal(label.array[0], stored)


def test_labels_that_float_or_scaling_rounded_are_whole_numbers(tmp_path: Path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    expected = np.resize(np.arange(6), (7, 5, 3))
    scaled = save(nib.Nifti1Image(expected.astype(np.float32), OBLIQUE, header), tmp_path / "scaled.nii.gz")
    assert nib.load(scaled).dataobj.slope != 1
    np.testing.assert_array_equal(read_label(scaled).array[0], expected)
    off = (expected + 1e-6).astype(np.float32)
    np.testing.assert_array_equal(
        read_label(save(nib.Nifti1Image(off, OBLIQUE), tmp_path / "f.nii")).array[0], expected
    )


@pytest.mark.parametrize(
    ("own", "highest", "expected"),
    [
        ("uint8", 200, "uint8"),
        ("uint8", 300, "int16"),
        ("int16", 61, "int16"),
        ("float32", 61, "float32"),
        ("float32", 2**24 + 1, "int32"),
        ("float64", 2**24 + 1, "float64"),
        ("int8", 200, "uint8"),
    ],
)
def test_predictions_keep_the_inputs_type_where_it_is_exact(own: str, highest: int, expected: str, tmp_path: Path):
    source = read_source(save(nib.Nifti1Image(np.zeros((6, 5, 4), own), OBLIQUE), tmp_path / "a.nii.gz"))
    values = np.resize(np.array([0, 1, highest], np.int64), (6, 5, 4))
    write_label(tmp_path / "out.nii.gz", values, source)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.get_data_dtype() == expected
    np.testing.assert_array_equal(np.asarray(written.dataobj).astype(np.int64), values)


def test_a_prediction_for_a_4d_image_is_3d_on_its_grid(tmp_path: Path):
    stored = RNG.random((6, 5, 4, 3)).astype(np.float32)
    source = read_source(save(nib.Nifti1Image(stored, OBLIQUE), tmp_path / "a.nii.gz"))
    write_label(tmp_path / "out.nii.gz", np.ones((6, 5, 4), bool), source)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.shape == (6, 5, 4)
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "a.nii.gz").affine)


def make_header_with_everything(kind: type) -> nib.Nifti1Header:
    """A header in which every geometric field differs from its default, and sform and qform from each other."""
    header = kind()
    header.set_data_dtype(np.int16)
    header.set_data_shape((9, 7, 5))
    header.set_qform(OBLIQUE, code=1)
    header.set_sform(OBLIQUE + np.eye(4)[[0, 1, 2, 3]] * [0.01, 0.01, 0.01, 0], code=4)
    header.set_xyzt_units("micron", "msec")
    header.set_dim_info(1, 0, 2)
    header["descrip"] = b"made by a scanner"
    header["toffset"] = 3
    header["cal_max"], header["cal_min"] = 900, -100
    header.set_intent("t test", (5,), name="statistic")
    return header


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_there_and_back_keeps_header_and_voxels_but_not_intensities_fields(kind: type, tmp_path: Path):
    header = make_header_with_everything(kind.header_class)
    path = save(kind(VOXELS, None, header), tmp_path / "a.nii.gz")
    label = read_label(path)
    write_label(tmp_path / "b.nii.gz", label.array[0], label.source)
    before, after = nib.load(path), nib.load(tmp_path / "b.nii.gz")
    assert type(after) is kind
    np.testing.assert_array_equal(np.asarray(after.dataobj), VOXELS)
    for name in set(before.header) - RESET_FIELDS - {"intent_p1"}:
        assert before.header[name].tobytes() == after.header[name].tobytes(), name
    assert after.header["cal_max"] == 0
    assert after.header.get_intent() == ("none", (), "")


def test_a_pair_and_an_analyze_file_come_back_as_one_nifti_file(tmp_path: Path):
    for kind in (nib.Nifti1Pair, nib.AnalyzeImage):
        path = save(kind(VOXELS, np.diag([-2.0, 1, 3, 1])), tmp_path / f"{kind.__name__}.img")
        label = read_label(path)
        write_label(tmp_path / "out.nii.gz", label.array[0], label.source)
        written = nib.load(tmp_path / "out.nii.gz")
        assert type(written) is nib.Nifti1Image
        np.testing.assert_allclose(written.affine, nib.load(path).affine, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(written.dataobj), VOXELS)


def test_volumes_from_memory_are_written_with_sform_and_qform(tmp_path: Path):
    volume = Volume.from_array(RNG.random((2, 6, 5, 4)).astype(np.float32), OBLIQUE)
    write_volume(tmp_path / "a.nii.gz", volume)
    written = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(written.get_sform(), OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(written.get_qform(), OBLIQUE, atol=1e-5)
    assert written.header.get_xyzt_units()[0] == "mm"
    again = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.grid.is_close(volume.grid)


@pytest.mark.parametrize("dtype", [bool, np.float16, np.int64, np.float64])
def test_every_numeric_type_can_be_written(dtype: type, tmp_path: Path):
    array = RNG.integers(0, 2, (1, 6, 5, 4)).astype(dtype)
    write_volume(tmp_path / "a.nii.gz", Volume.from_array(array, OBLIQUE))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").array, array)


def test_a_volume_with_a_source_is_written_in_the_files_own_order(tmp_path: Path):
    path = save_in_order("PSR", VOXELS, tmp_path / "a.nii.gz")
    volume = read_volume(path)
    write_volume(tmp_path / "b.nii.gz", Volume(volume.array * 0.5, volume.grid, volume.source))
    written = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    np.testing.assert_array_equal(written.get_fdata(), nib.load(path).get_fdata() * 0.5)


def test_a_volume_that_left_its_sources_grid_is_refused(tmp_path: Path):
    volume = read_volume(save_in_order("RAS", VOXELS, tmp_path / "a.nii.gz"))
    moved = Volume.from_array(volume.array, volume.grid.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0.5)
    with pytest.raises(ValueError, match="no longer on its source's grid"):
        write_volume(tmp_path / "b.nii.gz", Volume(volume.array, moved.grid, volume.source))


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path):
    volume = Volume.from_array(VOXELS, OBLIQUE)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "stem", "is_volume"),
    [
        ("a_0000.nii.gz", "a_0000", True),
        ("a.b.NII", "a.b", True),
        ("a.img", "a", True),
        ("a.hdr", "a", False),
        ("._a.nii.gz", "._a", False),
        ("a.json", "a.json", False),
    ],
)
def test_names_and_their_stems(name: str, stem: str, is_volume: bool):
    assert strip_nifti_suffix(name) == stem
    assert is_nifti_name(name) is is_volume
