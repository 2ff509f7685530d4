"""Several networks as one: the mean of their softmax probabilities, against whole volumes in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from pipeline.geometry import Grid
from pipeline.inference import prediction_bytes
from pipeline.inference.ensemble import Ensemble, Member
from pipeline.inference.native_scores import reduce_blocks
from pipeline.inference.planes import NotFiniteError
from pipeline.inference.prediction_memory import PredictionMemory, plan_sweeps
from pipeline.inference.sliding_window import sliding_window_scores
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.preprocessing.preprocess import PreparedImage
from pipeline.preprocessing.resample import resample_scores
from pipeline.preprocessing.restore import NativeScores, ScoreReducer
from pipeline.preprocessing.score_resampling import ScoreResampling

shapes = st.tuples(*[st.integers(2, 14)] * 3)
windows = st.sampled_from([(6, 4, 5), (3, 7, 4), (8, 8, 8), (4, 4, 12)])
axes = st.sets(st.integers(0, 2)).map(lambda found: tuple(sorted(found)))
members = st.lists(st.tuples(st.integers(0, 9), windows, axes), min_size=2, max_size=4)


class Ramp(nn.Module):
    """Scores of a voxel that depend on its place in the window, on mirroring and on the network's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, self.number / 4, x.shape[4]) + torch.linspace(0, 2, x.shape[2])[:, None, None]
        return torch.cat([x * self.number + ramp, x.sin() * ramp, 0.3 * self.number - x], dim=1)


def image_of(shape: tuple[int, int, int], channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)


def prepare(shape: tuple[int, int, int], native: tuple[int, int, int], channels: int = 1) -> PreparedImage:
    affine = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])
    i, j, k = (size + margin for size, margin in zip(native, (3, 0, 4), strict=True))
    return PreparedImage(image_of(shape, channels), Grid((i, j, k), affine), (2, 0, 1), native, Grid(shape, affine))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=0))
    return powers / powers.sum(axis=0)


def whole_probabilities(
    networks: list[Member], image: np.ndarray, num_classes: int, *, apart: bool = False
) -> list[np.ndarray]:
    """Of every network, or of every mirrored pass, in float64 of whole volumes."""
    found = []
    for member in networks:
        options = {"window": member.window, "num_classes": num_classes}
        for passes in [[axis for axis in member.tta_axes]] if not apart else flips(member.tta_axes):
            if apart:
                dims = [axis + 1 for axis in passes]

                def mirrored(x: Tensor, network=member.network, dims=dims) -> Tensor:
                    return network(x.flip([dim + 1 for dim in dims])).flip([dim + 1 for dim in dims])

                scores = sliding_window_scores(mirrored, torch.from_numpy(image), **options)
            else:
                scores = sliding_window_scores(member.network, torch.from_numpy(image), tta_axes=passes, **options)
            found.append(softmax(scores.double().numpy()))
    return found


def flips(chosen: tuple[int, ...]) -> list[list[int]]:
    return [[axis for bit, axis in enumerate(chosen) if number >> bit & 1] for number in range(2 ** len(chosen))]


def reduce(
    prepared: PreparedImage, plan: Plan, ensemble: Ensemble, *, share: float = 1.0
) -> tuple[np.ndarray, PredictionMemory]:
    """All scores on the native grid, in as many blocks as a share of the means takes."""
    native = NativeScores.of(prepared, plan, num_scores=ensemble.num_scores)
    memory = plan_sweeps(native.resampling, ensemble.sweeps())
    if share < 1:
        bound = memory.num_bytes - int((1 - share) * memory.parts["means"])
        memory = plan_sweeps(native.resampling, ensemble.sweeps(), max_bytes=bound)
    reducer = ScoreReducer(prepared.native_grid.shape, ensemble.num_scores)
    with torch.inference_mode():
        reduce_blocks(ensemble.stream(torch.from_numpy(prepared.array), memory), native, memory, [reducer])
    return reducer.scores, memory


