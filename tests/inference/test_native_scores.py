"""The way from windows to the native grid, in blocks and slabs, against the whole volume at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.geometry import Grid
from pipeline.inference import prediction_bytes
from pipeline.inference.native_scores import reduce_blocks, stream_block
from pipeline.inference.planes import NotFiniteError
from pipeline.inference.prediction_memory import PredictionMemory, plan_prediction_memory
from pipeline.inference.sliding_window import sliding_window_scores
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan, Plan
from pipeline.preprocessing.preprocess import PreparedImage
from pipeline.preprocessing.resample import resample_scores
from pipeline.preprocessing.restore import LabelReducer, NativeScores, Reducer, ScoreReducer, restore_label
from pipeline.preprocessing.score_resampling import ScoreResampling

shapes = st.tuples(*[st.integers(2, 14)] * 3)


def scores_of(x: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1, x.shape[4]) + torch.linspace(0, 2, x.shape[2])[:, None, None]
    return torch.cat([x * 2 + ramp, x.sin() * ramp, 0.3 - x], dim=1)


def prepare(shape: tuple[int, int, int], native: tuple[int, int, int]) -> PreparedImage:
    """An image whose grid has `shape`, made from a box of `native` voxels with a margin that was cropped."""
    affine = np.array([[1.0, 0.2, 0.0, -8.0], [-0.2, 1.0, 0.1, 3.0], [0.0, -0.1, 1.5, 11.0], [0, 0, 0, 1]])
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    i, j, k = (size + margin for size, margin in zip(native, (3, 0, 4), strict=True))
    return PreparedImage(image, Grid((i, j, k), affine), (2, 0, 1), native, Grid(shape, affine))


def reduce(prepared: PreparedImage, plan: Plan, sliding: SlidingWindow, reducers: list[Reducer], *, share: float = 1):
    """Predict in as many blocks as it takes to gather no more than a share of what one block gathers."""
    native = NativeScores.of(prepared, plan)
    memory = plan_prediction_memory(native.resampling, sliding)
    if share < 1:
        bound = memory.num_bytes - int((1 - share) * memory.parts["means"])
        memory = plan_prediction_memory(native.resampling, sliding, max_bytes=bound)
    stream = partial(stream_block, scores_of, torch.from_numpy(prepared.array), sliding, memory)
    reduce_blocks(stream, native, memory, reducers)
    return memory


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    native=shapes,
    anisotropic_axis=st.one_of(st.none(), st.integers(0, 2)),
    share=st.sampled_from([1, 0.6, 0.3, 0.05]),
    slab_bytes=st.sampled_from([1, 3000, 1 << 20]),
    chunk_bytes=st.sampled_from([1, 2000, 1 << 20]),
)
def test_labels_and_scores_are_those_of_the_whole_volume_bit_by_bit(
    make_plan: Callable[..., Plan],
    shape: tuple[int, int, int],
    native: tuple[int, int, int],
    anisotropic_axis: int | None,
    share: float,
    slab_bytes: int,
    chunk_bytes: int,
) -> None:
    plan, prepared = make_plan(anisotropic_axis=anisotropic_axis), prepare(shape, native)
    sliding = SlidingWindow(window=(6, 4, 5), num_classes=3)
    labels, scores = LabelReducer(prepared.native_grid.shape, plan), ScoreReducer(prepared.native_grid.shape, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_bytes, "SLAB_BYTES", slab_bytes)
        patch.setattr(prediction_bytes, "CHUNK_BYTES", chunk_bytes)
        reduce(prepared, plan, sliding, [labels, scores], share=share)
    whole = sliding_window_scores(scores_of, torch.from_numpy(prepared.array), window=(6, 4, 5), num_classes=3).numpy()
    np.testing.assert_array_equal(labels.label, restore_label(whole, prepared, plan))
    box = tuple(slice(a, a + n) for a, n in zip(prepared.crop_start, native, strict=True))
    expected = np.zeros_like(scores.scores)
    expected[(slice(None), *box)] = resample_scores(whole, native, anisotropic_axis=anisotropic_axis)
    np.testing.assert_array_equal(scores.scores, expected)


def test_every_voxel_comes_once_with_all_classes_in_order(make_plan: Callable[..., Plan]) -> None:
    prepared = prepare((13, 21, 9), (17, 16, 14))

    class Counting:
        num_bytes = 0

        def __init__(self) -> None:
            self.count, self.open = np.zeros(prepared.native_grid.shape, int), None

        def add(self, box, first_class, scores) -> None:
            assert self.open in (None, (box, first_class))
            self.open = (box, first_class + len(scores))
            assert scores.shape[1:] == self.count[box].shape

        def close(self, box) -> None:
            assert self.open == (box, 3)
            self.count[box], self.open = self.count[box] + 1, None

    counting = Counting()
    memory = reduce(prepared, make_plan(), SlidingWindow(window=(6, 4, 5), num_classes=3), [counting], share=0.3)
    assert len(memory.blocks) > 1
    assert (counting.count[2:19, :16, 1:15] == 1).all()
    assert counting.count.sum() == 17 * 16 * 14


def test_a_value_that_is_not_finite_anywhere_ends_the_stream(make_plan: Callable[..., Plan]) -> None:
    prepared = prepare((13, 21, 9), (17, 16, 14))
    prepared.array[0, 12, 20, 8] = np.inf
    with pytest.raises(NotFiniteError):
        reduce(prepared, make_plan(), SlidingWindow(window=(6, 4, 5), num_classes=3), [ScoreReducer((20, 16, 18), 3)])


# ---- what a plan says of memory

TWO_STAGES = NetworkPlan(
    features_per_stage=(32, 64),
    strides=((1, 1, 1), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 2,
    num_blocks_per_stage=(1, 1),
)


def plan_of(shape: tuple[int, int, int], num_classes: int, **options: object) -> PredictionMemory:
    native = options.pop("native", shape)
    sliding = SlidingWindow(window=(128, 128, 128), num_classes=num_classes)
    return plan_prediction_memory(ScoreResampling(shape, native), sliding, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_features", [None, 32])
@pytest.mark.parametrize("num_classes", [1, 3, 30, 118, 200])
@pytest.mark.parametrize("gib", [3, 4, 8, 64])
def test_the_bound_is_kept_from_one_to_two_hundred_classes(
    num_classes: int, num_features: int | None, gib: float
) -> None:
    network = UNet(1, num_classes, TWO_STAGES) if num_features else None
    memory = plan_of((512, 512, 400), num_classes, network=network, max_bytes=int(gib * 2**30))
    if memory.parts["window"] < 0.8 * gib * 2**30:
        assert memory.num_bytes <= gib * 2**30
    assert memory.num_windows >= memory.fewest_windows == 7 * 7 * 6
    assert memory.of_features == (num_features is not None and num_features < num_classes)
    assert (len(memory.blocks) > 1) == (memory.num_windows > memory.fewest_windows)


def test_memory_does_not_grow_with_the_long_axis() -> None:
    short, long = (plan_of((200, 180, length), 118).num_bytes for length in (500, 5000))
    assert short == long


def test_a_larger_bound_never_takes_more_windows() -> None:
    counts = [
        plan_of((512, 512, 400), 118, native=(512, 512, 200), max_bytes=int(gib * 2**30)).num_windows
        for gib in (3, 4, 6, 9, 14, 30)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 7 * 7 * 6


def test_blocks_cover_the_native_grid_once() -> None:
    memory = plan_of((100, 90, 300), 118, native=(150, 91, 80), max_bytes=1)
    count = np.zeros((150, 91, 80), int)
    for block in memory.blocks:
        count[block.native] += 1
    assert (count == 1).all()
    assert "block(s), " in memory.describe()
