"""There and back: what a perfect network would answer comes back as the label it was given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from pipeline.errors import InputError
from pipeline.geometry import Spacing, spacing_of
from pipeline.io.volume import Volume
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import PreparedImage, prepare_image, prepare_label
from pipeline.preprocessing.restore import restore_label

OBLIQUE = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])
SHAPE = (38, 31, 27)


def make_case() -> tuple[Volume, Volume]:
    """Two ellipsoids (values 3 and 7) that overlap, in an image with margins of zeros."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    label = np.zeros(SHAPE, np.uint8)
    label[(x - 0.1) ** 2 + y**2 + (z + 0.1) ** 2 < 0.4] = 3
    label[(x - 0.2) ** 2 + (y + 0.1) ** 2 + z**2 < 0.15] = 7
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) + label
    image[:3], image[:, -4:] = 0, 0
    return Volume.from_array(image, OBLIQUE), Volume.from_array(label, OBLIQUE)


def one_hot(label: np.ndarray, plan: Plan) -> np.ndarray:
    return np.stack([label == index for index in range(plan.num_classes)]).astype(np.float32)


def there(plan: Plan) -> tuple[PreparedImage, np.ndarray]:
    image, label = make_case()
    prepared = prepare_image(image, plan)
    return prepared, one_hot(prepare_label(label, prepared, plan), plan)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_at_the_native_spacing_there_and_back_is_exact(plan: Plan) -> None:
    native = replace(plan, target_spacing=spacing_of(OBLIQUE))
    prepared, scores = there(native)
    assert prepared.array.shape[1:] == prepared.crop_shape == (35, 27, 27)
    restored = restore_label(scores, prepared, native)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, make_case()[1].array[0])


@pytest.mark.parametrize("spacing", [(1.2, 1.6, 1.3), (0.7, 0.8, 2.0), (1.4, 1.1, 1.7), (0.5, 1.0, 1.5)])
@pytest.mark.parametrize("axis", [None, 2])
def test_a_smooth_label_survives_there_and_back(plan: Plan, spacing: Spacing, axis: int | None) -> None:
    other = replace(plan, target_spacing=spacing, anisotropic_axis=axis)
    prepared, scores = there(other)
    assert scores.shape[1:] == prepared.grid.shape
    np.testing.assert_allclose(prepared.grid.spacing, spacing, rtol=0.05)
    restored = restore_label(scores, prepared, other)
    truth = make_case()[1].array[0]
    # Nearest slices of another thickness cost up to half a slice at each end.
    least = 0.95 if axis is None else 0.9
    assert dice(restored == 3, truth == 3) > least
    assert dice(restored == 7, truth == 7) > least


def test_scores_come_back_to_the_place_in_space_that_they_were_given_at(plan: Plan) -> None:
    # A network that answers "right of this oblique plane in millimetres" needs no resampling to be checked.
    prepared = prepare_image(make_case()[0], plan)
    normal, offset = np.array([0.8, 0.5, 0.3]), 14.0

    def side(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        return (index @ affine[:3, :3].T + affine[:3, 3]) @ normal - offset

    answer = side(prepared.grid.affine, prepared.grid.shape).astype(np.float32)
    scores = np.stack([np.zeros_like(answer), answer, np.full_like(answer, -1e6)])
    restored = restore_label(scores, prepared, plan)
    native = side(OBLIQUE, SHAPE)
    in_crop = np.zeros(SHAPE, bool)
    in_crop[4:-1, 1:-5, 1:-1] = True
    clear = in_crop & (np.abs(native) > 0.05)
    np.testing.assert_array_equal(restored[clear], np.where(native > 0, 3, 0)[clear])
    assert not restored[:3].any()


def test_resampled_scores_agree_with_a_float64_interpolation_by_both_affines(plan: Plan) -> None:
    prepared = prepare_image(make_case()[0], plan)
    scores = np.random.default_rng(3).normal(size=(plan.num_classes, *prepared.grid.shape)).astype(np.float32)
    restored = restore_label(scores, prepared, plan)
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).reshape(3, -1)
    millimetres = OBLIQUE[:3, :3] @ index + OBLIQUE[:3, 3:]
    affine = prepared.grid.affine
    places = np.linalg.solve(affine[:3, :3], millimetres - affine[:3, 3:])
    native = np.stack([map_coordinates(s.astype(np.float64), places, order=1, mode="nearest") for s in scores])
    expected = np.array(plan.label_values)[native.argmax(0)].reshape(SHAPE)
    outside = np.ones(SHAPE, bool)
    box = tuple(slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    outside[box] = False
    expected[outside] = 0
    clear = np.diff(np.sort(native, axis=0)[-2:], axis=0).reshape(SHAPE) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(restored[clear | outside], expected[clear | outside])


def test_classes_can_be_given_one_at_a_time_and_are_asked_for_once(plan: Plan) -> None:
    prepared, scores = there(plan)
    asked = []

    def of_class(index: int) -> np.ndarray:
        asked.append(index)
        return scores[index]

    np.testing.assert_array_equal(restore_label(of_class, prepared, plan), restore_label(scores, prepared, plan))
    assert asked == [0, 1, 2]


def test_equal_scores_give_the_background(plan: Plan) -> None:
    prepared, scores = there(plan)
    assert not restore_label(np.zeros_like(scores), prepared, plan).any()


def test_scores_that_are_nan_are_refused_with_the_class_named(plan: Plan) -> None:
    prepared, scores = there(plan)
    scores[2, 1, 2, 3] = np.nan
    with pytest.raises(InputError, match="class vessel are NaN"):
        restore_label(scores, prepared, plan)


def test_three_hundred_classes_come_back_as_their_values(plan: Plan) -> None:
    labels = {f"c{index}": 2 * index for index in range(300)}
    many = replace(plan, labels=labels, target_spacing=(9.0, 9.0, 9.0))
    prepared = prepare_image(make_case()[0], many)
    scores = np.zeros((300, *prepared.grid.shape), np.float32)
    scores[299] = 1.0
    restored = restore_label(scores, prepared, many)
    assert restored.dtype == np.int16
    assert set(np.unique(restored)) == {0, 598}
