"""Where a training stands on its plan's ladder: options win, rungs that do not fit them are left out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.plan import Rung
from pipeline.store import CaseStore
from pipeline.training.run_folder import Counts, StepDown
from pipeline.training.settings import resolve_settings
from pipeline.training.step_down import Standing
from pipeline.training.validation import Validator

PATCH = (16, 8, 12)
RUNGS = (
    Rung(patch_size=PATCH, batch_size=6, recompute_stages=1),
    Rung(patch_size=PATCH, batch_size=6, recompute_stages=2, slab_stages=1),
    Rung(patch_size=PATCH, batch_size=4, recompute_stages=2),
    Rung(patch_size=PATCH, batch_size=2, recompute_stages=2),
    Rung(patch_size=(8, 8, 8), batch_size=2, recompute_stages=1),
)


@pytest.fixture
def ladder(plan):
    """Built past the checks of a plan, whose rungs keep its effective batch of six in other ways."""
    rungs = tuple(replace(rung, accumulate_grad_batches=6 // rung.batch_size) for rung in RUNGS)
    laddered = replace(plan, batch_size=6)
    object.__setattr__(laddered, "fallbacks", rungs)
    return laddered


def standing_of(plan, config, *, own=False, step_downs=()) -> Standing:
    return Standing.of(plan, config, resolve_settings(plan, config), step_downs, has_own_network=own)


def numbers(standing: Standing) -> list[int]:
    return [number for number, _ in standing.below]


def test_without_options_a_training_begins_at_the_plans_step_and_may_go_down_all_rungs(ladder, make_config):
    standing = standing_of(ladder, make_config())
    assert standing.rung.is_same_step(Rung(patch_size=PATCH, batch_size=6))
    assert (standing.fallback, numbers(standing)) == (0, [1, 2, 3, 4, 5])


def test_batches_are_divisors_of_the_first_and_the_effective_batch_is_kept(ladder, make_config):
    standing = standing_of(ladder, make_config(effective_batch=12))
    assert [rung.batch_size for _, rung in standing.below] == [6, 6, 3, 2, 2]
    assert all(rung.batch_size * rung.accumulate_grad_batches == 12 for _, rung in standing.below)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"hardware": {"recompute_stages": 2}}, [2, 3, 4]),
        ({"hardware": {"recompute_stages": 1}}, [5]),
        ({"hardware": {"slab_stages": 0}}, [1, 3, 4, 5]),
        ({"hardware": {"recompute_stages": 0}}, []),
        ({"batch_size": 2, "effective_batch": 6}, [4, 5]),
        ({"batch_size": 6}, [1, 2]),
    ],
    ids=str,
)
def test_options_given_by_hand_win_and_only_rungs_that_agree_are_used(ladder, make_config, options, left):
    standing = standing_of(ladder, make_config(**options))
    assert numbers(standing) == left
    for name, value in options.get("hardware", {}).items():
        assert {getattr(rung, name) for rung in (standing.rung, *(rung for _, rung in standing.below))} == {value}


def test_for_a_network_of_ones_own_only_batch_and_patch_count(ladder, make_config):
    standing = standing_of(ladder, make_config(hardware={"recompute_stages": 1}), own=True)
    assert numbers(standing) == [3, 4, 5]
    assert all(rung.execution == (0, 0, 0) for _, rung in standing.below)


def reached(rung: Rung, fallback: int, **more) -> StepDown:
    counts = Counts(epoch=1, iteration=4, optimizer_step=2)
    return StepDown(
        where="backward",
        counts=counts,
        continued_from=counts,
        from_rung=rung,
        to_rung=rung,
        fallback=fallback,
        **more,
    )


def test_a_run_that_stepped_down_before_begins_there_and_goes_on_below(ladder, make_config):
    step = reached(standing_of(ladder, make_config()).below[2][1], 3)
    standing = standing_of(ladder, make_config(), step_downs=(step,))
    assert (standing.rung, standing.fallback, numbers(standing)) == (step.to_rung, 3, [4, 5])


def test_an_option_given_on_resume_wins_over_the_rung_that_was_reached(ladder, make_config):
    step = reached(standing_of(ladder, make_config()).below[3][1], 4)
    standing = standing_of(ladder, make_config(hardware={"recompute_stages": 1}), step_downs=(step,))
    assert (standing.rung.recompute_stages, standing.rung.batch_size, numbers(standing)) == (1, 2, [5])


def test_every_decision_goes_strictly_down_and_ends(ladder, make_config):
    for where, on_gpu in (("backward", True), ("validation", True), ("validation", False)):
        standing, taken = standing_of(ladder, make_config()), []
        while (below := standing.step_down(where, on_gpu=on_gpu)) is not None:
            standing = below
            taken.append((standing.fallback, standing.scores_on_host))
        on_host = where == "validation"
        first = [(0, True)] if on_host and on_gpu else []
        assert taken == [*first, *((number, on_host) for number in (1, 2, 3, 4, 5))]


def test_the_scores_stay_on_the_host_once_they_had_to_go_there(ladder, make_config):
    rung = standing_of(ladder, make_config()).rung
    steps = (reached(rung, 0, scores_on_host=True), reached(standing_of(ladder, make_config()).below[0][1], 1))
    assert standing_of(ladder, make_config(), step_downs=steps).scores_on_host
    assert not standing_of(ladder, make_config(), step_downs=steps[1:]).scores_on_host


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scores_on_host", [False, True])
def test_scores_are_added_up_where_they_are_told_to(plan, store: Path, scores_on_host):
    validator = Validator(
        store_folder=store,
        case_ids=CaseStore(store).case_ids[:1],
        patch_size=plan.patch_size,
        num_classes=plan.num_classes,
        scores_on_host=scores_on_host,
    )
    assert validator._scores_fit(torch.zeros(1, 8, 8, 8), torch.device("cuda")) != scores_on_host
    result = validator.score(nn.Conv3d(1, 3, 1).cuda(), device=torch.device("cuda"), forward_context=nullcontext)
    assert len(result.by_case) == 1
