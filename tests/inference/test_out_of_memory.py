"""Memory that runs out at any operator of a prediction costs another attempt, and not one voxel of the result."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.inference import attempts
from pipeline.inference import predictor as predictor_module
from pipeline.inference.attempts import Attempt
from pipeline.inference.ensemble import Member
from pipeline.inference.predictor import Predictor
from pipeline.io.volume import Volume
from pipeline.networks.unet import UNet
from pipeline.plan import Plan

AFFINE = np.array([[0.9, 0.2, 0.0, -8.0], [-0.2, 1.1, 0.1, 3.0], [0.0, -0.1, 1.4, 11.0], [0, 0, 0, 1]])


class RunsOut(TorchDispatchMode):
    """Raises torch's error at some of the operators, by their number since the beginning of an attempt.

    Args:
        at: Of each attempt; an attempt that has none goes through.
    """

    def __init__(self, at: list[int]) -> None:
        super().__init__()
        self.at, self.attempt, self.count, self.raised = at, -1, 0, 0

    def begin(self) -> None:
        self.attempt, self.count = self.attempt + 1, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if 0 <= self.attempt < len(self.at) and self.count == self.at[self.attempt]:
            self.raised += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB in {func}")
        return func(*args, **(kwargs or {}))


def predict(predictor: Predictor, volume: Volume, runs_out: RunsOut) -> tuple[np.ndarray, list[Attempt]]:
    """The label, and the attempts that were made."""
    tried: list[Attempt] = []
    real = attempts.run_attempts

    def watched(first: Attempt, run: Callable[[Attempt], Any], plan_memory: Any) -> Any:
        def counted(attempt: Attempt) -> Any:
            tried.append(attempt)
            runs_out.begin()
            with runs_out:
                return run(attempt)

        return real(first, counted, plan_memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor_module, "run_attempts", watched)
        return predictor.predict(volume).array, tried


def make_predictor(plan: Plan, *, num_networks: int, tta_axes: tuple[int, ...], window_batch: int) -> Predictor:
    torch.manual_seed(0)
    networks = [UNet(1, 3, plan.network).eval() for _ in range(num_networks)]
    made = Predictor(networks[0], plan, window_batch=window_batch)
    made.members = tuple(Member(network, plan.patch_size, tta_axes) for network in networks)
    return made


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_networks=st.integers(1, 2),
    tta_axes=st.sampled_from([(), (1,)]),
    window_batch=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 10_000),
    num_failures=st.integers(1, 5),
)
def test_memory_that_runs_out_at_any_operator_changes_no_label(
    make_plan: Callable[..., Plan],
    num_networks: int,
    tta_axes: tuple[int, ...],
    window_batch: int,
    seed: int,
    num_failures: int,
) -> None:
    voxels = np.random.default_rng(1).normal(size=(1, 26, 33, 19)).astype(np.float32)
    volume, plan = Volume.from_array(voxels, AFFINE), make_plan(spacing=(1.1, 1.2, 1.3))
    options = {"num_networks": num_networks, "tta_axes": tta_axes, "window_batch": window_batch}
    counting = RunsOut([])
    expected, (first,) = predict(make_predictor(plan, **options), volume, counting)
    at = [random.Random(seed + number).randint(1, counting.count) for number in range(num_failures)]
    runs_out = RunsOut(at)
    predictor = make_predictor(plan, **options)
    try:
        found, tried = predict(predictor, volume, runs_out)
    except torch.OutOfMemoryError:
        # No smaller attempt is left: only after all windows at a time and all blocks were tried.
        assert runs_out.raised > window_batch.bit_length()
        return
    assert len(tried) == runs_out.raised + 1
    sizes = [attempt.window_batch for attempt in tried]
    assert sizes == [max(1, window_batch >> number) for number in range(len(tried))]
    planned = [attempt.memory.num_bytes for attempt in tried if attempt.window_batch == 1]
    assert planned == sorted(planned, reverse=True)
    np.testing.assert_array_equal(found, expected)
    assert tried[0].memory == first.memory


def test_all_smaller_sizes_are_reached_down_to_the_last(make_plan: Callable[..., Plan]) -> None:
    voxels = np.random.default_rng(1).normal(size=(1, 26, 33, 19)).astype(np.float32)
    volume, plan = Volume.from_array(voxels, AFFINE), make_plan(spacing=(1.1, 1.2, 1.3))
    options = {"num_networks": 1, "tta_axes": (), "window_batch": 4}
    expected, _ = predict(make_predictor(plan, **options), volume, RunsOut([]))
    for num_failures in range(1, 40):
        try:
            found, tried = predict(make_predictor(plan, **options), volume, RunsOut([7] * num_failures))
        except torch.OutOfMemoryError:
            break
        np.testing.assert_array_equal(found, expected)
        blocks = [len(attempt.memory.blocks) for attempt in tried]
        assert [attempt.window_batch for attempt in tried][:3] == [4, 2, 1][: len(tried)]
        assert blocks == sorted(blocks)
    else:
        pytest.fail("never ends")
    assert num_failures > 4
    assert blocks[-1] > 2
