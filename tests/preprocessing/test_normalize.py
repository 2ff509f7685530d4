"""Normalisation against plain float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.volume import Volume
from pipeline.plan import ChannelPlan
from pipeline.preprocessing.crop import foreground_location
from pipeline.preprocessing.normalize import normalize
from pipeline.store import PatchLocation

ZSCORE = ChannelPlan(name="T1", scheme="zscore")
BODY = ChannelPlan(name="T1", scheme="zscore", use_body_mask=True)
CT = ChannelPlan(name="CT", scheme="ct", lower=-100.0, upper=240.0, mean=40.0, std=35.0)
SHAPE = (9, 14, 11)


def make_image(offset: float = 100.0, spread: float = 20.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(1, *SHAPE)) * spread + offset).astype(np.float32)


@pytest.mark.parametrize(("offset", "spread"), [(100, 20), (0, 1), (-5, 1e-4), (1.7e6, 3e5), (1e4, 1)])
def test_zscore_has_zero_mean_and_unit_spread_at_any_scale(offset: float, spread: float) -> None:
    image = make_image(offset, spread)
    exact = image.astype(np.float64)
    result = normalize(image, (ZSCORE,))
    assert result.dtype == np.float32
    # The input's own rounding, in units of its spread, is all that may differ.
    np.testing.assert_allclose(result, (exact - exact.mean()) / exact.std(), atol=2e-6 + 1e-6 * abs(offset) / spread)


def test_ct_clips_then_uses_the_dataset_statistics() -> None:
    image = make_image(0, 300)
    expected = (np.clip(image.astype(np.float64), -100, 240) - 40) / 35
    np.testing.assert_allclose(normalize(image, (CT,)), expected, atol=1e-5)


def test_none_leaves_the_values() -> None:
    image = make_image()
    np.testing.assert_array_equal(normalize(image, (ChannelPlan(name="x", scheme="none"),)), image)


def test_the_input_is_not_changed_and_each_channel_has_its_own_scheme() -> None:
    image = np.concatenate([make_image(seed=1), make_image(0, 300, seed=2)])
    before = image.copy()
    result = normalize(image, (ZSCORE, CT))
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(result[0], normalize(image[:1], (ZSCORE,))[0])
    np.testing.assert_array_equal(result[1], normalize(image[1:], (CT,))[0])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1.7e6])
@pytest.mark.parametrize(("scheme", "use_body_mask"), [("zscore", False), ("zscore", True), ("ct", False)])
def test_a_constant_image_becomes_finite_and_zero(value: float, scheme: str, use_body_mask: bool) -> None:
    channel = ChannelPlan(
        name="x", scheme=scheme, lower=value, upper=value, mean=value, std=0.0, use_body_mask=use_body_mask
    )
    result = normalize(np.full((1, *SHAPE), value, np.float32), (channel,))
    np.testing.assert_array_equal(result, np.float32(value) - np.float32(value))


@pytest.mark.parametrize("num_planes", [1, 4, 8])
def test_with_a_body_mask_zero_margins_are_left_out_of_the_statistics_and_stay_zero(num_planes: int) -> None:
    image = make_image()
    image[:, :num_planes] = 0
    body = image[0, num_planes:].astype(np.float64)
    result = normalize(image, (BODY,))[0]
    assert not result[:num_planes].any()
    np.testing.assert_allclose(result[num_planes:], (body - body.mean()) / body.std(), atol=1e-5)


@pytest.mark.parametrize("num_planes", [1, 4, 8])
def test_without_a_body_mask_zero_margins_count_however_wide_they_are(num_planes: int) -> None:
    image = make_image()
    image[:, :num_planes] = 0
    exact = image.astype(np.float64)
    np.testing.assert_allclose(normalize(image, (ZSCORE,)), (exact - exact.mean()) / exact.std(), atol=1e-5)


def test_zeros_inside_the_body_are_tissue() -> None:
    image = make_image()
    image[:, :4] = 0
    image[0, 6:8, 5:8, 4:6] = 0
    body = image[0, 4:].astype(np.float64)
    result = normalize(image, (BODY,))[0]
    assert not result[:4].any()
    np.testing.assert_allclose(result[4:], (body - body.mean()) / body.std(), atol=1e-5)
    assert (result[6:8, 5:8, 4:6] < -2).all()


def test_the_body_mask_is_for_its_own_channel_and_for_zscore_alone() -> None:
    image = np.concatenate([make_image(seed=1), make_image(seed=2), make_image(seed=3)])
    image[:, :4] = 0
    ct = ChannelPlan(name="CT", scheme="ct", lower=-100.0, upper=240.0, mean=40.0, std=35.0, use_body_mask=True)
    result = normalize(image, (BODY, ZSCORE, ct))
    assert not result[0, :4].any()
    np.testing.assert_array_equal(result[1], normalize(image[1:2], (ZSCORE,))[0])
    np.testing.assert_array_equal(result[2], normalize(image[2:], (CT,))[0])


def test_a_voxel_is_background_only_when_all_channels_are_zero() -> None:
    image = np.concatenate([make_image(seed=1), make_image(seed=2)])
    image[0, :4] = 0
    exact = image[0].astype(np.float64)
    result = normalize(image, (BODY, BODY))[0]
    np.testing.assert_allclose(result, (exact - exact.mean()) / exact.std(), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused(bad: float) -> None:
    image = make_image()
    image[0, 1, 2, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        normalize(image, (CT,))


def test_the_crop_is_the_smallest_box_of_voxels_that_are_not_zero_in_some_channel() -> None:
    array = np.zeros((2, 12, 9, 15), np.float32)
    array[0, 3:5, 2, 7] = 1
    array[1, 8, 1:4, 12] = -2
    assert foreground_location(Volume.from_array(array, np.eye(4))) == PatchLocation((3, 1, 7), (6, 3, 6))
    empty = Volume.from_array(np.zeros((4, 5, 6)), np.eye(4))
    assert foreground_location(empty) == PatchLocation((0, 0, 0), (4, 5, 6))
