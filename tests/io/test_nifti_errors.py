"""Bad files end in one short line with what, where and what to do."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.nifti import read_label, read_source, read_volume, write_label, write_volume
from pipeline.io.volume import Volume
from tests.conftest import file_size_limit

AFFINE = np.diag([-1.0, 1.5, 2.0, 1.0])
RNG = np.random.default_rng(3)


def saved(tmp_path: Path, array: np.ndarray, *, name: str = "a.nii.gz", affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), tmp_path / name)
    return tmp_path / name


def noise_file(tmp_path: Path, name: str = "a.nii.gz") -> Path:
    return saved(tmp_path, RNG.integers(-9000, 9000, (20, 15, 10)).astype(np.int16), name=name)


def assert_one_line(read: Callable[[Path], object], path: Path, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.fix
    assert len(message) - len(str(path)) < 200


def test_a_missing_file(tmp_path: Path):
    assert_one_line(read_volume, tmp_path / "none.nii.gz", "no such file")


def test_a_folder(tmp_path: Path):
    assert_one_line(read_volume, tmp_path, "is a folder")


@pytest.mark.parametrize("kept", [0, 1, 10, 60, 0.3, 0.9, -1, -8])
def test_a_truncated_gz_file_wherever_it_ends(kept: float, tmp_path: Path):
    path = noise_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    assert_one_line(read_volume, path, "truncated or corrupt|not a NIfTI file")


@pytest.mark.parametrize("kept", [100, 340, 360, 2000])
def test_a_truncated_plain_file_wherever_it_ends(kept: int, tmp_path: Path):
    path = noise_file(tmp_path, "a.nii")
    path.write_bytes(path.read_bytes()[:kept])
    assert_one_line(read_label, path, "truncated or corrupt|not a NIfTI file")


def test_flipped_bits_in_a_gz_file_are_found_by_its_checksum(tmp_path: Path):
    raw = gzip.decompress(noise_file(tmp_path).read_bytes())
    # Stored without compression, a changed byte is still a valid stream: only the checksum tells.
    content = bytearray(gzip.compress(raw, compresslevel=0))
    content[3000] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert_one_line(read_volume, tmp_path / "a.nii.gz", "truncated or corrupt")


@pytest.mark.parametrize("name", ["text.nii.gz", "text.nii", "text.txt", "text.hdr"])
def test_other_bytes_are_no_nifti_file(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"this is no volume " * 100)
    assert_one_line(read_volume, tmp_path / name, "not a NIfTI file")


def test_gzipped_text_is_no_nifti_file(tmp_path: Path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"this is no volume " * 100))
    assert_one_line(read_volume, tmp_path / "a.nii.gz", "not a NIfTI file")


def test_another_format_is_named(tmp_path: Path):
    nib.save(nib.MGHImage(np.zeros((4, 3, 2), np.float32), np.eye(4)), tmp_path / "a.mgz")
    assert_one_line(read_volume, tmp_path / "a.mgz", "MGHImage, not NIfTI")


def test_half_a_pair_names_the_missing_half(tmp_path: Path):
    nib.save(nib.Nifti1Pair(np.zeros((4, 3, 2), np.int16), AFFINE), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    assert_one_line(read_volume, tmp_path / "a.hdr", "a.img .*is missing")


def test_colours_are_refused(tmp_path: Path):
    colours = np.zeros((4, 3, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert_one_line(read_source, saved(tmp_path, colours), "RGB colours")


def test_complex_voxels_are_refused(tmp_path: Path):
    assert_one_line(read_source, saved(tmp_path, np.zeros((4, 3, 2), np.complex64)), "complex64")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2, 2)])
def test_too_few_or_too_many_axes(shape: tuple[int, ...], tmp_path: Path):
    assert_one_line(read_volume, saved(tmp_path, np.zeros(shape, np.int16)), f"has {len(shape)} axes")


def test_a_4d_label_is_refused(tmp_path: Path):
    assert_one_line(
        read_label, saved(tmp_path, np.zeros((5, 4, 3, 2), np.int16)), r"is 4D \(5 x 4 x 3 x 2\), a label is 3D"
    )


def test_an_axis_without_voxels(tmp_path: Path):
    path = saved(tmp_path, np.zeros((5, 4, 3), np.int16), name="a.nii")
    content = bytearray(path.read_bytes())
    content[44:46] = b"\0\0"
    path.write_bytes(content)
    assert_one_line(read_volume, path, "holds no voxels")


def with_sform(tmp_path: Path, rows: np.ndarray) -> Path:
    """A file whose sform holds `rows`, written past nibabel's own checks."""
    path = saved(tmp_path, np.zeros((5, 4, 3), np.int16), name="a.nii")
    content = bytearray(path.read_bytes())
    content[254:256] = np.int16(1).tobytes()
    content[280:328] = rows.astype("<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (np.zeros((3, 4)), "singular"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]]), "singular"),
        (np.full((3, 4), np.nan), "not finite"),
        (np.array([[1, 0, 0, np.inf], [0, 1, 0, 0], [0, 0, 1, 0]]), "not finite"),
    ],
)
def test_an_affine_that_cannot_place_voxels(rows: np.ndarray, what: str, tmp_path: Path):
    assert_one_line(read_source, with_sform(tmp_path, rows), what)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, -np.inf, 1e12])
def test_labels_that_are_no_class_values(value: float, tmp_path: Path):
    stored = np.zeros((5, 4, 3), np.float32)
    stored[2, 1, 0] = value
    assert_one_line(read_label, saved(tmp_path, stored), r"must be whole numbers.*\(1 such voxels\)")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = noise_file(tmp_path)
    before, label = path.read_bytes(), read_label(path)
    with file_size_limit(1000), pytest.raises(InputError, match=r"cannot write.*Free some space"):
        write_label(path, label.array[0], label.source)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.nii.gz"]


def test_another_suffix_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(InputError, match="not a NIfTI name"):
        write_volume(tmp_path / "a.nrrd", Volume.from_array(np.zeros((4, 3, 2)), AFFINE))
    assert not any(tmp_path.iterdir())


def test_writing_where_a_file_stands_instead_of_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_volume(tmp_path / "file" / "a.nii.gz", Volume.from_array(np.zeros((4, 3, 2)), AFFINE))


def test_fractions_cannot_be_written_as_a_label(tmp_path: Path):
    source = read_source(noise_file(tmp_path))
    with pytest.raises(ValueError, match="must be integers"):
        write_label(tmp_path / "b.nii.gz", np.zeros((20, 15, 10), np.float32), source)
