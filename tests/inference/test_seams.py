"""Voxels on which overlapping windows disagree, against a count window by window and voxel by voxel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.case_context import CaseContext, case_context
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_memory import library_bytes, window_bytes
from pipeline.inference.window_threads import WindowThreads
from pipeline.inference.windows import Box, window_starts
from pipeline.io.volume import Volume
from pipeline.networks.unet import UNet
from pipeline.plan import Plan
from pipeline.prediction_record import MANY_SEAMS
from pipeline.preprocessing.restore import NativeScores

SHAPE, WINDOW, NUM_CLASSES = (20, 33, 17), (12, 16, 8), 3


class OfPlace(nn.Module):
    """Scores that depend on where in its window a voxel lies, and not the same way in a mirrored one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("ramp", torch.randn(NUM_CLASSES, *WINDOW, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x, 0.3 * x], dim=1) + 0.4 * self.ramp


def brute_force(network: nn.Module, image: Tensor, tta_axes: tuple[int, ...]) -> tuple[int, int]:
    """Compared and disagreeing voxels by the classes that each window gives, all of them kept."""
    given: dict[tuple[int, ...], list[int]] = {}
    flips = [flip for count in range(len(tta_axes) + 1) for flip in combinations([a + 1 for a in tta_axes], count)]
    starts = [window_starts(size, window, overlap=0.5) for size, window in zip(SHAPE, WINDOW, strict=True)]
    for i, j, k in product(*starts):
        voxels = image[:, i : i + WINDOW[0], j : j + WINDOW[1], k : k + WINDOW[2]]
        scores = torch.zeros(NUM_CLASSES, *WINDOW, dtype=torch.float64)
        for flip in flips:
            scores += network(voxels.flip(flip)[None])[0].flip(flip).double()
        for offset, index in np.ndenumerate(scores.argmax(0).numpy()):
            given.setdefault((i + offset[0], j + offset[1], k + offset[2]), []).append(int(index))
    compared = [classes for classes in given.values() if len(classes) > 1 and max(classes) > 0]
    return len(compared), sum(len(set(classes)) > 1 for classes in compared)


def count(predictor: Predictor, image: Tensor) -> tuple[int, int]:
    predictor.count_seams = True
    context = CaseContext()
    with case_context(context):
        predictor.predict_scores(image)
    return context.notes.compared, context.notes.disagreeing


@pytest.mark.parametrize("tta_axes", [(), (1,), (0, 2)])
@pytest.mark.parametrize("window_batch", [1, 3])
@torch.inference_mode()
def test_the_count_is_that_of_every_window_kept(
    make_plan: Callable[..., Plan], tta_axes: tuple[int, ...], window_batch: int
) -> None:
    network, image = OfPlace(), torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = brute_force(network, image, tta_axes)
    predictor = Predictor(network, make_plan(), tta_axes=tta_axes, window_batch=window_batch)
    assert count(predictor, image) == expected
    assert 0.1 < expected[1] / expected[0] < 0.9


@pytest.mark.parametrize("tta_axes", [(), (0, 2)])
@torch.inference_mode()
def test_features_and_threads_give_the_count_of_scores(
    make_plan: Callable[..., Plan], tta_axes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network, image = UNet(1, NUM_CLASSES, make_plan().network).eval(), torch.randn(1, *SHAPE)
    expected = brute_force(network, image, tta_axes)
    # With more classes than features the latter are gathered; the classes that are added never win.
    many = UNet(1, 9, make_plan().network).eval()
    with torch.no_grad():
        many.load_state_dict({**network.state_dict(), **{k: v for k, v in many.state_dict().items() if "heads" in k}})
        for name in ("weight", "bias"):
            own, wide = getattr(network.heads[0], name), getattr(many.heads[0], name)
            wide.fill_(0 if name == "weight" else -1000)
            wide[:NUM_CLASSES] = own
    plan = replace(make_plan(), labels={str(n): n for n in range(9)})
    predictor = Predictor(many, plan, tta_axes=tta_axes, window_batch=2)
    predictor.threads = WindowThreads(2)
    found = count(predictor, image)
    # Scores of features are summed in another order, which may tip a voxel of two equal scores.
    assert np.allclose(found, expected, rtol=0.002)
    assert expected[1] > 0


def test_blocks_count_each_voxel_once(make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(spacing=(1.0, 1.1, 0.8))
    volume = Volume.from_array(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), np.eye(4))
    monkeypatch.setattr("pipeline.inference.attempts.held_bytes", lambda: 0)
    found, blocks = [], []
    sliding = Predictor(OfPlace(), plan).sliding(1)
    fixed = library_bytes(sliding) + window_bytes(sliding, 1, OfPlace())
    for max_ram in (None, fixed + 120_000):
        predictor = Predictor(OfPlace(), plan, max_ram=max_ram)
        predictor.count_seams = True
        prepared, context = predictor.prepare(volume), CaseContext(expect=lambda _: None)
        with case_context(context):
            predictor.segment(prepared, volume.grid, volume.source)
        found.append((context.notes.compared, context.notes.disagreeing))
        resampling = NativeScores.of(prepared, plan).resampling
        blocks.append(predictor.plan_memory(resampling, 1, max_ram and max_ram - volume.array.size).blocks)
    assert found[0] == found[1]
    assert len(blocks[1]) > len(blocks[0])
    # Blocks of a resampled volume share planes of the prepared grid.
    assert sum(size(block.source) for block in blocks[1]) > sum(size(block.own) for block in blocks[1])


def size(box: Box) -> int:
    return prod(side.stop - side.start for side in box)


def test_windows_that_agree_have_no_seams(make_plan: Callable[..., Plan]) -> None:
    class OfVoxel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x, 0.3 * x], dim=1)

    compared, disagreeing = count(Predictor(OfVoxel(), make_plan()), torch.randn(1, *SHAPE))
    assert compared > 0
    assert disagreeing == 0


def test_many_seams_are_warned_of_and_few_are_said(
    tmp_path: Path, make_plan: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "in" / "a.nii.gz")
    predictor = Predictor(OfPlace(), make_plan())
    predictor.count_seams = True
    with caplog.at_level(logging.INFO):
        predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
        predictor.network.ramp *= 0.01
        predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out", overwrite=True)
    said = [record for record in caplog.records if "overlapping windows disagree on" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING", "INFO"]
    assert "a: overlapping windows disagree on" in said[0].getMessage()
    assert float(said[0].getMessage().split(" on ")[1].split(" %")[0]) > 100 * MANY_SEAMS


def test_counting_changes_nothing(make_plan: Callable[..., Plan]) -> None:
    network, image = OfPlace(), torch.randn(1, *SHAPE)
    alone, counting = Predictor(network, make_plan()), Predictor(network, make_plan())
    counting.count_seams = True
    assert torch.equal(alone.predict_scores(image), counting.predict_scores(image))
