from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_dice, compute_iou
from scipy import ndimage

from pipeline.evaluation.metrics import METRIC_NAMES, ClassScores, dice, iou, score_class, weighted_percentile

SPACING = (0.7, 1.3, 2.9)
masks = arrays(bool, (4, 5, 3))


def blobs(seed: int, shape: tuple[int, ...] = (14, 21, 17)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 2, 2, 2))
    return noise[0] > 0.03, noise[0] + 0.5 * noise[1] > 0.03


def box(start: int, shape: tuple[int, int, int] = (12, 10, 8)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[start : start + 5, 2:7, 2:6] = True
    return mask


@settings(max_examples=50, deadline=None)
@given(prediction=masks, reference=masks)
def test_overlaps_equal_monai(prediction: np.ndarray, reference: np.ndarray) -> None:
    first, second = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference))
    expected_dice = compute_dice(first, second, ignore_empty=False).item()
    expected_iou = compute_iou(first, second, ignore_empty=False).item()
    if prediction.any() or reference.any():
        assert dice(prediction, reference) == pytest.approx(expected_dice)
        assert iou(prediction, reference) == pytest.approx(expected_iou)
    else:
        assert np.isnan([dice(prediction, reference), iou(prediction, reference)]).all()


@pytest.mark.parametrize("seed", range(8))
def test_surface_metrics_equal_surface_distance(seed: int) -> None:
    package = pytest.importorskip("surface_distance")
    prediction, reference = blobs(seed)
    spacing = tuple(np.random.default_rng(seed).uniform(0.4, 4, 3).tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = package.compute_surface_distances(reference, prediction, spacing)
    ours = score_class(prediction, reference, spacing=spacing, tolerance_mm=1.7)
    areas = np.concatenate([found["surfel_areas_gt"], found["surfel_areas_pred"]])
    distances = np.concatenate([found["distances_gt_to_pred"], found["distances_pred_to_gt"]])
    assert ours.nsd == pytest.approx(package.compute_surface_dice_at_tolerance(found, 1.7), abs=1e-9)
    assert ours.hd95_mm == pytest.approx(package.compute_robust_hausdorff(found, 95), abs=1e-9)
    assert ours.assd_mm == pytest.approx(float(np.average(distances, weights=areas)), abs=1e-9)


def test_equal_masks_are_perfect() -> None:
    scores = score_class(box(3), box(3), spacing=SPACING, tolerance_mm=0)
    assert (scores.dice, scores.iou, scores.nsd, scores.hd95_mm, scores.assd_mm) == (1, 1, 1, 0, 0)
    assert (scores.volume_error_ml, scores.relative_volume_error) == (0, 0)
    assert scores.reference_ml == pytest.approx(100 * 0.7 * 1.3 * 2.9 / 1000)


def test_a_shift_is_measured_in_millimetres() -> None:
    scores = score_class(box(5), box(3), spacing=SPACING, tolerance_mm=1.0)
    assert scores.hd95_mm == pytest.approx(2 * 0.7)
    assert 0 < scores.assd_mm < 2 * 0.7
    assert score_class(box(5), box(3), spacing=SPACING, tolerance_mm=1.5).nsd == 1
    assert scores.dice == pytest.approx(0.6)
    assert scores.relative_volume_error == 0


def test_a_tolerance_of_one_voxel_holds_in_spite_of_float32_headers() -> None:
    spacing = (float(np.float32(0.7)) * (1 + 1e-6), 1.0, 1.0)
    assert score_class(box(4), box(3), spacing=spacing, tolerance_mm=0.7).nsd == 1


def test_the_sign_of_the_relative_volume_error_tells_the_direction() -> None:
    small, large = box(3), ndimage.binary_dilation(box(3))
    assert score_class(small, large, spacing=SPACING).relative_volume_error < 0
    found = score_class(large, small, spacing=SPACING)
    assert found.relative_volume_error > 0
    assert found.volume_error_ml == pytest.approx(found.prediction_ml - found.reference_ml)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (False, False, {"volume_error_ml": 0, "prediction_ml": 0, "reference_ml": 0}),
        (False, True, {"dice": 0, "iou": 0, "nsd": 0, "relative_volume_error": -1, "volume_error_ml": 0.2639}),
        (True, False, {"dice": 0, "iou": 0, "nsd": 0, "volume_error_ml": 0.2639}),
    ],
)
def test_empty_masks_follow_the_written_rules(prediction: bool, reference: bool, expected: dict[str, float]) -> None:
    scores = score_class(box(3) & prediction, box(3) & reference, spacing=SPACING)
    for name in set(METRIC_NAMES) - {"prediction_ml", "reference_ml"}:
        if name in expected:
            assert getattr(scores, name) == pytest.approx(expected[name])
        else:
            assert np.isnan(getattr(scores, name)), name


@settings(max_examples=30, deadline=None)
@given(prediction=masks, reference=masks, order=st.permutations(range(3)), flip=st.sets(st.integers(0, 2)))
def test_scores_do_not_depend_on_the_axes(
    prediction: np.ndarray, reference: np.ndarray, order: list[int], flip: set[int]
) -> None:
    plain = score_class(prediction, reference, spacing=SPACING)
    turned = [np.flip(mask, tuple(flip)).transpose(order) for mask in (prediction, reference)]
    other = score_class(turned[0], turned[1], spacing=tuple(SPACING[axis] for axis in order))  # type: ignore[arg-type]
    assert_close(plain, other, METRIC_NAMES)


@settings(max_examples=30, deadline=None)
@given(prediction=masks, reference=masks)
def test_prediction_and_reference_are_symmetric_but_for_the_relative_volume(
    prediction: np.ndarray, reference: np.ndarray
) -> None:
    names = [name for name in METRIC_NAMES if name not in ("relative_volume_error", "prediction_ml", "reference_ml")]
    there = score_class(prediction, reference, spacing=SPACING)
    assert_close(there, score_class(reference, prediction, spacing=SPACING), names)


def assert_close(first: ClassScores, second: ClassScores, names: object) -> None:
    for name in names:  # type: ignore[attr-defined]
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-9, err_msg=name)


def test_the_percentile_is_by_weight() -> None:
    values = np.array([5.0, 1.0, 3.0])
    assert weighted_percentile(values, np.array([1.0, 98.0, 1.0]), 95) == 1
    assert weighted_percentile(values, np.array([10.0, 80.0, 10.0]), 95) == 5
    assert weighted_percentile(values, np.ones(3), 100) == 5
    # 19 of 20 equal areas are 95 per cent, whatever their sum rounds to.
    assert weighted_percentile(np.arange(20.0), np.full(20, 0.1), 95) == 18


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        score_class(np.ones((2, 3, 4)), np.ones((2, 3, 5)), spacing=SPACING)
