"""Filling of contours: half planes, matplotlib's point test and set algebra are the oracles."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from pipeline.io.dicom.contours import Contours, fill_contours

SHAPE = (23, 17)
NEAR_EDGE = 1e-4
CENTRES = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1).astype(float)
seeds = st.integers(0, 2**32 - 1)


def contours_of(*polygons: np.ndarray, slices: list[int] | None = None) -> Contours:
    points = np.concatenate([np.asarray(polygon, float) for polygon in polygons])
    lengths = np.array([len(polygon) for polygon in polygons])
    return Contours(points, lengths, np.array(slices or [0] * len(polygons)))


def fill(*polygons: np.ndarray, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return fill_contours(contours_of(*polygons), (*shape, 1))[..., 0]


def rectangle(i0: float, j0: float, i1: float, j1: float) -> np.ndarray:
    return np.array([(i0, j0), (i1, j0), (i1, j1), (i0, j1)])


def random_star(rng: np.random.Generator, *, is_convex: bool = False) -> np.ndarray:
    """Points around a centre by rising angle; on an ellipse they are convex."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 30)))
    radius = 1.0 if is_convex else rng.uniform(0.2, 1, angles.size)
    unit = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    return unit @ rng.uniform(-12, 12, (2, 2)) + rng.uniform(-4, 24, 2)


def distance_to_edges(polygon: np.ndarray) -> np.ndarray:
    """Of all centres to the nearest edge, in voxels."""
    start, run = polygon[:, None, None], (np.roll(polygon, -1, axis=0) - polygon)[:, None, None]
    along = np.clip(((CENTRES - start) * run).sum(-1) / np.maximum((run**2).sum(-1), 1e-30), 0, 1)
    return np.linalg.norm(CENTRES - start - along[..., None] * run, axis=-1).min(axis=0)


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_a_convex_polygon_is_where_all_half_planes_meet(seed: int):
    polygon = random_star(np.random.default_rng(seed), is_convex=True)
    edges = (np.roll(polygon, -1, axis=0) - polygon)[:, None, None]
    offsets = CENTRES - polygon[:, None, None]
    side = edges[..., 0] * offsets[..., 1] - edges[..., 1] * offsets[..., 0]
    expected = np.all(side > 0, axis=0) | np.all(side < 0, axis=0)
    clear = distance_to_edges(polygon) > NEAR_EDGE
    np.testing.assert_array_equal(fill(polygon)[clear], expected[clear])


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_any_polygon_agrees_with_matplotlib(seed: int):
    polygon = random_star(np.random.default_rng(seed))
    expected = Outline(np.vstack([polygon, polygon[:1]])).contains_points(CENTRES.reshape(-1, 2)).reshape(SHAPE)
    clear = distance_to_edges(polygon) > NEAR_EDGE
    np.testing.assert_array_equal(fill(polygon)[clear], expected[clear])


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_centres_on_edges_follow_the_rule_of_exact_fractions(seed: int):
    rng = np.random.default_rng(seed)
    polygon = [tuple(map(int, point)) for point in rng.integers(-4, 26, (rng.integers(3, 9), 2))]
    expected = np.zeros(SHAPE, bool)
    for (i0, j0), (i1, j1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        for j in range(max(0, min(j0, j1)), min(SHAPE[1], max(j0, j1))):
            crossing = i0 + Fraction((j - j0) * (i1 - i0), j1 - j0)
            expected[[i for i in range(SHAPE[0]) if i >= crossing], j] ^= True
    np.testing.assert_array_equal(fill(np.array(polygon)), expected)


def test_a_crossing_that_floats_put_behind_a_centre_is_on_it():
    # 7 rows down an edge of 58 / 14 lies -14 + 29 = 15, which float64 makes 15 and a bit more.
    assert -14 + 7 * (58 / 14) > 15
    assert fill(np.array([(-14, 0), (44, 14), (60, 14), (60, 0)]))[15, 7]


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_direction_and_first_point_do_not_matter(seed: int):
    rng = np.random.default_rng(seed)
    # Quarter voxels put many vertices and edges exactly on centres.
    polygon = np.round(random_star(rng) * 4) / 4
    expected = fill(polygon)
    np.testing.assert_array_equal(fill(polygon[::-1]), expected)
    np.testing.assert_array_equal(fill(np.roll(polygon, int(rng.integers(0, 9)), axis=0)), expected)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_noise_of_an_affine_does_not_decide_on_centres_on_an_edge(seed: int):
    rng = np.random.default_rng(seed)
    polygon = np.round(random_star(rng))
    noise = rng.uniform(-1e-9, 1e-9, polygon.shape)
    np.testing.assert_array_equal(fill(polygon + noise), fill(polygon))


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_shapes_that_share_an_edge_share_no_voxel_and_miss_none(seed: int):
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(np.arange(2, 44), 6, replace=False)) / 4
    border = np.stack([np.round(rng.uniform(4, 15, 8) * 2) / 2, [1, *rows, 12]], axis=1)
    left = np.vstack([border, [(1, 12), (1, 1)]])
    right = np.vstack([border, [(19, 12), (19, 1)]])
    whole = fill(rectangle(1, 1, 19, 12))
    assert whole.sum() == 18 * 11
    np.testing.assert_array_equal(fill(left) ^ fill(right), whole)
    np.testing.assert_array_equal(fill(left) | fill(right), whole)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_what_lies_beyond_the_image_is_cut_and_changes_nothing_within(seed: int):
    polygon = random_star(np.random.default_rng(seed))
    margin = 40
    large = fill(polygon + margin, shape=(SHAPE[0] + 2 * margin, SHAPE[1] + 2 * margin))
    np.testing.assert_array_equal(fill(polygon), large[margin:-margin, margin:-margin])


