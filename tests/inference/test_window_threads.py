"""Windows in threads: the same scores to the last bit, in order, no more at once than asked, errors in their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import sleep

import pytest
import torch
from torch import Tensor, nn

from pipeline.inference.sliding_window import sliding_window_scores, stream_planes
from pipeline.inference.window_threads import WindowThreads, cores_per_window
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.precision import autocast
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan

WINDOW = (8, 12, 16)


@pytest.fixture
def network(two_stages: Callable[..., NetworkPlan]) -> UNet:
    torch.manual_seed(0)
    return UNet(1, 3, two_stages()).eval()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tta_axes", [(), (0, 2)])
@pytest.mark.parametrize("of_features", [False, True])
def test_scores_are_the_same_to_the_last_bit(
    network: UNet, precision: str, tta_axes: tuple[int, ...], of_features: bool
) -> None:
    image = torch.randn(1, 19, 30, 21)
    sweeps = [
        SlidingWindow(window=WINDOW, num_classes=3, tta_axes=tta_axes, window_batch=batch, threads=threads)
        for batch, threads in ((1, None), (3, WindowThreads(3)))
    ]
    with autocast(precision, "cpu"):
        alone, side_by_side = (
            [
                planes.take(slice(0, 3)).clone()
                for planes in stream_planes(network, image, each, of_features=of_features)
            ]
            for each in sweeps
        )
    assert len(alone) == len(side_by_side) > 2
    assert all(torch.equal(one, other) for one, other in zip(alone, side_by_side, strict=True))


def test_a_network_is_called_in_as_many_threads_as_asked_and_in_the_callers_precision() -> None:
    seen: set[tuple[int, bool, bool]] = set()
    gate = threading.Barrier(2, timeout=20)

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gate.wait()
            seen.add((threading.get_ident(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
            return x

    sliding = SlidingWindow(window=(4, 4, 4), num_classes=1, window_batch=2, threads=WindowThreads(2), overlap=0)
    with autocast("bf16-mixed", "cpu"):
        # An even number of windows: they meet in pairs, or the barrier breaks.
        list(stream_planes(Watched(), torch.zeros(1, 16, 4, 4), sliding))
    assert len(seen) == 2
    assert {(is_autocast, is_inference) for _, is_autocast, is_inference in seen} == {(True, True)}


def test_no_more_is_begun_than_allowed_before_it_is_taken() -> None:
    begun: list[int] = []

    def note(item: int) -> int:
        begun.append(item)
        return item

    results = WindowThreads(2).map(note, range(20), ahead=3)
    for taken in range(20):
        assert next(results) == taken
        sleep(0.001)
        assert len(begun) <= taken + 3


def test_an_error_comes_in_its_turn_and_nothing_runs_on() -> None:
    done: list[int] = []

    def fail_at_three(item: int) -> int:
        sleep(0.01)
        if item == 3:
            raise MemoryError
        done.append(item)
        return item

    results = WindowThreads(2).map(fail_at_three, range(50), ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(MemoryError):
        next(results)
    before = list(done)
    sleep(0.05)
    assert done == before
    assert max(done) < 8


def test_threads_of_all_windows_together_are_those_allowed() -> None:
    for num_threads in range(1, 20):
        for count in range(1, num_threads + 1):
            assert 1 <= cores_per_window(num_threads, count) * count <= num_threads


def test_scores_at_once_need_no_threads(network: UNet) -> None:
    image = torch.randn(1, 9, 12, 16)
    scores = sliding_window_scores(network, image, window=WINDOW, num_classes=3)
    assert scores.shape == (3, 9, 12, 16)