def on_native(values: np.ndarray, prepared: PreparedImage, anisotropic_axis: int | None) -> np.ndarray:
    result = np.zeros((len(values), *prepared.native_grid.shape), np.float32)
    i, j, k = (slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    result[:, i, j, k] = resample_scores(
        values.astype(np.float32), prepared.crop_shape, anisotropic_axis=anisotropic_axis
    )
    return result


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    native=shapes,
    chosen=members,
    anisotropic_axis=st.one_of(st.none(), st.integers(0, 2)),
    share=st.sampled_from([1, 0.5, 0.1]),
    slab_bytes=st.sampled_from([1, 3000, 1 << 20]),
    chunk_bytes=st.sampled_from([1, 2000, 1 << 20]),
    with_variance=st.booleans(),
)
def test_streamed_probabilities_are_the_mean_of_whole_softmax_volumes(
    make_plan: Callable[..., Plan],
    shape: tuple[int, int, int],
    native: tuple[int, int, int],
    chosen: list[tuple[int, tuple[int, int, int], tuple[int, ...]]],
    anisotropic_axis: int | None,
    share: float,
    slab_bytes: int,
    chunk_bytes: int,
    with_variance: bool,
) -> None:
    networks = [Member(Ramp(number), window, axes) for number, window, axes in chosen]
    plan, prepared = make_plan(anisotropic_axis=anisotropic_axis), prepare(shape, native)
    ensemble = Ensemble(networks, SlidingWindow(window=(6, 4, 5), num_classes=3), with_variance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_bytes, "SLAB_BYTES", slab_bytes)
        patch.setattr(prediction_bytes, "CHUNK_BYTES", chunk_bytes)
        found, _ = reduce(prepared, plan, ensemble, share=share)
    expected = np.mean(whole_probabilities(networks, prepared.array, 3), axis=0)
    np.testing.assert_allclose(found[:3], on_native(expected, prepared, anisotropic_axis), atol=2e-6)
    if with_variance:
        apart = np.stack(whole_probabilities(networks, prepared.array, 3, apart=True))
        variance = apart.var(axis=0).mean(axis=0)
        np.testing.assert_allclose(found[3:], on_native(variance[None], prepared, anisotropic_axis), atol=2e-6)


