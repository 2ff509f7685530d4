from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR

from pipeline.config import OptimConfig
from pipeline.errors import InputError
from pipeline.training.optim import (
    accumulation_for,
    learning_rate_factor,
    make_optimizer,
    make_scheduler,
    steps_per_epoch,
)


def rates(name: str, *, total_steps: int, warmup_fraction: float, schedule: str = "auto") -> list[float]:
    config = OptimConfig(name=name, schedule=schedule, lr=1.0, warmup_fraction=warmup_fraction)
    optimizer = make_optimizer(nn.Conv3d(1, 2, 3), config)
    scheduler = make_scheduler(optimizer, config, total_steps=total_steps)
    found = []
    for _ in range(total_steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("sgd", lambda optimizer: PolynomialLR(optimizer, total_iters=17, power=0.9)),
        ("adamw", lambda optimizer: CosineAnnealingLR(optimizer, T_max=17)),
    ],
)
def test_without_warm_up_the_schedules_are_those_of_torch(name, oracle):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, expected = oracle(optimizer), []
    for _ in range(17):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(name, total_steps=17, warmup_fraction=0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_warm_up_rises_in_equal_steps_to_the_peak_and_no_step_is_lost_at_rate_zero(name):
    found = rates(name, total_steps=40, warmup_fraction=0.1)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] == max(found) == 1.0
    assert all(a > b for a, b in pairwise(found[4:]))
    assert min(found) > 0


def test_a_schedule_may_be_chosen_that_the_optimiser_would_not_take_by_itself():
    for name, other in (("sgd", "adamw"), ("adamw", "sgd")):
        own = {"sgd": "poly", "adamw": "cosine"}[other]
        expected = rates(other, total_steps=20, warmup_fraction=0.1)
        assert rates(name, total_steps=20, warmup_fraction=0.1, schedule=own) == expected
    assert rates("sgd", total_steps=6, warmup_fraction=0.5, schedule="constant")[2:] == [1.0] * 4


def test_a_training_of_one_step_uses_the_peak():
    assert learning_rate_factor(0, total_steps=1, warmup_steps=0, decay="poly") == 1.0
    assert rates("sgd", total_steps=1, warmup_fraction=1.0) == [1.0]


@pytest.mark.parametrize(("name", "peak"), [("sgd", 0.01), ("adamw", 0.001)])
def test_the_automatic_rate_follows_the_optimiser(name, peak):
    assert make_optimizer(nn.Linear(2, 2), OptimConfig(name=name)).param_groups[0]["lr"] == peak
    assert make_optimizer(nn.Linear(2, 2), OptimConfig(name=name, lr=0.5)).param_groups[0]["lr"] == 0.5


def test_adamw_decays_kernels_but_neither_norms_nor_biases():
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4))
    groups = make_optimizer(network, OptimConfig(name="adamw", weight_decay=0.1)).param_groups
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decayed[id(p)] for p in network.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_sgd_without_momentum_is_plain():
    group = make_optimizer(nn.Linear(2, 2), OptimConfig(name="sgd", momentum=0.0)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


def test_an_effective_batch_that_the_batch_does_not_divide_is_refused_with_the_nearest_that_it_does():
    assert accumulation_for(batch_size=2, effective_batch=6) == 3
    with pytest.raises(InputError, match=r"effective_batch: 7 is not a multiple of batch_size 2\. Use 8"):
        accumulation_for(batch_size=2, effective_batch=7)


def test_a_partial_accumulation_is_a_step_of_its_own():
    assert steps_per_epoch(iterations_per_epoch=7, accumulate_grad_batches=3) == 3
    assert steps_per_epoch(iterations_per_epoch=6, accumulate_grad_batches=3) == 2
