"""Grids, affines and axis orders against nibabel and against positions in millimetres."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.geometry import AxisOrder, Grid, check_affine, cropped_grid, format_spacing, respaced_grid, spacing_of

SHAPE = (7, 5, 4)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, 0.2, -0.25) @ np.diag([0.8, 1.5, 3.0]), [-20.0, 11.0, 4.5]
)
ALL_CODES = [
    "".join(pair[side] for pair, side in zip(order, sides, strict=True))
    for order in permutations(("RL", "AP", "SI"))
    for sides in product((0, 1), repeat=3)
]
angles = st.floats(-0.3, 0.3)
sizes = st.floats(0.2, 6.0)


def grid_in_order(codes: str) -> Grid:
    """The lattice of `OBLIQUE` as a file with axes `codes` holds it, by nibabel."""
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    shape = nib.orientations.apply_orientation(np.empty(SHAPE), change).shape
    return Grid(shape, OBLIQUE @ nib.orientations.inv_ornt_aff(change, SHAPE))


def millimetres(grid: Grid) -> np.ndarray:
    """(3, I, J, K) where each voxel centre lies."""
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    return np.moveaxis(nib.affines.apply_affine(grid.affine, voxels), -1, 0)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_reordering_moves_positions_and_voxels_together(codes: str):
    grid = grid_in_order(codes)
    order = AxisOrder.of(grid.affine)
    ras = order.grid_to_ras(grid)
    assert nib.aff2axcodes(ras.affine) == ("R", "A", "S")
    np.testing.assert_allclose(order.to_ras(millimetres(grid)), millimetres(ras), atol=1e-9)
    np.testing.assert_allclose(ras.affine, OBLIQUE, atol=1e-9)
    assert ras.shape == SHAPE


@pytest.mark.parametrize("codes", ALL_CODES)
def test_from_ras_undoes_to_ras(codes: str):
    grid = grid_in_order(codes)
    order = AxisOrder.of(grid.affine)
    array = np.arange(3 * np.prod(grid.shape)).reshape(3, *grid.shape)
    np.testing.assert_array_equal(order.from_ras(order.to_ras(array)), array)
    assert order.to_ras(array).base is not None


def test_all_48_orders_are_different():
    orders = {(o.source_axis, o.flipped) for o in (AxisOrder.of(grid_in_order(codes).affine) for codes in ALL_CODES)}
    assert len(ALL_CODES) == len(orders) == 48


def test_spacing_is_free_of_the_rotation():
    np.testing.assert_allclose(spacing_of(OBLIQUE), (0.8, 1.5, 3.0))
    assert format_spacing(spacing_of(OBLIQUE)) == "0.8 x 1.5 x 3"


def test_a_cropped_grid_keeps_positions():
    inner = cropped_grid(Grid(SHAPE, OBLIQUE), (2, 1, 1), (4, 3, 2))
    np.testing.assert_allclose(millimetres(inner), millimetres(Grid(SHAPE, OBLIQUE))[:, 2:6, 1:4, 1:3], atol=1e-9)


def test_a_crop_may_start_before_the_grid():
    outer = cropped_grid(Grid(SHAPE, OBLIQUE), (-2, -1, -3), (11, 7, 10))
    np.testing.assert_allclose(millimetres(outer)[:, 2:9, 1:6, 3:7], millimetres(Grid(SHAPE, OBLIQUE)), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(turn=st.tuples(angles, angles, angles), old=st.tuples(sizes, sizes, sizes), new=st.tuples(sizes, sizes, sizes))
def test_respacing_keeps_the_box_and_goes_back_to_the_same_place(
    turn: tuple[float, ...], old: tuple[float, ...], new: tuple[float, ...]
):
    grid = Grid(SHAPE, nib.affines.from_matvec(nib.eulerangles.euler2mat(*turn) @ np.diag(old), [3.0, -2.0, 9.0]))
    there = respaced_grid(grid, new)
    for corner in product((0, 1), repeat=3):
        before = nib.affines.apply_affine(grid.affine, np.array(corner) * grid.shape - 0.5)
        after = nib.affines.apply_affine(there.affine, np.array(corner) * there.shape - 0.5)
        np.testing.assert_allclose(after, before, atol=1e-8)
    ratio = np.array(grid.shape) / there.shape
    back = respaced_grid(there, grid.spacing)
    if back.shape == grid.shape:
        np.testing.assert_allclose(back.affine, grid.affine, atol=1e-8)
    np.testing.assert_allclose(there.spacing, np.array(old) * ratio, rtol=1e-9)


def test_respacing_hits_the_wanted_spacing_to_within_half_a_voxel_of_the_box():
    there = respaced_grid(Grid((40, 32, 24), np.diag([1, 1, 4, 1.0])), (0.7, 0.7, 2.5))
    assert there.shape == (57, 46, 38)
    np.testing.assert_allclose(there.spacing, (40 / 57, 32 / 46, 96 / 38))


def test_an_axis_never_vanishes():
    assert respaced_grid(Grid((4, 4, 1), np.eye(4)), (1.0, 1.0, 50.0)).shape == (4, 4, 1)


def test_grids_are_compared_where_they_are_furthest_apart():
    turned = OBLIQUE.copy()
    turned[0, 0] += 0.01 / (SHAPE[0] - 1)
    near, far = Grid(SHAPE, turned), Grid((400, 5, 4), turned)
    assert Grid(SHAPE, OBLIQUE).distance_mm(near) == pytest.approx(0.01)
    assert Grid(SHAPE, OBLIQUE).is_close(near)
    assert not Grid((400, 5, 4), OBLIQUE).is_close(far)
    assert not Grid(SHAPE, OBLIQUE).is_close(Grid((7, 5, 3), OBLIQUE))


@pytest.mark.parametrize(("voxel_mm", "tolerance_mm"), [(0.8, 0.08), (0.05, 0.01)])
def test_grids_are_close_within_a_tenth_of_the_smallest_voxel_but_a_hundredth_of_a_millimetre_at_least(
    voxel_mm: float, tolerance_mm: float
):
    affine = np.diag([1.5, voxel_mm, 3.0, 1.0])
    for share in (0.99, 1.01):
        moved = affine.copy()
        moved[2, 3] += share * tolerance_mm
        assert Grid(SHAPE, affine).is_close(Grid(SHAPE, moved)) == (share < 1)


@pytest.mark.parametrize(
    "columns", [np.zeros((3, 3)), np.diag([1.0, 0, 1]), np.ones((3, 3)), np.array([[1, 2, 0], [2, 4, 0], [0, 0, 1.0]])]
)
def test_a_singular_affine_is_named(columns: np.ndarray):
    with pytest.raises(InputError, match=r"case_7.*singular.*Repair the header"):
        check_affine(nib.affines.from_matvec(columns), "case_7")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_affine_that_is_not_finite_is_named(value: float):
    affine = OBLIQUE.copy()
    affine[1, 3] = value
    with pytest.raises(InputError, match="not finite"):
        check_affine(affine, "case_7")


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_affines_of_any_usual_scale_pass(scale: float):
    check_affine(OBLIQUE * [[scale], [scale], [scale], [1]], "case_7")
