"""An independent converter on the same files: voxels and affine, both brought to RAS order by nibabel.

What differs and why: dcm2niix computes in single precision (affines to 1e-4 mm, scaled values to 2e-7), Debian builds
it without JPEG-LS, and it writes what we refuse: tilted, uneven, colour. Those are no part of the comparison.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.dicom.reader import dicom_files, read_series
from pipeline.io.volume import Volume
from pipeline.synthetic_dicom import SeriesOptions, write_series
from pipeline.synthetic_dicom.faults import drop_slice, set_attribute

pytestmark = pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed (Debian: dcm2niix)")
AFFINE_TOLERANCE_MM, VALUE_TOLERANCE = 1e-4, 2e-7
REAL = """
dicom/series/failing/slicecount/001 dicom/series/generic/anatomical/001 dicom/series/generic/anatomical/001_implicit
dicom/series/generic/anatomical/002_non_isotropic dicom/series/generic/compressed/001
dicom/series/generic/compressed_j2k/001 dicom/series/generic/compressed_jpeg/001 dicom/series/generic/compressed_rle/001
dicom/series/hitachi/anatomical/001 dicom/series/hitachi/anatomical/001_implicit
dicom/series/hyperfine/anatomical/001 dicom/series/siemens/anatomical/001
dicom/series/siemens/anatomical/001_implicit dicom/series/siemens_multiframe/anatomical/001
dicom/hippocampus_crops/Study1/13_HCropVolume dicom/hippocampus_crops/Study2/14_HCropVolume
dicom/hippocampus_crops/Study3/11_HCropVolume dicom/seg_dcmqi/ct-3slice many_labels_ct/example_ct_dicom
dicom/rtstruct_sts/dicom/STS_002/CT/image dicom/rtstruct_sts/dicom/STS_002/MR_T1/image
dicom/rtstruct_sts/dicom/STS_002/PET/image dicom/rtstruct_sts/dicom/STS_008/CT/image
dicom/rtstruct_sts/dicom/STS_008/MR_T1/image dicom/rtstruct_sts/dicom/STS_008/PET/image
"""


def convert(folder: Path, out: Path) -> list[nib.Nifti1Image]:
    """What dcm2niix makes of a folder, in RAS order, sorted by name."""
    out.mkdir()
    command = ["dcm2niix", "-z", "n", "-b", "n", "-f", "%s_%p", "-o", str(out), str(folder)]
    subprocess.run(command, capture_output=True, check=False, timeout=120)
    return [nib.as_closest_canonical(nib.load(path)) for path in sorted(out.glob("*.nii"))]


def assert_agree(volume: Volume, image: nib.Nifti1Image) -> None:
    values = image.get_fdata(dtype=np.float64)
    values = values[..., None] if values.ndim == 3 else values
    np.testing.assert_allclose(
        volume.array.transpose(1, 2, 3, 0), values, rtol=0, atol=VALUE_TOLERANCE * np.abs(values).max()
    )
    np.testing.assert_allclose(volume.grid.affine, image.affine, atol=AFFINE_TOLERANCE_MM)


def make_volume(degrees: float, shape=(36, 33, 6), num_channels: int = 1) -> Volume:
    turn = nib.eulerangles.euler2mat(*np.radians([degrees, -degrees / 2, degrees / 3])) @ np.diag([0.9, 1.1, 2.5])
    array = np.random.default_rng(1).integers(0, 4000, (num_channels, *shape)).astype(float)
    return Volume.from_array(array, nib.affines.from_matvec(turn, [-31.0, 12.5, 7.25]))


@pytest.mark.parametrize("name", REAL.split())
def test_real_series_agree(name: str, shared_data: Path, tmp_path: Path):
    (image,) = convert(shared_data / name, tmp_path / "out")
    assert_agree(read_series(dicom_files(shared_data / name)), image)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 9])
def test_mosaics_agree_in_every_encoding_that_it_knows(number: int, shared_data: Path, tmp_path: Path):
    source = shared_data / "dicom" / "transfer_syntaxes" / "In" / f"{number}.dcm"
    (tmp_path / "in").mkdir()
    shutil.copyfile(source, tmp_path / "in" / "a.dcm")
    (image,) = convert(tmp_path / "in", tmp_path / "out")
    assert_agree(read_series([source]), image)


@pytest.mark.parametrize(
    "syntax", ["explicit_le", "implicit_le", "explicit_be", "rle", "jpeg_lossless_sv1", "jpeg_2000"]
)
@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [0.0, 21.0])
def test_synthetic_slices_agree(syntax, slice_axis, degrees: float, tmp_path: Path):
    options = SeriesOptions(
        modality="MR",
        slice_axis=slice_axis,
        transfer_syntax=syntax,
        bits_stored=None if syntax != "rle" else 12,
        is_signed=False,
        slice_thickness=4.0,
    )
    shape = (36, 34, 38) if slice_axis < 2 else (36, 33, 6)
    series = write_series(tmp_path / "in", make_volume(degrees, shape), options)
    (image,) = convert(series.folder, tmp_path / "out")
    assert_agree(read_series(series.files), image)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("degrees", [0.0, 21.0])
def test_synthetic_multi_frame_files_agree(modality, degrees: float, tmp_path: Path):
    options = SeriesOptions(modality=modality, enhanced=True, is_shuffled=False, slope=2, intercept=-100)
    volume = make_volume(degrees)
    volume.array[:] = volume.array * 2 - 100
    series = write_series(tmp_path / "in", volume, options)
    (image,) = convert(series.folder, tmp_path / "out")
    assert_agree(read_series(series.files), image)


def test_synthetic_slopes_per_slice_agree(tmp_path: Path):
    series = write_series(tmp_path / "in", make_volume(12.0), SeriesOptions(modality="PT", slope_per_slice=True))
    (image,) = convert(series.folder, tmp_path / "out")
    assert_agree(read_series(series.files), image)


def test_synthetic_time_points_agree(tmp_path: Path):
    options = SeriesOptions(modality="MR", phase_keyword="TemporalPositionIdentifier", is_shuffled=False)
    series = write_series(tmp_path / "in", make_volume(12.0, num_channels=3), options)
    (image,) = convert(series.folder, tmp_path / "out")
    assert image.shape == (36, 33, 6, 3)
    assert_agree(read_series(series.files), image)


def test_synthetic_echoes_agree_with_its_file_per_echo(tmp_path: Path):
    options = SeriesOptions(modality="MR", phase_keyword="EchoTime", phase_values=(2.5, 7.5), is_shuffled=False)
    series = write_series(tmp_path / "in", make_volume(12.0, num_channels=2), options)
    for c, phase in enumerate(series.paths):
        set_attribute(phase, "EchoNumbers", c + 1)
    images = convert(series.folder, tmp_path / "out")
    volume = read_series(series.files)
    assert len(images) == volume.num_channels == 2
    for c, image in enumerate(images):
        assert_agree(Volume(volume.array[c : c + 1], volume.grid), image)


def test_it_writes_a_volume_with_a_slice_missing_which_we_refuse(tmp_path: Path):
    series = write_series(tmp_path / "in", make_volume(12.0))
    drop_slice(series.paths[0][2])
    assert convert(series.folder, tmp_path / "out")
    with pytest.raises(InputError, match="1 slice is missing"):
        read_series(dicom_files(series.folder))
