"""Probabilities on their way to a file: box by box in, class by class out."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.nifti import read_source
from pipeline.io.probabilities import ProbabilitySpool, make_spool, read_probabilities
from pipeline.io.volume import SourceGrid, Volume

SHAPE = (9, 14, 11)
LABELS = {"background": 0, "first": 3, "second": 200, "third": 7}
RAS = np.array([[1.1, 0.1, 0, 4], [0.1, 1.2, 0.2, -3], [0, -0.2, 0.9, 7], [0, 0, 0, 1]])


def random_probabilities(shape: tuple[int, ...] = SHAPE, num_classes: int = 4) -> np.ndarray:
    powers = np.exp(np.random.default_rng(0).normal(size=(num_classes, *shape), scale=3))
    return (powers / powers.sum(axis=0)).astype(np.float32)


def fill(spool: ProbabilitySpool, probabilities: np.ndarray) -> None:
    """In boxes of several sizes, two classes at a time, without the last planes along k."""
    for i in (slice(0, 4), slice(4, 9)):
        for k in (slice(0, 1), slice(1, 8)):
            box = (i, slice(0, SHAPE[1]), k)
            for first in range(0, len(probabilities), 2):
                spool.add(box, first, probabilities[(slice(first, first + 2), *box)])
            spool.close(box)


@pytest.mark.parametrize(("name", "tolerance"), [("a.b2nd", 2.5e-4), ("a.nii.gz", 7.7e-6), ("a.nii", 7.7e-6)])
def test_what_came_in_boxes_is_read_back_and_what_never_came_is_background(
    tmp_path: Path, name: str, tolerance: float
) -> None:
    probabilities, path = random_probabilities(), tmp_path / "new" / "folder" / name
    spool = make_spool(path, SHAPE, LABELS)
    fill(spool, probabilities)
    spool.write(path, Volume.from_array(np.zeros(SHAPE, np.uint8), RAS))
    found = read_probabilities(path)
    assert found.array.shape == (4, *SHAPE)
    np.testing.assert_allclose(found.grid.affine, RAS, atol=1e-6)
    np.testing.assert_allclose(found.array[..., :8], probabilities[..., :8], atol=tolerance)
    np.testing.assert_allclose(
        found.array[..., 8:], np.broadcast_to([[[[1]]], [[[0]]], [[[0]]], [[[0]]]], (4, 9, 14, 3))
    )
    assert [item.name for item in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_a_nifti_keeps_the_header_of_its_image_in_any_axis_order_and_byte_order(
    tmp_path: Path, kind: type, endianness: str
) -> None:
    affine = np.array([[0, -1.2, 0.1, 9], [0, 0.1, 1.4, -3], [0.9, 0, 0, 7], [0, 0, 0, 1.0]])
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.int16)
    image = kind(np.ones((11, 9, 14), np.int16), affine, header)
    image.set_sform(affine, code=4)
    nib.save(image, tmp_path / "image.nii.gz")
    source = read_source(tmp_path / "image.nii.gz")
    grid = source.order.grid_to_ras(source.grid)
    assert grid.shape == (9, 14, 11)
    probabilities, path = random_probabilities(), tmp_path / "p.nii.gz"
    spool = make_spool(path, grid.shape, LABELS)
    box = (slice(0, 9), slice(0, 14), slice(0, 11))
    spool.add(box, 0, probabilities)
    spool.write(path, Volume(np.zeros((1, *grid.shape), np.uint8), grid, source))
    found = nib.load(path)
    assert type(found) is kind
    assert (found.header["sform_code"], found.header.endianness) == (4, image.header.endianness)
    np.testing.assert_array_equal(found.affine, nib.load(tmp_path / "image.nii.gz").affine)
    expected = np.moveaxis(source.order.from_ras(probabilities), 0, -1)
    np.testing.assert_allclose(found.get_fdata(), expected, atol=7.7e-6)


def test_a_volume_that_has_left_the_grid_of_its_file_is_written_in_its_own(tmp_path: Path) -> None:
    volume = Volume.from_array(np.zeros(SHAPE, np.uint8), RAS)
    other = SourceGrid.in_ras_order(tmp_path / "x", Volume.from_array(np.zeros((3, 3, 3)), np.eye(4)).grid)
    spool = make_spool(tmp_path / "p.nii.gz", SHAPE, LABELS)
    spool.write(tmp_path / "p.nii.gz", Volume(volume.array, volume.grid, other))
    np.testing.assert_allclose(nib.load(tmp_path / "p.nii.gz").affine, RAS, atol=1e-6)


@pytest.mark.parametrize("name", ["a.b2nd", "a.nii.gz"])
def test_no_more_than_a_class_is_in_memory_however_many_there_are(tmp_path: Path, name: str) -> None:
    shape, num_classes = (64, 48, 40), 60
    labels, one_class = {f"class_{value}": value for value in range(num_classes)}, 2 * 64 * 48 * 40
    plane = np.random.default_rng(0).random((num_classes, 1, 48, 40)).astype(np.float32)
    tracemalloc.start()
    spool = make_spool(tmp_path / name, shape, labels)
    for start in range(64):
        spool.add((slice(start, start + 1), slice(0, 48), slice(0, 40)), 0, plane)
    spool.write(tmp_path / name, Volume.from_array(np.zeros(shape, np.uint8), RAS))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * one_class < num_classes * one_class / 4
    assert spool.num_bytes == one_class


@pytest.mark.parametrize("name", ["a.b2nd", "a.nii.gz"])
@pytest.mark.parametrize("limit", [20_000, 400_000])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, name: str, limit: int) -> None:
    """A limit on the size of files stands for the disk: at once, or when the file itself is written."""
    (tmp_path / name).write_bytes(b"older")
    code = f"""
import resource, signal, sys, numpy as np
from pathlib import Path
from pipeline.errors import InputError
from pipeline.io.probabilities import make_spool
from pipeline.io.volume import Volume
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, shape = Path({str(tmp_path / name)!r}), (40, 40, 40)
spool = make_spool(path, shape, {{"a": 0, "b": 1, "c": 2}})
values = np.random.default_rng(0).random((3, *shape)).astype(np.float32)
if {limit} < 100_000:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    spool.add((slice(0, 40),) * 3, 0, values)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit // 4}, {limit // 4}))
    spool.write(path, Volume.from_array(np.zeros(shape, np.uint8), np.eye(4)))
except InputError as error:
    print(error)
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "cannot write (" in output
    assert "Free some space or choose another folder" in output
    assert output.count("\n") == 1
    assert (tmp_path / name).read_bytes() == b"older"
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_what_is_no_file_of_probabilities_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.b2nd: no such file"):
        read_probabilities(tmp_path / "none.b2nd")
    (tmp_path / "text.b2nd").write_text("text")
    with pytest.raises(InputError, match="holds no probabilities of voxfit, or is damaged"):
        read_probabilities(tmp_path / "text.b2nd")
    with pytest.raises(InputError, match="cannot have 40000 channels"):
        make_spool(tmp_path / "a.nii.gz", SHAPE, {str(value): value for value in range(40000)}).write(
            tmp_path / "a.nii.gz", Volume.from_array(np.zeros(SHAPE, np.uint8), RAS)
        )
    assert [item.name for item in tmp_path.iterdir()] == ["text.b2nd"]
