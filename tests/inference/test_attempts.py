"""What is tried next where a prediction does not go through: the same result with less memory, or in full precision."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.inference import attempts
from pipeline.inference.attempts import Attempt, plan_host_memory, run_attempts
from pipeline.inference.prediction_memory import PredictionMemory, plan_prediction_memory
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_memory import library_bytes
from pipeline.inference.windows import SlidingWindow
from pipeline.io.volume import Volume
from pipeline.plan import Plan
from pipeline.preprocessing.score_resampling import ScoreResampling

GIB = 1 << 30
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def plan_memory(window_batch: int, max_bytes: int | None) -> PredictionMemory:
    sliding = SlidingWindow(window=(32, 32, 32), num_classes=20, window_batch=window_batch)
    return plan_prediction_memory(ScoreResampling((96, 96, 200), (96, 96, 100)), sliding, max_bytes=max_bytes)


def first_attempt(**options: object) -> Attempt:
    values = {"precision": "32-true", "scores_device": "cpu", "window_batch": 1, "memory": plan_memory(1, None)}
    return Attempt(**{**values, **options})  # type: ignore[arg-type]


def test_an_out_of_memory_goes_down_to_fewer_windows_then_to_host_memory_then_to_blocks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[Attempt] = []

    def run(attempt: Attempt) -> str:
        tried.append(attempt)
        if len(tried) < 6:
            raise OUT_OF_MEMORY
        return "done"

    with caplog.at_level(logging.WARNING):
        assert run_attempts(first_attempt(scores_device="cuda", window_batch=4), run, plan_memory) == "done"
    assert [each.window_batch for each in tried] == [4, 2, 1, 1, 1, 1]
    assert [each.scores_device for each in tried] == ["cuda", "cuda", "cuda", "cpu", "cpu", "cpu"]
    assert [len(each.memory.blocks) for each in tried[:4]] == [1, 1, 1, 1]
    means = [each.memory.parts["means"] for each in tried[3:]]
    assert means[1] <= means[0] / 2
    assert means[2] < means[1]
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "out of memory: once more with scores gathered in host memory" in caplog.text


def test_where_nothing_smaller_is_left_the_error_is_raised() -> None:
    tried = []

    def run(attempt: Attempt) -> None:
        tried.append(attempt.memory.num_bytes)
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        run_attempts(first_attempt(), run, plan_memory)
    assert tried == sorted(set(tried), reverse=True)
    assert 2 < len(tried) < 20


def test_other_errors_are_not_tried_again() -> None:
    tried = []

    def run(attempt: Attempt) -> None:
        tried.append(attempt)
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        run_attempts(first_attempt(window_batch=4), run, plan_memory)
    assert len(tried) == 1


def test_what_a_failed_attempt_held_is_gone_before_the_next_one_begins() -> None:
    held: list[weakref.ref[Tensor]] = []

    def run(attempt: Attempt) -> str:
        if held:
            assert held[0]() is None
            return "done"
        scores = torch.zeros(1000)
        held.append(weakref.ref(scores))
        raise OUT_OF_MEMORY

    assert run_attempts(first_attempt(window_batch=2), run, plan_memory) == "done"


class Hungry(nn.Module):
    """Prefers the class whose intensity is nearest, and has memory for a number of calls and of windows only."""

    def __init__(self, *, fails_at: int = 0, most_windows: int = 9) -> None:
        super().__init__()
        self.fails_at, self.most_windows, self.calls = fails_at, most_windows, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at or len(x) > self.most_windows:
            raise OUT_OF_MEMORY
        return torch.cat([-(x - value).abs() for value in (0.0, 1.0, 2.0)], dim=1)


@pytest.mark.parametrize("options", [{"fails_at": 1}, {"fails_at": 7}, {"most_windows": 1}])
def test_a_prediction_that_ran_out_of_memory_gives_the_same_label(
    make_plan: Callable[..., Plan], options: dict[str, int]
) -> None:
    array = np.random.default_rng(0).uniform(1, 2, (1, 40, 31, 27)).astype(np.float32)
    volume = Volume.from_array(array, np.diag([1, 1.3, 0.8, 1]))
    expected = Predictor(Hungry(), make_plan()).predict(volume)
    assert set(np.unique(expected.array)) == {4, 7}
    again = Predictor(Hungry(**options), make_plan(), window_batch=4).predict(volume)
    np.testing.assert_array_equal(again.array, expected.array)


def test_a_bound_divides_the_volume_at_the_same_label(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.random.default_rng(0).uniform(0, 2, (1, 60, 51, 47)).astype(np.float32)
    volume = Volume.from_array(array, np.diag([1, 1.3, 0.8, 1]))
    whole, network = Predictor(Hungry(), make_plan()).predict(volume), Hungry()
    # What the process holds already is more than this volume needs, and differs from run to run.
    monkeypatch.setattr(attempts, "held_bytes", lambda: 0)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        predictor = Predictor(network, make_plan())
        predictor.max_ram = 900_000 + library_bytes(predictor.sliding(1))
        divided = predictor.predict(volume)
    np.testing.assert_array_equal(divided.array, whole.array)
    assert "in 1 block(s)" not in caplog.text
    with pytest.raises(InputError, match=r"max_ram: this volume takes at least .* GiB.*allowed are 0\.00"):
        Predictor(Hungry(), make_plan(), max_ram=1000).predict(volume)


def test_what_the_process_holds_and_the_result_count_towards_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    def watched(window_batch: int, max_bytes: int | None) -> PredictionMemory:
        bounds.append(max_bytes)
        return plan_memory(window_batch, None)

    monkeypatch.setattr(attempts, "held_bytes", lambda: 2 * GIB)
    plan_host_memory(watched, window_batch=1, max_ram=8 * GIB, result_bytes=GIB)
    monkeypatch.setattr(attempts, "allotted_memory_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(attempts, "free_bytes", lambda: 100 * GIB)
    plan_host_memory(watched, window_batch=1, max_ram=None, result_bytes=GIB)
    monkeypatch.setattr(attempts, "free_bytes", lambda: 4 * GIB)
    plan_host_memory(watched, window_batch=1, max_ram=None, result_bytes=GIB)
    assert bounds == pytest.approx([5 * GIB, 5 * GIB, 2.2 * GIB], abs=2)


def test_without_a_bound_too_little_memory_is_only_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attempts, "free_bytes", lambda: 0)
    with caplog.at_level(logging.WARNING):
        memory = plan_host_memory(plan_memory, window_batch=1, max_ram=None, result_bytes=0)
    assert memory.num_bytes == plan_memory(1, 0).num_bytes
    assert "memory may run out" in caplog.text


def test_what_is_held_and_free_is_told_of_this_process() -> None:
    before, block = attempts.held_bytes(), np.ones(1 << 26)
    assert attempts.held_bytes() - before > 0.9 * block.nbytes
    assert 0 < attempts.free_bytes() <= psutil.virtual_memory().total
