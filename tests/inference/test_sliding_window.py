from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.inference.sliding_window import sliding_window_scores
from pipeline.inference.windows import SlidingWindow, gaussian_weights, window_starts
from pipeline.networks.unet import UNet

torch.set_num_threads(1)

sizes = st.tuples(*[st.integers(1, 14)] * 3)
overlaps = st.floats(0, 0.9)
axes = st.sets(st.integers(0, 2)).map(sorted)


def random_image(channels: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn((channels, *shape), generator=torch.Generator().manual_seed(seed))


def small_network(in_channels: int = 2, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(in_channels, 5, 3, padding=1), nn.GELU(), nn.Conv3d(5, num_classes, 3, padding=1)
    ).eval()


@settings(max_examples=60, deadline=None)
@given(shape=sizes, window=sizes, overlap=overlaps, tta_axes=axes, window_batch=st.integers(1, 4))
def test_an_identity_network_gives_back_the_image_bit_by_bit(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, tta_axes: list[int], window_batch: int
) -> None:
    image = random_image(2, shape)
    scores = sliding_window_scores(
        lambda x: x,
        image,
        window=window,
        num_classes=2,
        overlap=overlap,
        tta_axes=tta_axes,
        window_batch=window_batch,
    )
    assert torch.equal(scores, image)


@settings(max_examples=30, deadline=None)
@given(shape=sizes, window=sizes, overlap=overlaps, tta_axes=axes, value=st.floats(-1e6, 1e6, width=32))
def test_a_constant_network_gives_exactly_its_constant(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, tta_axes: list[int], value: float
) -> None:
    scores = sliding_window_scores(
        lambda x: torch.full((len(x), 3, *x.shape[2:]), value),
        random_image(1, shape),
        window=window,
        num_classes=3,
        overlap=overlap,
        tta_axes=tta_axes,
    )
    assert scores.shape == (3, *shape)
    assert (scores == value).all()


@pytest.mark.parametrize("shape", [(20, 16, 24), (5, 16, 24), (7, 3, 11), (8, 8, 12)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_scores_equal_monai_where_both_place_the_same_windows(shape: tuple[int, int, int], overlap: float) -> None:
    # MONAI moves by a fixed step; these shapes hold a whole number of steps, where even spreading is the same.
    image, window, network = random_image(2, shape), (8, 8, 12), small_network()
    if overlap == 0:
        shape = (24 if shape[0] > 8 else shape[0], shape[1], shape[2])
        image = random_image(2, shape)
    ours = sliding_window_scores(network, image, window=window, num_classes=3, overlap=overlap)
    with torch.inference_mode():
        theirs = sliding_window_inference(image[None], window, 2, network, overlap=overlap, mode="gaussian")[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_scores_equal_a_plain_float64_sum_over_windows() -> None:
    shape, window = (17, 9, 13), (8, 6, 10)
    image, network = random_image(2, shape), small_network()
    ours = sliding_window_scores(network, image, window=window, num_classes=3, overlap=0.6)
    total, weight = np.zeros((3, *shape)), np.zeros(shape)
    gaussian = gaussian_weights(window).double().numpy()
    sliding = SlidingWindow(window=window, num_classes=3, overlap=0.6)
    everything = tuple(slice(0, size) for size in shape)
    for place in [place for places, _ in sliding.sweep(shape, 0, everything) for place in places]:
        with torch.inference_mode():
            scores = network(image[(slice(None), *place)][None])[0].double().numpy()
        total[(slice(None), *place)] += scores * gaussian
        weight[place] += gaussian
    np.testing.assert_allclose(ours.numpy(), total / weight, rtol=1e-5, atol=1e-6)


def test_mirroring_averages_the_logits_of_all_mirrored_images() -> None:
    image, network = random_image(2, (6, 9, 7)), small_network()
    ours = sliding_window_scores(network, image, window=(6, 9, 7), num_classes=3, tta_axes=(2, 0))
    flips = [[axis for axis, used in zip((1, 3), chosen, strict=True) if used] for chosen in product((0, 1), repeat=2)]
    with torch.inference_mode():
        expected = torch.stack([network(image.flip(flip)[None])[0].flip(flip) for flip in flips]).mean(0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    plain = sliding_window_scores(network, image, window=(6, 9, 7), num_classes=3)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_the_batch_of_windows_does_not_change_the_scores() -> None:
    image, network = random_image(2, (15, 11, 9)), small_network()
    one, seven = (
        sliding_window_scores(network, image, window=(6, 6, 4), num_classes=3, window_batch=size) for size in (1, 7)
    )
    torch.testing.assert_close(one, seven, rtol=1e-5, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 300), window=st.integers(1, 300), overlap=st.floats(0, 0.99))
def test_windows_cover_the_axis_evenly_with_at_least_the_overlap(size: int, window: int, overlap: float) -> None:
    size = max(size, window)
    starts = window_starts(size, window, overlap=overlap)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] + window == size
    assert all(1 <= step <= max(1, window * (1 - overlap) + 1e-4) for step in steps)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1


@pytest.mark.parametrize("window", [(8, 8, 12), (1, 7, 30), (64, 5, 40)])
def test_weights_equal_monai_and_never_vanish(window: tuple[int, int, int]) -> None:
    ours = gaussian_weights(window)
    theirs = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(ours, theirs)
    assert ours.min() >= 1e-3
    for axis in range(3):
        torch.testing.assert_close(ours, ours.flip(axis))


def test_the_callers_autocast_reaches_the_network_and_scores_stay_float32() -> None:
    seen = []
    network = small_network()

    def watched(x: Tensor) -> Tensor:
        out = network(x)
        seen.append(out.dtype)
        return out

    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sliding_window_scores(watched, random_image(2, (9, 8, 7)), window=(6, 6, 6), num_classes=3)
    assert set(seen) == {torch.bfloat16}
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, "overlap: must be from 0 to below 1"),
        ({"overlap": -0.1}, "overlap: must be from 0 to below 1"),
        ({"tta_axes": (3,)}, "tta_axes: only the axes 0, 1 and 2"),
        ({"num_classes": 4}, "gives 1 x 2 x 4 x 4 x 4"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, object], message: str) -> None:
    arguments = {"window": (4, 4, 4), "num_classes": 2, **options}
    run: Callable[..., Tensor] = sliding_window_scores
    with pytest.raises(InputError, match=message) as caught:
        run(lambda x: x, random_image(2, (5, 6, 7)), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tta_axes", [(), (0,), (2, 0, 1)])
def test_logits_taken_by_rows_blend_as_those_of_whole_windows_do(
    make_network: Callable[..., UNet], tta_axes: tuple[int, ...]
) -> None:
    network = make_network(2, 3, slab_stages=1)
    image = random_image(2, (11, 9, 6))
    options: dict[str, Any] = {"window": (8, 6, 4), "num_classes": 3, "tta_axes": tta_axes}
    by_rows = sliding_window_scores(network, image, **options)
    whole = sliding_window_scores(lambda batch: network(batch), image, **options)
    torch.testing.assert_close(by_rows, whole, rtol=1e-5, atol=1e-5)
