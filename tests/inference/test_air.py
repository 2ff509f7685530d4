"""Windows of air become background without the network; where none were, everything is as before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.air import AirFinder
from pipeline.inference.case_context import CaseContext, case_context
from pipeline.inference.case_files import predict_files
from pipeline.inference.inputs import find_inputs
from pipeline.inference.planes import BACKGROUND_SCORE
from pipeline.inference.predictor import Predictor
from pipeline.inference.sliding_window import stream_planes
from pipeline.inference.window_threads import WindowThreads
from pipeline.inference.windows import Box
from pipeline.networks.unet import UNet
from pipeline.plan import Plan

SHAPE, WINDOW = (30, 50, 20), (12, 16, 8)
AIR, BODY = -3.0, (slice(0, 12), slice(17, 33), slice(4, 20))


def make_image(channels: int = 1) -> Tensor:
    """Air but for a body, which fills some windows, cuts others and leaves some alone."""
    image = torch.full((channels, *SHAPE), AIR)
    image[(slice(None), *BODY)] = torch.randn(channels, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    return image


def box(*sides: tuple[int, int]) -> Box:
    i, j, k = (slice(*side) for side in sides)
    return i, j, k


class Counting(nn.Module):
    """Calls everything but clearly dark voxels an organ, and counts the windows it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += len(x)
        # Of dark voxels it says organ_2, which shows where it was asked.
        return torch.cat([torch.zeros_like(x), x + 2.5, -2.5 - x], dim=1)


@pytest.mark.parametrize(
    ("change", "place", "is_air"),
    [
        (None, box((14, 26), (0, 16), (0, 8)), True),
        (None, box((-4, 8), (-2, 14), (-2, 6)), True),
        (None, box((0, 12), (16, 32), (0, 8)), False),
        # One voxel that is a little brighter.
        ((20, 3, 3, -2.9), box((14, 26), (0, 16), (0, 8)), False),
    ],
)
def test_air_is_one_dark_value(change: tuple[int, int, int, float] | None, place: Box, is_air: bool) -> None:
    image = make_image()
    if change is not None:
        i, j, k, value = change
        image[0, i, j, k] = value
    assert AirFinder(image)(place) is is_air


def test_one_bright_value_is_no_air_nor_is_an_image_of_one_value() -> None:
    image = make_image()
    image[0, :, 34:, :] = 5.0
    assert not AirFinder(image)(box((0, 12), (34, 50), (0, 8)))
    assert not AirFinder(torch.full((1, *SHAPE), AIR))(box((0, 12), (0, 16), (0, 8)))


def test_all_channels_have_to_be_air() -> None:
    image = torch.cat([make_image(), torch.randn(1, *SHAPE)])
    assert not AirFinder(image)(box((14, 26), (0, 16), (0, 8)))


@pytest.mark.parametrize("threads", [None, 2])
def test_voxels_that_no_skipped_window_covers_keep_their_scores(
    make_plan: Callable[..., Plan], threads: int | None
) -> None:
    image, network = make_image(), Counting()
    whole, skipping = Predictor(network, make_plan()), Predictor(network, make_plan(), window_batch=threads or 1)
    skipping.skip_air = True
    skipping.threads = WindowThreads(threads) if threads else None
    expected = whole.predict_scores(image)
    asked, network.windows = network.windows, 0
    context = CaseContext()
    with case_context(context):
        found = skipping.predict_scores(image)
    notes = context.notes
    assert notes.windows == asked
    assert 0 < network.windows == asked - notes.skipped < asked
    touched = torch.zeros(SHAPE, dtype=torch.bool)
    computed = torch.zeros(SHAPE, dtype=torch.bool)
    is_air, sliding = AirFinder(image), whole.sliding(1)
    for places, _ in sliding.sweep(SHAPE, 1, box((0, 30), (0, 50), (0, 20))):
        for place in places:
            (touched if is_air(place) else computed)[place] = True
    assert torch.equal(found[:, ~touched], expected[:, ~touched])
    unseen = ~computed
    assert unseen.any()
    assert (~touched).any()
    assert (found[0, unseen] == BACKGROUND_SCORE).all()
    assert (found[1:, unseen] == 0).all()
    assert (expected.argmax(0)[unseen] == 2).all()


def test_features_of_skipped_windows_are_background_too(make_plan: Callable[..., Plan]) -> None:
    torch.manual_seed(1)
    labels = {str(value): value for value in range(9)}
    plan = make_plan(labels=labels)
    network = UNet(1, 9, plan.network)
    torch.nn.init.constant_(network.heads[0].bias[3:4].detach(), 50.0)
    predictor = Predictor(network, plan)
    predictor.skip_air = True
    image = torch.full((1, *SHAPE), AIR)
    # The last windows of the sweep alone are computed, so that the first planes are finished before any head is there.
    image[:, 18:, 40:, 12:] = torch.randn(1, 12, 10, 8)
    first = next(iter(stream_planes(predictor.network, image, predictor.sliding(1), of_features=True)))
    assert first.head is None
    assert first.take(slice(4, 9)).shape == (5, SHAPE[0], first.stop, SHAPE[2])
    scores = predictor.predict_scores(image)
    assert (scores[:, :, :20].argmax(0) == 0).all()
    assert (scores.argmax(0)[18:, 44:, 12:] != 0).any()


def test_without_air_nothing_changes(make_plan: Callable[..., Plan]) -> None:
    image = torch.randn(1, *SHAPE)
    plain, skipping = Predictor(Counting(), make_plan()), Predictor(Counting(), make_plan())
    skipping.skip_air = True
    assert torch.equal(plain.predict_scores(image), skipping.predict_scores(image))


def test_the_share_of_air_is_said(
    tmp_path: Path, make_plan: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    # Not zero, which would be cropped.
    nib.save(nib.Nifti1Image(make_image()[0].numpy(), np.eye(4)), tmp_path / "in" / "a.nii.gz")
    predictor = Predictor(Counting(), make_plan())
    predictor.skip_air = True
    with caplog.at_level(logging.INFO):
        predict_files(predictor, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert any(" windows (" in text and text.endswith("are air") for text in caplog.messages), caplog.messages
