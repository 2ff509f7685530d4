"""Several windows at once give what one at a time gives, whatever else is asked for at the same time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.inference import prediction_bytes
from pipeline.inference.case_context import CaseContext, CaseNotes, case_context
from pipeline.inference.ensemble import Member
from pipeline.inference.export_formats import OutputFormat
from pipeline.inference.outputs import OutputReducer
from pipeline.inference.prediction_memory import PredictionMemory
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_threads import WindowThreads
from pipeline.io.volume import Volume
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.preprocessing.restore import ScoreReducer
from pipeline.preprocessing.score_resampling import ScoreResampling
from pipeline.slabs.rows import PendingLogits, WholeRows

NUM_CLASSES, NUM_FEATURES = 5, 3
AFFINE = np.array([[0.9, 0.2, 0.0, -8.0], [-0.2, 1.1, 0.1, 3.0], [0.0, -0.1, 1.4, 11.0], [0, 0, 0, 1]])
AIR = -2.0


class OfPlace(nn.Module):
    """Scores, or features, of a voxel that depend on its place in the window, on the window and on mirroring."""

    def __init__(self, number: int, channels: int = NUM_CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.register_buffer("tilts", torch.randn(3, channels, 1, 1, 1, generator=generator))
        self.register_buffer("slopes", torch.randn(channels, 1, 1, 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        along = [torch.linspace(-1, 1, size).view([-1 if n == axis else 1 for n in range(3)]) for axis, size in
                 enumerate(x.shape[2:])]  # fmt: skip
        place = sum(tilt * values for tilt, values in zip(self.tilts, along, strict=True))
        return (x * self.slopes + place) * (1 + x[:, :, :1, :1, :1])


class WithHead(OfPlace):
    """Fewer features than classes, and a head that is left to the caller."""

    num_features = NUM_FEATURES

    def __init__(self, number: int) -> None:
        super().__init__(number, NUM_FEATURES)
        generator = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, NUM_FEATURES, 1, 1, 1, generator=generator))
        self.bias = nn.Parameter(torch.randn(NUM_CLASSES, generator=generator))

    def pending_logits(self, x: Tensor) -> PendingLogits:
        return PendingLogits(WholeRows(super().forward(x)), self.weight, self.bias)


def make_network(kind: str, number: int, plan: Plan) -> nn.Module:
    torch.manual_seed(number)
    makers = {"scores": OfPlace, "features": WithHead, "unet": lambda _: UNet(1, NUM_CLASSES, plan.network)}
    return makers[kind](number).eval()


class InBlocks(Predictor):
    """Divides volumes until a share of what is gathered is left."""

    share = 1.0

    def plan_memory(self, resampling: ScoreResampling, *options: object, **named: object) -> PredictionMemory:
        free = super().plan_memory(resampling, *options, **named)
        bound = free.num_bytes - int((1 - self.share) * free.parts["means"])
        kept = {name: value for name, value in named.items() if name != "max_bytes"}
        return super().plan_memory(resampling, self.window_batch, bound, **kept) if self.share < 1 else free


@dataclass
class Outcome:
    """All that a prediction gives."""

    scores: NDArray[np.float32]
    label: NDArray[np.uint8]
    maps: dict[OutputFormat, NDArray[np.float32]]
    notes: CaseNotes
    num_blocks: int


def outcome(predictor: Predictor, volume: Volume, formats: tuple[OutputFormat, ...]) -> Outcome:
    prepared, context = predictor.prepare(volume), CaseContext()
    request = predictor.request_of(dict.fromkeys(formats, Path()))
    num_scores = NUM_CLASSES + request.variance
    scores = predictor.reduce(prepared, lambda: ScoreReducer(volume.grid.shape, num_scores), request=request).scores
    with case_context(context):
        reduced = predictor.reduce(
            prepared, lambda: OutputReducer(volume.grid.shape, predictor.plan, request), request=request
        )
    found = reduced.finish(volume.grid, None, ())
    resampling = ScoreResampling(prepared.array.shape[1:], prepared.crop_shape)
    return Outcome(
        scores,
        found.label.array[0],
        {kind: each.array[0] for kind, each in found.maps.items()},
        context.notes,
        len(predictor.plan_memory(resampling, request=request).blocks),
    )


def make_volume(shape: tuple[int, int, int], *, with_air: bool) -> Volume:
    voxels = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    if with_air:
        voxels[:, shape[0] // 3 :] = AIR
    return Volume.from_array(voxels, AFFINE)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(7, 26), st.integers(9, 30), st.integers(5, 22)),
    kind=st.sampled_from(["scores", "features", "unet"]),
    num_networks=st.integers(1, 2),
    window_batch=st.integers(2, 7),
    in_threads=st.booleans(),
    tta_axes=st.sets(st.integers(0, 2)).map(lambda found: tuple(sorted(found))),
    skip_air=st.booleans(),
    extra=st.sampled_from([(), ("entropy",), ("variance",), ("entropy", "variance")]),
    share=st.sampled_from([1.0, 0.5, 0.2]),
    chunk_bytes=st.sampled_from([1, 3000, 1 << 20]),
    spacing=st.sampled_from([None, (1.0, 1.3, 1.1)]),
)
def test_windows_together_give_what_one_at_a_time_gives(
    make_plan: Callable[..., Plan],
    shape: tuple[int, int, int],
    kind: str,
    num_networks: int,
    window_batch: int,
    in_threads: bool,
    tta_axes: tuple[int, ...],
    skip_air: bool,
    extra: tuple[OutputFormat, ...],
    share: float,
    chunk_bytes: int,
    spacing: tuple[float, float, float] | None,
) -> None:
    volume = make_volume(shape, with_air=skip_air)
    labels = {str(number): number for number in range(NUM_CLASSES)}
    plan = make_plan(spacing=spacing or volume.grid.spacing, labels=labels)
    if num_networks == 1:
        extra = tuple(each for each in extra if each != "variance")
    members = tuple(
        Member(make_network(kind, number, plan), window, tta_axes[:most])
        for number, window, most in zip(range(num_networks), (plan.patch_size, (8, 12, 10)), (3, 1), strict=False)
    )

    def make(window_batch: int, share: float) -> InBlocks:
        predictor = InBlocks(members[0].network, plan, window_batch=window_batch)
        predictor.members, predictor.share = members, share
        predictor.skip_air, predictor.count_seams = skip_air, True
        return predictor

    together = make(window_batch, share)
    if in_threads:
        together.threads = WindowThreads(2)
    expected = outcome(make(1, 1.0), volume, extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_bytes, "CHUNK_BYTES", chunk_bytes)
        found = outcome(together, volume, extra)

    # Passes of a batch are added together, and a mean over windows and passes in another order is rounded otherwise.
    is_exact = num_networks == 1 and (in_threads or not tta_axes) and (kind == "scores" or (in_threads and share == 1))
    tolerance = 0.0 if is_exact else 2e-5 * float(np.abs(expected.scores).max())
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=tolerance)
    ranked = np.sort(expected.scores[:NUM_CLASSES], axis=0)
    is_sure = ranked[-1] - ranked[-2] > 4 * tolerance
    assert is_sure.mean() > 0.9 or skip_air
    np.testing.assert_array_equal(found.label[is_sure], expected.label[is_sure])
    for name, values in expected.maps.items():
        np.testing.assert_allclose(found.maps[name], values, atol=2e-5)
    assert set(found.maps) == set(extra)
    most_off = 0 if in_threads or (kind == "scores" and not tta_axes) else 2
    assert abs(found.notes.compared - expected.notes.compared) <= most_off
    assert abs(found.notes.disagreeing - expected.notes.disagreeing) <= most_off
    if found.num_blocks == 1:
        assert (found.notes.windows, found.notes.skipped) == (expected.notes.windows, expected.notes.skipped)
