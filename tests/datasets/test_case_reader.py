from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from pipeline.datasets.case import Case
from pipeline.datasets.case_reader import read_case_image, read_case_label
from pipeline.errors import InputError

Save = Callable[..., Path]
SHAPE = (9, 7, 5)


def test_channels_on_one_grid_are_stacked_unchanged(tmp_path: Path, save: Save) -> None:
    arrays = [np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32) for seed in range(2)]
    case = _case([save(tmp_path / f"{index}.nii.gz", array) for index, array in enumerate(arrays)])
    volume = read_case_image(case)
    np.testing.assert_array_equal(volume.array, np.stack(arrays))
    assert volume.array.dtype == np.float32
    assert volume.source is not None
    assert volume.source.path == case.images[0]


def test_a_channel_on_another_grid_is_resampled_as_nibabel_does_and_said_in_the_log(
    tmp_path: Path, save: Save, oblique: NDArray[np.float64], caplog: pytest.LogCaptureFixture
) -> None:
    coarse = oblique @ np.diag([1.7, 1.4, 0.8, 1.0])
    coarse[:3, 3] -= 3
    first = save(tmp_path / "ct.nii.gz", np.ones(SHAPE, np.float32))
    # A large second volume, so that every voxel of the first lies inside it and both sides agree on what is outside.
    second = save(tmp_path / "pet.nii.gz", np.random.default_rng(1).normal(size=(14, 12, 11)), coarse)
    with caplog.at_level(logging.INFO, logger="voxfit"):
        volume = read_case_image(_case([first, second]))
    expected = np.asarray(resample_from_to(nib.load(second), nib.load(first), order=1).dataobj)
    np.testing.assert_allclose(volume.array[1], expected, atol=1e-5)
    assert np.ptp(expected) > 1
    assert "c: channel 1 (14 x 12 x 11" in caplog.text


def test_a_channel_in_another_axis_order_is_the_same_grid(
    tmp_path: Path, save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    voxels = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    plain = save(tmp_path / "a.nii.gz", voxels)
    turned = nib.load(plain).as_reoriented([[1, -1], [2, 1], [0, -1]])
    nib.save(turned, tmp_path / "b.nii.gz")
    with caplog.at_level(logging.INFO, logger="voxfit"):
        volume = read_case_image(_case([plain, tmp_path / "b.nii.gz"]))
    np.testing.assert_array_equal(volume.array[0], volume.array[1])
    assert not caplog.text


def test_several_files_hold_one_channel_each(tmp_path: Path, save: Save) -> None:
    files = [save(tmp_path / f"{n}.nii.gz", np.ones((*SHAPE, n), np.float32)) for n in (1, 2)]
    with pytest.raises(InputError, match="c: image file 1 of 2 holds 2 channels"):
        read_case_image(_case(files))


def test_a_label_keeps_the_values_of_its_file(tmp_path: Path, save: Save) -> None:
    values = np.random.default_rng(0).choice([0, 3, 300], SHAPE).astype(np.int32)
    case = _case([save(tmp_path / "i.nii.gz", np.ones(SHAPE))], save(tmp_path / "l.nii.gz", values))
    volume = read_case_label(case)
    np.testing.assert_array_equal(volume.array[0], values)
    assert volume.array.dtype.kind in "iu"


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize(("shift_mm", "is_close"), [(0.07, True), (0.5, False)])
def test_a_label_may_lie_off_its_image_by_less_than_a_tenth_of_a_voxel(
    tmp_path: Path, save: Save, oblique: NDArray[np.float64], shift_mm: float, is_close: bool, is_read: bool
) -> None:
    shifted = oblique.copy()
    shifted[1, 3] += shift_mm
    image = save(tmp_path / "i.nii.gz", np.ones(SHAPE))
    case = _case([image], save(tmp_path / "l.nii.gz", np.ones(SHAPE, np.uint8), shifted))
    grid = read_case_image(case).grid if is_read else None
    if is_close:
        assert read_case_label(case, grid=grid).array.all()
    else:
        with pytest.raises(InputError, match=r"c: the label lies up to 0\.5 mm away from the image"):
            read_case_label(case, grid=grid)


def test_an_image_that_was_read_is_not_opened_again_for_its_label(tmp_path: Path, save: Save) -> None:
    image = save(tmp_path / "i.nii.gz", np.ones(SHAPE))
    case = _case([image], save(tmp_path / "l.nii.gz", np.ones(SHAPE, np.uint8)))
    grid = read_case_image(case).grid
    image.unlink()
    assert read_case_label(case, grid=grid).array.all()


def test_a_label_of_another_shape_is_refused_with_both_shapes(tmp_path: Path, save: Save) -> None:
    image = save(tmp_path / "i.nii.gz", np.ones(SHAPE))
    case = _case([image], save(tmp_path / "l.nii.gz", np.ones((9, 7, 6), np.uint8)))
    with pytest.raises(InputError, match="label has 9 x 7 x 6 voxels, the image 9 x 7 x 5"):
        read_case_label(case)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="c: has no image"):
        read_case_image(_case([]))
    with pytest.raises(InputError, match="c: has no label"):
        read_case_label(_case([]))


def _case(images: list[Path], label: Path | None = None) -> Case:
    return Case(case_id="c", images=tuple(images), label=label)
