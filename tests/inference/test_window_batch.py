"""How many windows are computed at once, and that all of them together take no more cores than allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pipeline.inference.predictor import Predictor
from pipeline.inference.window_batch import WINDOWS_SHARE, set_window_batch
from pipeline.inference.window_memory import window_bytes
from pipeline.networks.unet import UNet
from pipeline.plan import Plan


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_predictor(make_plan: Callable[..., Plan]) -> Callable[..., Predictor]:
    def make(**options: object) -> Predictor:
        return Predictor(UNet(1, 3, make_plan().network), make_plan(), **options)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(("option", "count", "cores"), [("auto", 6, 1), (1, 1, 6), (2, 2, 3), (4, 4, 1), (99, 6, 1)])
def test_cores_are_divided_among_windows(
    make_predictor: Callable[..., Predictor], option: int | str, count: int, cores: int
) -> None:
    predictor = make_predictor()
    set_window_batch(predictor, option)
    assert predictor.window_batch == count
    assert (predictor.threads.count if predictor.threads else 1) == count
    assert torch.get_num_threads() == cores


def test_memory_for_fewer_windows_is_filled_with_fewer(
    make_predictor: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inference.window_batch.held_bytes", lambda: 0)
    predictor = make_predictor()
    predictor.max_ram = int(2.5 * window_bytes(predictor.sliding(1), 1, predictor.network) / WINDOWS_SHARE)
    set_window_batch(predictor, "auto")
    assert predictor.window_batch == 2
    assert torch.get_num_threads() == 3


def test_networks_of_others_are_called_one_at_a_time(make_plan: Callable[..., Plan]) -> None:
    predictor = Predictor(nn.Conv3d(1, 3, 1), make_plan())
    set_window_batch(predictor, "auto")
    assert (predictor.window_batch, predictor.threads, torch.get_num_threads()) == (1, None, 6)