def test_networks_that_gather_features_and_scores_are_combined_as_monai_s_sliding_window_is(
    make_plan: Callable[..., Plan], make_network: Callable[..., UNet]
) -> None:
    # Sizes at which both spread windows alike.
    prepared = prepare((20, 12, 16), (20, 12, 16))
    networks = [
        Member(make_network(1, 6, features=features, seed=seed), (8, 8, 8)) for seed, features in enumerate((4, 8, 4))
    ]
    plan = make_plan(labels={f"class_{value}": value for value in range(6)})
    found, memory = reduce(prepared, plan, Ensemble(networks, SlidingWindow(window=(8, 8, 8), num_classes=6)))
    assert memory.of_features
    image = torch.from_numpy(prepared.array)[None]
    with torch.inference_mode():
        whole = [
            sliding_window_inference(
                image, (8, 8, 8), 1, member.network, overlap=0.5, mode="gaussian", sigma_scale=0.125
            )
            for member in networks
        ]
    i, j, k = (slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    expected = np.mean([softmax(scores[0].double().numpy()) for scores in whole], axis=0)
    np.testing.assert_allclose(found[:, i, j, k], expected, atol=1e-5)


def test_probabilities_add_up_to_one_and_no_network_s_scale_outweighs_another(make_plan: Callable[..., Plan]) -> None:
    class Sure(nn.Module):
        def __init__(self, index: int, scale: float) -> None:
            super().__init__()
            self.index, self.scale = index, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * torch.eye(3)[self.index][None, :, None, None, None].expand(1, -1, *x.shape[2:])

    prepared = prepare((7, 9, 8), (7, 9, 8))
    networks = [Member(Sure(index, scale), (4, 4, 4)) for index, scale in ((0, 1e4), (1, 40), (1, 40))]
    found, _ = reduce(prepared, make_plan(), Ensemble(networks, SlidingWindow(window=(4, 4, 4), num_classes=3)))
    np.testing.assert_allclose(found[:, 2:9, :9, 1:9].sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(found[:, 4, 4, 4], [1 / 3, 2 / 3, 0], atol=1e-6)


def test_a_value_that_is_not_finite_in_any_network_ends_the_stream(make_plan: Callable[..., Plan]) -> None:
    class Broken(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("inf")

    networks = [Member(Ramp(1), (6, 4, 5)), Member(Broken(2), (6, 4, 5))]
    ensemble = Ensemble(networks, SlidingWindow(window=(6, 4, 5), num_classes=3))
    with pytest.raises(NotFiniteError):
        reduce(prepare((9, 8, 7), (9, 8, 7)), make_plan(), ensemble)


# ---- memory


def ensemble_of(count: int, num_classes: int = 118, **options: object) -> Ensemble:
    networks = [Member(nn.Identity(), (128, 128, 128)) for _ in range(count)]
    return Ensemble(networks, SlidingWindow(window=(128, 128, 128), num_classes=num_classes), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("gib", [6, 12, 48])
def test_the_planes_of_all_networks_count_towards_the_bound(count: int, gib: int) -> None:
    resampling = ScoreResampling((512, 512, 400), (512, 512, 200))
    one, several = (plan_sweeps(resampling, ensemble_of(number).sweeps()) for number in (1, count))
    assert several.parts["means"] == count * one.parts["means"]
    assert several.parts["window"] == one.parts["window"]
    assert several.num_windows == count * one.num_windows
    bounded = plan_sweeps(resampling, ensemble_of(count).sweeps(), max_bytes=gib << 30)
    assert bounded.num_bytes <= gib << 30
    assert f"of {count} sweeps side by side" in bounded.describe()


@pytest.mark.parametrize("length", [11, 30])
def test_planes_come_in_order_and_the_kept_ones_again(length: int) -> None:
    networks = [Member(Ramp(1), (6, 6, 6)), Member(Ramp(2), (10, 6, 6)), Member(Ramp(3), (4, 6, 6))]
    ensemble = Ensemble(networks, SlidingWindow(window=(6, 6, 6), num_classes=3))
    memory = plan_sweeps(ScoreResampling((length, 7, 7), (2 * length, 7, 7)), ensemble.sweeps())
    assert memory.keep == 1
    image, done = torch.from_numpy(image_of((length, 7, 7))), 0
    whole = torch.zeros(3, length, 7, 7)
    for merged in ensemble.stream(image, memory)(memory.blocks[0]):
        assert merged.start == max(0, done - 1) < done + 1 <= merged.stop
        found = merged.take(slice(0, 3))
        if done:
            torch.testing.assert_close(found[:, :1], whole[:, done - 1 : done])
        whole[:, merged.start : merged.stop] = found
        done = merged.stop
    assert done == length


def test_a_variance_gathers_every_mirrored_pass_by_itself() -> None:
    networks = [Member(nn.Identity(), (16, 16, 16), (0, 2)), Member(nn.Identity(), (16, 16, 16))]
    sliding = SlidingWindow(window=(16, 16, 16), num_classes=3)
    assert len(Ensemble(networks, sliding).sweeps()) == 2
    assert [sweep.sliding.mirrored for sweep in Ensemble(networks, sliding, True).sweeps()] == [
        (), (0,), (2,), (0, 2), (),
    ]  # fmt: skip


def test_no_more_planes_are_held_than_one_window_of_each_network_has() -> None:
    networks = [Member(Ramp(1), (6, 6, 6)), Member(Ramp(2), (9, 6, 6))]
    ensemble = Ensemble(networks, SlidingWindow(window=(6, 6, 6), num_classes=3))
    for length in (20, 200):
        resampling = ScoreResampling((length, 7, 7), (length, 7, 7))
        memory = plan_sweeps(resampling, ensemble.sweeps())
        with torch.inference_mode():
            for merged in ensemble.stream(torch.from_numpy(image_of((length, 7, 7))), memory)(memory.blocks[0]):
                held = [planes.means.untyped_storage().nbytes() for passes in merged.passes for planes in passes]
                assert held == [3 * 6 * 49 * 4, 3 * 9 * 49 * 4]
