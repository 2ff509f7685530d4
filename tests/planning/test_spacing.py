from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.fingerprint import CaseFingerprint
from pipeline.geometry import Shape3, Spacing
from pipeline.planning.spacing import anisotropic_axis, make_target_grid


def make_case(spacing: Spacing, shape: Shape3) -> CaseFingerprint:
    return CaseFingerprint(
        case_id="a", patient="a", shape=shape, spacing=spacing, cropped_shape=shape, voxels_by_class=(1, 1)
    )


def test_spacing_is_the_median_of_each_axis_on_its_own() -> None:
    cases = [make_case((1.0, 0.5, 2.0), (40, 60, 30)), make_case((2.0, 0.7, 1.0), (40, 60, 30))]
    cases.append(make_case((1.5, 0.9, 1.2), (40, 60, 30)))
    target = make_target_grid(cases)
    assert target.spacing == (1.5, 0.7, 1.2)
    assert target.anisotropic_axis is None


def test_few_thick_slices_take_a_fine_percentile_of_their_axis() -> None:
    cases = [make_case((0.5, 0.6, step), (300, 280, 20)) for step in (2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0)]
    target = make_target_grid(cases)
    # Tenth percentile by linear interpolation between the two thinnest of ten.
    assert target.spacing == (0.5, 0.6, 2.9)
    assert target.anisotropic_axis == 2
    assert "10th percentile" in target.reason


def test_the_fine_percentile_never_goes_below_the_other_axes() -> None:
    cases = [make_case((step, 0.5, 0.8), (20, 300, 280)) for step in [0.3] * 4 + [5.0] * 6]
    assert make_target_grid(cases).spacing == (0.8, 0.5, 0.8)


def test_thick_slices_that_are_many_keep_their_median() -> None:
    cases = [make_case((0.5, 0.5, step), (200, 200, 100)) for step in (1.0, 4.0, 4.0)]
    target = make_target_grid(cases)
    assert target.spacing == (0.5, 0.5, 4.0)
    assert target.anisotropic_axis == 2


def test_the_median_shape_is_taken_after_resampling() -> None:
    cases = [make_case((1.0, 1.0, 1.0), (40, 50, 60)), make_case((2.0, 1.0, 0.5), (40, 52, 60))]
    cases.append(make_case((1.0, 1.0, 1.0), (30, 54, 62)))
    target = make_target_grid(cases, spacing=(1.0, 1.0, 2.0))
    assert target.median_shape == (40, 52, 30)
    assert "was given" in target.reason


@pytest.mark.parametrize(
    ("spacing", "axis"), [((1.0, 1.0, 3.1), 2), ((1.0, 1.0, 3.0), None), ((4.0, 1.0, 1.2), 0), ((0.5, 2.0, 3.0), None)]
)
def test_an_axis_is_anisotropic_above_three_times_both_others(spacing: Spacing, axis: int | None) -> None:
    assert anisotropic_axis(spacing) == axis


@given(st.permutations([0, 1, 2]))
def test_axes_are_treated_alike(order: list[int]) -> None:
    spacings = [(0.5, 0.7, 4.0), (0.6, 0.7, 5.0), (0.55, 0.75, 6.0)]
    shapes = [(280, 300, 20), (290, 310, 22), (300, 320, 24)]
    straight = make_target_grid([make_case(*pair) for pair in zip(spacings, shapes, strict=True)])
    turned = make_target_grid(
        [
            make_case(tuple(s[a] for a in order), tuple(n[a] for a in order))
            for s, n in zip(spacings, shapes, strict=True)
        ]
    )
    assert turned.spacing == tuple(straight.spacing[axis] for axis in order)
    assert turned.median_shape == tuple(straight.median_shape[axis] for axis in order)
    assert order[turned.anisotropic_axis] == straight.anisotropic_axis
