from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.geometry import Shape3
from pipeline.sampling import spatial
from pipeline.sampling.spatial import box_around, cut, middle, mirror, resample, sampling_matrix
from pipeline.store import PatchLocation

SIZE: Shape3 = (12, 17, 10)
ANGLES = st.tuples(*[st.floats(-0.5, 0.5)] * 3)
ZOOMS = st.floats(0.7, 1.4)


def coordinate_maps(shape: Shape3) -> torch.Tensor:
    """An image (3, I, J, K) whose channels are i, j and k: linear interpolation reproduces them exactly."""
    return torch.from_numpy(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32))


def random_label(shape: Shape3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, 118, shape).astype(np.int16))


def homogeneous(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.eye(4)
    result[:3, :3] = matrix
    return result


def away_from_ties(matrix: NDArray[np.float64], centre: NDArray[np.float64]) -> torch.Tensor:
    """Where (*SIZE) the nearest voxel is beyond doubt: in float64, no coordinate lies half-way between two."""
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SIZE], indexing="ij"))
    places = np.tensordot(matrix, offsets, 1) + centre.reshape(3, 1, 1, 1)
    return torch.from_numpy((np.abs(places - np.floor(places) - 0.5) > 1e-3).all(axis=0))


@pytest.mark.parametrize(
    ("rotation", "zoom"), [((0.3, -0.2, 0.5), 1.3), ((0.0, 0.4, 0.0), 0.71), ((-0.5, 0.1, 0.2), 1)]
)
def test_resampling_equals_monai_affine_with_the_same_matrix(rotation: tuple[float, ...], zoom: float) -> None:
    from monai.transforms import Affine

    shape = (21, 26, 19)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    label = random_label(shape)
    matrix = sampling_matrix(rotation, zoom)  # type: ignore[arg-type]
    ours, our_label = resample(image, label, matrix, centre=middle(shape), size=SIZE)
    options = {"affine": homogeneous(matrix), "spatial_size": SIZE, "padding_mode": "zeros", "image_only": True}
    theirs = Affine(mode="bilinear", **options)(image)
    their_label = Affine(mode="nearest", **options)(label[None].float())[0]
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=2e-4, rtol=0)
    clear = away_from_ties(matrix, np.array(middle(shape)))
    assert clear.float().mean() > 0.9
    assert torch.equal(our_label.float()[clear], torch.as_tensor(their_label)[clear])


@given(rotation=ANGLES, zoom=ZOOMS)
@settings(max_examples=25, deadline=None)
def test_labels_come_from_the_voxel_that_the_image_was_sampled_at(
    rotation: tuple[float, float, float], zoom: float
) -> None:
    shape = (40, 44, 40)
    maps, label = coordinate_maps(shape), random_label(shape)
    matrix = sampling_matrix(rotation, zoom, spacing=(1.0, 0.8, 1.3))
    places, picked = resample(maps, label, matrix, centre=middle(shape), size=SIZE)
    nearest = places.round()
    clear = ((places - places.floor() - 0.5).abs() > 1e-3).all(dim=0)
    inside = ((places > 0.01) & (places < torch.tensor(shape)[:, None, None, None] - 1.01)).all(dim=0)
    i, j, k = (axis[clear & inside].long() for axis in nearest)
    assert len(i) > 0.5 * label[: SIZE[0], : SIZE[1], : SIZE[2]].numel()
    assert torch.equal(label[i, j, k], picked[clear & inside])


