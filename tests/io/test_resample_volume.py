"""Volumes onto other grids: `nibabel.processing` and a plain trilinear formula are the oracles."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from pipeline.geometry import Grid, respaced_grid
from pipeline.io.resample import resample_volume
from pipeline.io.volume import Volume

RNG = np.random.default_rng(11)
SHAPE = (13, 9, 7)


def oblique(
    angles: tuple[float, float, float], spacing: tuple[float, float, float], origin: tuple[float, ...]
) -> np.ndarray:
    return nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles) @ np.diag(spacing), origin)


SOURCE = oblique((0.1, 0.2, -0.15), (1.0, 1.3, 2.2), (-5.0, 3.0, 8.0))
TARGET = Grid((11, 12, 8), oblique((-0.1, 0.05, 0.2), (1.1, 0.9, 1.8), (-4.0, 4.0, 9.0)))


def positions(volume_affine: np.ndarray, grid: Grid) -> np.ndarray:
    """(3, I, J, K) where the target's voxels lie in the source, in voxels; point by point, in millimetres first."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    return np.moveaxis(
        nib.affines.apply_affine(np.linalg.inv(volume_affine), nib.affines.apply_affine(grid.affine, voxels)), -1, 0
    )


@pytest.mark.parametrize("order", [0, 1, 3])
def test_agrees_with_nibabel_well_inside_the_volume(order: int):
    volume = Volume.from_array(RNG.random((2, *SHAPE)), SOURCE)
    result = resample_volume(volume, TARGET, order=order)
    where = positions(SOURCE, TARGET)
    deep = np.all((where > 1) & (where < np.reshape(SHAPE, (3, 1, 1, 1)) - 2), axis=0)
    assert deep.sum() > 100
    for channel in range(2):
        image = nib.Nifti1Image(volume.array[channel], SOURCE)
        expected = resample_from_to(image, (TARGET.shape, TARGET.affine), order=order, mode="nearest").get_fdata()
        np.testing.assert_allclose(result.array[channel][deep], expected[deep], atol=1e-12)


def test_points_outside_the_voxels_are_zero_and_the_outer_half_voxel_is_not():
    result = resample_volume(Volume.from_array(np.ones(SHAPE), SOURCE), TARGET).array[0]
    where = positions(SOURCE, TARGET)
    inside = np.all((where >= -0.5) & (where <= np.reshape(SHAPE, (3, 1, 1, 1)) - 0.5), axis=0)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(result, inside, atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_same_grid_gives_the_same_voxels(order: int):
    volume = Volume.from_array(RNG.random(SHAPE).astype(np.float32), SOURCE)
    result = resample_volume(volume, volume.grid, order=order)
    np.testing.assert_allclose(result.array, volume.array, atol=1e-6)


def test_a_linear_ramp_in_millimetres_is_met_exactly_on_any_grid():
    def ramp(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        return nib.affines.apply_affine(affine, voxels) @ [0.3, -0.7, 1.1] + 5

    result = resample_volume(Volume.from_array(ramp(SOURCE, SHAPE), SOURCE), TARGET).array[0]
    where = positions(SOURCE, TARGET)
    inner = np.all((where >= 0) & (where <= np.reshape(SHAPE, (3, 1, 1, 1)) - 1), axis=0)
    np.testing.assert_allclose(result[inner], ramp(TARGET.affine, TARGET.shape)[inner], atol=1e-9)


def test_labels_keep_their_values_and_type():
    label = Volume.from_array(RNG.integers(0, 4, SHAPE).astype(np.uint8) * 20, SOURCE)
    result = resample_volume(label, TARGET, order=0)
    assert result.array.dtype == np.uint8
    assert set(np.unique(result.array)) == {0, 20, 40, 60}


def test_interpolated_integers_become_float32_and_are_not_truncated():
    steps = np.zeros((4, 3, 2), np.int16)
    steps[1::2] = 1
    finer = respaced_grid(Grid((4, 3, 2), np.eye(4)), (0.5, 1, 1))
    result = resample_volume(Volume.from_array(steps, np.eye(4)), finer)
    assert result.array.dtype == np.float32
    np.testing.assert_allclose(result.array[0, :, 0, 0], [0, 0.25, 0.75, 0.75, 0.25, 0.25, 0.75, 1])


def test_whole_factor_there_and_back_by_nearest_is_lossless():
    label = Volume.from_array(RNG.integers(0, 9, SHAPE).astype(np.int16), SOURCE)
    finer = respaced_grid(label.grid, tuple(value / 3 for value in label.spacing))
    again = resample_volume(resample_volume(label, finer, order=0), label.grid, order=0)
    np.testing.assert_array_equal(again.array, label.array)


def test_grids_that_do_not_meet_give_zeros():
    far = Grid((3, 4, 5), oblique((0, 0, 0), (1, 1, 1), (500.0, 0.0, 0.0)))
    assert not resample_volume(Volume.from_array(np.ones(SHAPE), SOURCE), far).array.any()
