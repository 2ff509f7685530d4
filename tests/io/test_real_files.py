"""Real files: 48 axis orders of one image, odd headers, and volumes without an sform."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.nifti import read_label, read_source, read_volume, write_label

RESET_FIELDS = {"scl_slope", "scl_inter", "cal_max", "cal_min", "vox_offset"}


@pytest.fixture(scope="module")
def special(shared_data: Path) -> Path:
    return shared_data / "nifti_geometry" / "special"


@pytest.fixture(scope="module")
def orientations(shared_data: Path) -> list[Path]:
    paths = sorted((shared_data / "nifti_geometry" / "orientations").glob("*.nii.gz"))
    assert len(paths) == 48
    return paths


def test_all_48_axis_orders_read_to_the_same_voxels(orientations: list[Path]):
    reference = read_volume(orientations[0].with_name("RAS.nii.gz"))
    np.testing.assert_array_equal(reference.array[0], nib.load(reference.source.path).get_fdata(dtype=np.float32))
    for path in orientations:
        volume = read_volume(path)
        assert np.array_equal(volume.array, reference.array), path.name
        assert np.abs(volume.grid.affine - reference.grid.affine).max() < 3e-6, path.name
        assert "".join(nib.aff2axcodes(volume.source.grid.affine)) == path.name[:3]


def test_all_48_axis_orders_come_back_as_they_were(orientations: list[Path], tmp_path: Path):
    for path in orientations:
        source, before = read_source(path), nib.load(path)
        stored = np.asarray(before.dataobj.get_unscaled())
        write_label(tmp_path / "back.nii.gz", source.order.to_ras(stored), source)
        after = nib.load(tmp_path / "back.nii.gz")
        assert np.array_equal(np.asarray(after.dataobj), stored), path.name
        for name in set(before.header) - RESET_FIELDS:
            assert before.header[name].tobytes() == after.header[name].tobytes(), (path.name, name)


@pytest.mark.parametrize(
    "name", ["shear.nii.gz", "minimal.nii.gz", "ras.hdr", "ras.img", "FLAIR.nii.gz", "low_res.nii.gz"]
)
def test_odd_files_read_as_nibabel_reorients_them(special: Path, name: str):
    canonical = nib.as_closest_canonical(nib.load(special / name))
    volume = read_volume(special / name)
    assert np.array_equal(volume.array[0], canonical.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.grid.affine, canonical.affine, atol=1e-9)


def test_a_sheared_grid_keeps_its_shear(special: Path):
    axes = read_source(special / "shear.nii.gz").grid.affine[:3, :3]
    axes = axes / np.linalg.norm(axes, axis=0)
    assert np.abs(axes.T @ axes - np.eye(3)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ct_perfusion.nii.gz", "RGB colours"),
        ("complex.nii.gz", "complex64"),
        ("FLAIR.nrrd", "not a NIfTI file"),
        ("mha.mha", "not a NIfTI file"),
        ("enh.dcm", "not a NIfTI file"),
    ],
)
def test_files_that_cannot_be_used_are_refused(special: Path, name: str, what: str):
    with pytest.raises(InputError, match=what):
        read_volume(special / name)


def test_a_file_whose_sform_code_is_zero_uses_its_qform(shared_data: Path):
    path = shared_data / "sts" / "STS_001" / "PET_mask.nii.gz"
    header = nib.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 1)
    label = read_label(path)
    assert label.array.dtype == np.uint8
    np.testing.assert_allclose(label.source.grid.affine, header.get_qform(), atol=1e-9)
    assert np.array_equal(label.array[0], np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj))


def test_image_and_label_in_psr_order_land_on_one_grid(shared_data: Path, tmp_path: Path):
    folder = shared_data / "spinal_cord" / "t2"
    image, label = read_volume(folder / "t2.nii.gz"), read_label(folder / "t2_seg-manual_labeled.nii.gz")
    assert image.grid.is_close(label.grid)
    assert nib.aff2axcodes(image.source.grid.affine) == ("P", "S", "R")
    assert label.array.dtype == np.uint8
    write_label(tmp_path / "back.nii.gz", label.array[0], label.source)
    before, after = nib.load(label.source.path), nib.load(tmp_path / "back.nii.gz")
    assert after.get_data_dtype() == before.get_data_dtype() == np.float64
    assert np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