@given(
    rotation=ANGLES,
    zoom=ZOOMS,
    start=st.tuples(*[st.integers(-6, 22)] * 3),
    spacing=st.tuples(*[st.floats(0.7, 1.4)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_the_box_holds_all_that_resampling_needs(
    rotation: tuple[float, float, float], zoom: float, start: Shape3, spacing: tuple[float, float, float]
) -> None:
    shape = (30, 34, 28)
    location = PatchLocation(start, SIZE)
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    label = random_label(shape)
    matrix = sampling_matrix(rotation, zoom, spacing=spacing)
    box, centre = box_around(location, matrix, shape)
    part = tuple(slice(s, s + n) for s, n in zip(box.start, box.size, strict=True))
    got = resample(image[(slice(None), *part)], label[part], matrix, centre=centre, size=SIZE)
    whole_centre = tuple(s + (n - 1) / 2 for s, n in zip(start, SIZE, strict=True))
    want = resample(image, label, matrix, centre=whole_centre, size=SIZE)  # type: ignore[arg-type]
    torch.testing.assert_close(got[0], want[0], atol=2e-4, rtol=0)
    clear = away_from_ties(matrix, np.array(whole_centre))
    assert torch.equal(got[1][clear], want[1][clear])


def test_the_box_stays_inside_the_volume_and_shrinks_when_zoomed_in() -> None:
    whole = PatchLocation((0, 0, 0), (30, 34, 28))
    box, _ = box_around(whole, sampling_matrix((0.5, 0.5, 0.5), 0.7), (30, 34, 28))
    assert box == whole
    inner, _ = box_around(PatchLocation((5, 5, 5), (20, 20, 16)), sampling_matrix((0, 0, 0), 1.4), (30, 34, 28))
    assert all(n <= 16 for n in inner.size)


def test_without_rotation_and_zoom_resampling_is_cutting() -> None:
    shape = (20, 22, 15)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    label = random_label(shape)
    matrix = sampling_matrix((0.0, 0.0, 0.0), 1.0)
    centre = (7.5, 9.0, 6.5)
    moved = resample(image, label, matrix, centre=centre, size=SIZE)
    torch.testing.assert_close(moved[0], cut(image, centre, SIZE), atol=1e-4, rtol=0)
    assert torch.equal(moved[1], cut(label, centre, SIZE))


def test_a_cut_that_leaves_the_box_is_padded_with_zeros() -> None:
    box = torch.arange(1, 2 * 3 * 4 + 1).view(2, 3, 4)
    got = cut(box, (0.5, 0.0, 3.0), (4, 1, 3))
    expected = torch.zeros(4, 1, 3, dtype=box.dtype)
    expected[1:3, 0, :2] = box[:, 0, 2:]
    assert torch.equal(got, expected)


def test_rotation_is_rigid_in_millimetres() -> None:
    spacing = np.array([0.5, 0.9, 2.0])
    matrix = sampling_matrix((0.3, -0.4, 0.2), 1.0, spacing=tuple(spacing))  # type: ignore[arg-type]
    millimetres = np.diag(spacing) @ matrix @ np.diag(1 / spacing)
    np.testing.assert_allclose(millimetres @ millimetres.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(millimetres) == pytest.approx(1)


def test_zooming_in_samples_a_smaller_region_and_leaves_the_kept_axis_alone() -> None:
    matrix = sampling_matrix((0.0, 0.0, 0.4), 1.25, kept_axis=2)
    assert np.linalg.det(matrix) == pytest.approx(1 / 1.25**2)
    np.testing.assert_array_equal(matrix[2], [0, 0, 1])
    np.testing.assert_array_equal(matrix[:, 2], [0, 0, 1])


def test_slabs_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (20, 25, 18)
    image, label = torch.randn(2, *shape), random_label(shape)
    arguments = (image, label, sampling_matrix((0.2, 0.3, -0.1), 0.9))
    whole = resample(*arguments, centre=middle(shape), size=SIZE)
    monkeypatch.setattr(spatial, "_VOXELS_PER_SLAB", 5 * SIZE[1] * SIZE[2])
    slabs = resample(*arguments, centre=middle(shape), size=SIZE)
    assert torch.equal(whole[0], slabs[0])
    assert torch.equal(whole[1], slabs[1])


def test_mirroring_equals_monai_flip() -> None:
    from monai.transforms import Flip

    image = torch.randn(2, *SIZE)
    theirs = torch.as_tensor(Flip((0, 2))(image))
    assert torch.equal(mirror(image, (True, False, True)), theirs)
    assert mirror(image, (False, False, False)) is image
