from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.evaluation.surfaces import directed_distances, element_areas, find_surface

SPACING = (1.1, 0.7, 3.3)


def test_areas_of_all_256_neighbourhoods_equal_surface_distance() -> None:
    tables = pytest.importorskip("surface_distance.lookup_tables")
    theirs = tables.create_table_neighbour_code_to_surface_area(SPACING)
    kernel = tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    inside = [np.array([code >> bit & 1 for bit in range(8)]).reshape(2, 2, 2) for code in range(256)]
    expected = [theirs[int((kernel * cube).sum())] for cube in inside]
    np.testing.assert_allclose(element_areas(SPACING), expected, atol=1e-12)


def test_a_box_has_its_faces_edges_and_corners_as_area() -> None:
    mask = np.zeros((9, 8, 7), bool)
    mask[2:6, 3:5, 1:6] = True
    a, b, c = SPACING
    n = np.array([4, 2, 5])
    faces = np.array([b * c, a * c, a * b])
    across = [np.prod(np.delete(n - 1, axis)) for axis in range(3)]
    # A bevel has half the diagonal of what it cuts off; each corner is one triangle.
    bevels = [np.linalg.norm(np.delete(faces, axis)) / 2 for axis in range(3)]
    expected = 2 * (faces @ across) + 4 * (np.array(bevels) @ (n - 1)) + 8 * np.linalg.norm(faces) / 8
    assert find_surface(mask, SPACING).areas.sum() == pytest.approx(expected)


def test_inside_and_outside_share_their_surface() -> None:
    rng = np.random.default_rng(0)
    mask = np.pad(rng.random((6, 7, 5)) > 0.5, 1)
    outside = np.pad(~mask, 1, constant_values=True)
    own = find_surface(mask, SPACING).areas.sum()
    shell = find_surface(np.ones_like(outside), SPACING).areas.sum()
    assert find_surface(outside, SPACING).areas.sum() == pytest.approx(own + shell)


def test_a_mask_at_the_border_of_the_array_is_closed() -> None:
    mask = np.ones((3, 4, 5), bool)
    inner, padded = find_surface(mask, SPACING), find_surface(np.pad(mask, 3), SPACING)
    assert inner.areas.sum() == pytest.approx(padded.areas.sum())
    np.testing.assert_allclose(inner.points + 3 * np.array(SPACING), padded.points)


def test_distances_equal_a_distance_transform() -> None:
    rng = np.random.default_rng(1)
    first, second = (ndimage.gaussian_filter(rng.standard_normal((14, 11, 9)), 1.5) > 0.05 for _ in range(2))
    start, end = find_surface(first, SPACING), find_surface(second, SPACING)
    grid = np.ones((15, 12, 10), bool)
    grid[tuple(np.rint(end.points / SPACING).astype(int).T)] = False
    expected = ndimage.distance_transform_edt(grid, sampling=SPACING)
    at = tuple(np.rint(start.points / SPACING).astype(int).T)
    np.testing.assert_allclose(directed_distances(start, end), expected[at], atol=1e-9)


def test_an_empty_mask_has_no_surface() -> None:
    assert find_surface(np.zeros((3, 4, 5), bool), SPACING).is_empty
    assert not find_surface(np.ones((1, 1, 1), bool), SPACING).is_empty