def test_a_contour_within_another_is_a_hole_and_one_within_the_hole_an_island():
    expected = np.zeros(SHAPE, bool)
    expected[2:15, 2:14] = True
    expected[4:12, 4:12] = False
    expected[6:9, 6:9] = True
    nested = [rectangle(1.5, 1.5, 14.5, 13.5), rectangle(3.5, 3.5, 11.5, 11.5), rectangle(5.5, 5.5, 8.5, 8.5)]
    np.testing.assert_array_equal(fill(*nested), expected)
    np.testing.assert_array_equal(fill(nested[2], nested[0], nested[1][::-1]), expected)


def test_disjoint_contours_are_both_there_and_what_two_share_is_excluded():
    a, b, c = rectangle(0.5, 0.5, 5.5, 5.5), rectangle(8.5, 2.5, 12.5, 9.5), rectangle(3.5, 3.5, 7.5, 7.5)
    np.testing.assert_array_equal(fill(a, b), fill(a) | fill(b))
    np.testing.assert_array_equal(fill(a, c), fill(a) ^ fill(c))
    assert (fill(a) & fill(c)).any()


def test_a_keyhole_is_a_hole_and_its_channel_leaves_no_trace():
    outer, inner = rectangle(1.5, 1.5, 14.5, 13.5), rectangle(4.25, 3.5, 11.5, 11.5)
    # From the first corner of the outer to that of the inner, around it the other way, and back.
    keyhole = np.vstack([outer, outer[:1], inner[:1], inner[::-1]])
    np.testing.assert_array_equal(fill(keyhole), fill(outer, inner))
    assert fill(outer, inner).sum() == 13 * 12 - 7 * 8


def test_a_centre_on_an_edge_is_inside_at_the_lower_end_only():
    expected = np.zeros(SHAPE, bool)
    expected[3:7, 5:8] = True
    np.testing.assert_array_equal(fill(rectangle(3, 5, 7, 8)), expected)


def test_slices_do_not_touch_each_other():
    a, b, c = rectangle(1.5, 1.5, 6.5, 6.5), rectangle(2.5, 0.5, 9.5, 3.5), rectangle(0.5, 0.5, 20.5, 8.5)
    mask = fill_contours(contours_of(a, b, c, slices=[3, 1, 3]), (*SHAPE, 5))
    np.testing.assert_array_equal(mask[..., 3], fill(a, c))
    np.testing.assert_array_equal(mask[..., 1], fill(b))
    assert mask.any(axis=(0, 1)).tolist() == [False, True, False, True, False]


def test_hundreds_of_contours_at_one_place_keep_their_parity():
    square = rectangle(2.5, 2.5, 8.5, 8.5)
    assert not fill(*[square] * 256).any()
    np.testing.assert_array_equal(fill(*[square] * 257), fill(square))


def test_a_contour_that_covers_the_image_fills_it_and_one_beside_it_nothing():
    assert fill(rectangle(-1e6, -1e6, 1e6, 1e6)).all()
    assert not fill(rectangle(30, 2, 40, 9)).any()
    assert not fill(rectangle(-9, 2, -1, 9)).any()
    assert not fill(rectangle(2, 20, 9, 40)).any()


def test_points_on_a_line_enclose_nothing():
    assert not fill(np.array([(2.0, 3), (9, 8), (16, 13)])).any()
    assert not fill(np.array([(2.0, 3), (9, 3), (4, 3)])).any()
