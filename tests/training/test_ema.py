from __future__ import annotations

import pytest
import torch

from pipeline.config import OptimConfig
from pipeline.networks.weights import read_weights
from pipeline.training.ema import WeightAverage, warmed_up_decay
from pipeline.training.trainer import fit_fold


@pytest.mark.parametrize(("n", "expected"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10**6, 0.999)])
def test_the_decay_warms_up_to_its_value(n, expected):
    assert warmed_up_decay(0.999, n) == pytest.approx(expected)


class Progress:
    """What the callback reads of a trainer: the optimiser steps done."""

    global_step = 0


def test_the_average_follows_its_formula_in_float64_and_only_optimiser_steps_count():
    network = torch.nn.Linear(3, 2)
    average, progress = WeightAverage(network, decay=0.5), Progress()
    module = torch.nn.Module()
    module.network = network
    reference, rng = None, torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            network.weight.copy_(torch.randn(2, 3, generator=rng))
        progress.global_step = step
        for _ in range(2):  # a second iteration without an optimiser step
            average.on_train_batch_end(progress, module)
        current = network.weight.double()
        decay = min(0.5, step / (9 + step))
        reference = current if reference is None else decay * reference + (1 - decay) * current
    assert torch.allclose(average.network.weight.double(), reference, atol=1e-6)


def test_buffers_are_copied_the_average_takes_no_gradient_and_the_trained_weights_stay():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average, progress = WeightAverage(network, decay=0.9), Progress()
    module = torch.nn.Module()
    module.network = network
    for step in range(1, 4):
        network(torch.full((4, 3), float(step)) + torch.arange(4)[:, None])
        progress.global_step, before = step, [parameter.clone() for parameter in network.parameters()]
        average.on_train_batch_end(progress, module)
        assert all(torch.equal(*pair) for pair in zip(network.parameters(), before, strict=True))
    kept, trained = dict(average.network.named_buffers()), dict(network.named_buffers())
    assert kept["1.num_batches_tracked"] == 3
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    assert all(kept[name].data_ptr() != trained[name].data_ptr() for name in trained)
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_average_is_validated_saved_and_predicted_with(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config(optim=OptimConfig(ema_decay=0.9)))
    checkpoint = torch.load(result.last_checkpoint, weights_only=True)
    averaged = checkpoint["ema_state_dict"]
    trained = {key.removeprefix("network."): value for key, value in checkpoint["state_dict"].items()}
    assert averaged.keys() == trained.keys()
    assert any(not torch.equal(averaged[key], trained[key]) for key in averaged)
    assert all(torch.equal(value, averaged[key]) for key, value in read_weights(result.last_checkpoint).items())
    assert checkpoint["ema_num_updates"] == 12
