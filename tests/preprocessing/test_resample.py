"""Resampling against scipy's and torch's own in float64, and against geometry: nothing moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from pipeline.geometry import Grid, respaced_grid
from pipeline.preprocessing.resample import resample_image, resample_label, resample_scores

SHAPE = (17, 12, 9)
TARGETS = [(17, 12, 14), (11, 19, 9), (34, 7, 5), (5, 30, 23), (1, 12, 40)]
OBLIQUE = np.array([[0.9, 0.3, 0.0, -8.0], [-0.3, 1.4, 0.1, 3.0], [0.0, -0.1, 2.5, 11.0], [0, 0, 0, 1]])


def positions(shape: tuple[int, ...], target: tuple[int, ...]) -> list[np.ndarray]:
    """Where the voxels of `target` lie in voxels of `shape`, borders aligned."""
    axes = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip(shape, target, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij"))


def oracle(array: np.ndarray, target: tuple[int, ...], order: int) -> np.ndarray:
    return map_coordinates(array.astype(np.float64), positions(array.shape, target), order=order, mode="nearest")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_an_image_equals_a_float64_spline_at_the_same_places_up_to_the_borders(target, order) -> None:
    image = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    result = resample_image(image, target, anisotropic_axis=None, order=order)
    assert result.dtype == np.float32
    for channel, expected in zip(result, image, strict=True):
        np.testing.assert_allclose(channel, oracle(expected, target, order), atol=3e-6)


def test_large_offsets_do_not_cost_accuracy() -> None:
    image = (np.random.default_rng(0).normal(size=(1, *SHAPE)) + 1000).astype(np.float32)
    result = resample_image(image, TARGETS[1], anisotropic_axis=None)
    np.testing.assert_allclose(result[0], oracle(image[0], TARGETS[1], 3), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (1, 40, 2)])
def test_axes_of_one_voxel_are_extended(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    for order in (0, 1, 3):
        result = resample_image(image, (3, 4, 6), anisotropic_axis=None, order=order)
        np.testing.assert_allclose(result[0], oracle(image[0], (3, 4, 6), order), atol=3e-6)


def test_an_unchanged_shape_comes_back_without_a_spline() -> None:
    image = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    assert np.shares_memory(resample_image(image, SHAPE, anisotropic_axis=None), image)
    label = np.random.default_rng(0).integers(-1, 3, SHAPE, dtype=np.int16)
    np.testing.assert_array_equal(resample_label(label, SHAPE, num_classes=3, anisotropic_axis=None), label)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_the_anisotropic_axis_slices_are_repeated_and_within_them_a_spline_runs(axis: int) -> None:
    image = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    target = (25, 18, 14)
    result = resample_image(image, target, anisotropic_axis=axis)[0]
    n = SHAPE[axis]
    nearest = np.minimum(np.floor((np.arange(target[axis]) + 0.5) * n / target[axis]).astype(int), n - 1)
    in_plane = tuple(size for other, size in enumerate(target) if other != axis)
    for index, source in enumerate(nearest):
        expected = oracle(np.take(image[0], source, axis), in_plane, 3)
        np.testing.assert_allclose(np.take(result, index, axis), expected, atol=3e-6)


@pytest.mark.parametrize("order", [1, 3])
def test_a_ramp_in_space_stays_where_it_is(order: int) -> None:
    # Independent of any resampling code: an image of millimetres must read the millimetres of its own voxel centres.
    grid = Grid((30, 26, 22), OBLIQUE)
    new = respaced_grid(grid, (1.3, 0.8, 1.7))

    def millimetres(of: Grid) -> np.ndarray:
        index = np.stack(np.meshgrid(*map(np.arange, of.shape), indexing="ij"), axis=-1)
        return (index @ of.affine[:3, :3].T + of.affine[:3, 3]) @ [1.0, -2.0, 0.5]

    ramp = millimetres(grid)[None].astype(np.float32)
    there = resample_image(ramp, new.shape, anisotropic_axis=None, order=order)[0]
    # Where the outermost voxels are extended the ramp ends; the spline feels that a few voxels further in.
    inside = (slice(8, -8),) * 3
    np.testing.assert_allclose(there[inside], millimetres(new)[inside], atol=1e-2 if order == 3 else 1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("anisotropic_axis", [None, 2])
def test_a_label_is_the_argmax_of_linear_one_hot_maps(
    target: tuple[int, int, int], anisotropic_axis: int | None
) -> None:
    label = np.random.default_rng(1).integers(-1, 4, SHAPE, dtype=np.int16)
    label[:4, :5] = 2
    result = resample_label(label, target, num_classes=5, anisotropic_axis=anisotropic_axis)
    where = positions(SHAPE, target)
    if anisotropic_axis == 2:
        where[2] = np.floor(where[2] + 0.5)
    classes = [0, 1, 2, 3, 4, -1]
    shares = np.stack(
        [map_coordinates((label == c).astype(np.float64), where, order=1, mode="nearest") for c in classes]
    )
    assert result.dtype == np.int16
    winner = np.array(classes)[shares.argmax(0)]
    first, second = np.sort(shares, axis=0)[[-1, -2]]
    clear = first - second > 1e-6
    np.testing.assert_array_equal(result[clear], winner[clear])
    # Where it is not clear, one of the tied classes is taken.
    tied = shares.max(0) - np.choose(np.where(result < 0, 5, result), shares) < 1e-6
    assert tied.all()


@pytest.mark.parametrize(("pair", "winner"), [((0, 1), 0), ((1, 0), 0), ((2, 1), 1), ((-1, 2), 2), ((-1, -1), -1)])
def test_of_equal_shares_the_lower_class_wins_and_an_ignored_voxel_last(pair: tuple[int, int], winner: int) -> None:
    label = np.array(pair, np.int16).reshape(1, 2, 1)
    assert resample_label(label, (1, 1, 1), num_classes=3, anisotropic_axis=None).item() == winner


def test_a_class_that_falls_between_all_new_voxels_vanishes_without_an_error() -> None:
    label = np.zeros((9, 9, 9), np.int16)
    label[4, 4, 4] = 3
    result = resample_label(label, (2, 2, 2), num_classes=4, anisotropic_axis=0)
    assert not result.any()


@pytest.mark.parametrize("target", TARGETS)
def test_scores_agree_with_torch(target: tuple[int, int, int]) -> None:
    scores = np.random.default_rng(2).normal(size=(3, *SHAPE)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(scores).double()[None], target, mode="trilinear")[0]
    np.testing.assert_allclose(resample_scores(scores, target, anisotropic_axis=None), expected.numpy(), atol=1e-6)


def test_half_precision_scores_are_taken() -> None:
    scores = np.ones((2, *SHAPE), np.float16)
    result = resample_scores(scores, (5, 6, 7), anisotropic_axis=1)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, 1.0)


def test_an_unknown_spline_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order 2"):
        resample_image(np.zeros((1, 3, 3, 3)), (4, 4, 4), anisotropic_axis=None, order=2)
