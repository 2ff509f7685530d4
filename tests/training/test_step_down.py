"""Where a training stands on its plan's ladder: options win, rungs that come to nothing less are left out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.inference.streamed_labels import plan_label_memory
from pipeline.inference.windows import SlidingWindow
from pipeline.plan import Rung
from pipeline.run_record import Counts, StepDown
from pipeline.store import CaseStore
from pipeline.training.settings import resolve_settings
from pipeline.training.step_down import Standing, options_in_the_way
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
        ({"hardware": {"recompute_stages": 2}}, [2, 3, 4, 5]),
        ({"hardware": {"recompute_stages": 1}}, [2, 3, 4, 5]),
        ({"hardware": {"slab_stages": 0}}, [1, 2, 3, 4, 5]),
        ({"hardware": {"slab_stages": 1, "recompute_stages": 0}}, [3, 4, 5]),
        ({"hardware": {"recompute_stages": 0}}, [2, 3, 4, 5]),
        ({"hardware": {"recompute_stages": 0, "slab_stages": 0}}, [3, 4, 5]),
        ({"batch_size": 6}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_options_given_by_hand_win_and_leave_every_rung_that_is_another_step_and_not_larger(
    ladder, make_config, options, left
):
    standing = standing_of(ladder, make_config(**options))
    assert numbers(standing) == left
    for name, value in options.get("hardware", {}).items():
        assert {getattr(rung, name) for rung in (standing.rung, *(rung for _, rung in standing.below))} == {value}


@pytest.mark.parametrize(
    ("batch_size", "effective_batch", "batches"),
    [(12, 12, [6, 6, 4, 2, 2]), (3, 6, [3, 3, 3, 1, 1]), (2, 6, [2, 2, 2, 2]), (1, 6, [1, 1, 1, 1])],
)
def test_a_batch_given_by_hand_is_divided_and_its_effective_batch_kept(
    ladder, make_config, batch_size, effective_batch, batches
):
    """Rungs that differ in the batch alone fall together."""
    standing = standing_of(ladder, make_config(batch_size=batch_size, effective_batch=effective_batch))
    assert [rung.batch_size for _, rung in standing.below] == batches
    assert standing.below[-1][1].patch_size == (8, 8, 8)
    assert {rung.effective_batch for _, rung in standing.below} == {effective_batch}


def with_fallbacks(plan, *rungs: Rung):
    """Built past the checks of a plan, with a plain step of two patches on top."""
    laddered = replace(plan, slab_stages=0)
    object.__setattr__(laddered, "fallbacks", rungs)
    return laddered


def below(plan, config, *, own=False) -> list[tuple[int, tuple[int, ...], int]]:
    """Number, patch and batch of the rungs that are left."""
    return [(number, rung.patch_size, rung.batch_size) for number, rung in standing_of(plan, config, own=own).below]


def test_an_option_given_by_hand_that_no_rung_has_leaves_smaller_batches_and_patches(plan, make_config):
    rungs = (
        Rung(patch_size=PATCH, batch_size=2, recompute_stages=2),
        Rung(patch_size=PATCH, batch_size=1, accumulate_grad_batches=2, recompute_stages=2),
        Rung(patch_size=(8, 8, 8), batch_size=1, accumulate_grad_batches=2, recompute_stages=2),
    )
    config = make_config(hardware={"recompute_stages": 1})
    assert below(with_fallbacks(plan, *rungs), config) == [(2, PATCH, 1), (3, (8, 8, 8), 1)]


def test_rungs_that_an_option_given_by_hand_makes_plainer_or_impossible_are_left_out(plan, make_config):
    rungs = (
        Rung(patch_size=PATCH, batch_size=2, slab_stages=1),
        Rung(patch_size=PATCH, batch_size=2, slab_stages=2, offload_stages=1),
        Rung(patch_size=PATCH, batch_size=2, slab_stages=1, offload_stages=1, recompute_stages=2),
        Rung(patch_size=(8, 8, 8), batch_size=2, recompute_stages=1),
    )
    laddered = with_fallbacks(plan, *rungs)
    assert [number for number, *_ in below(laddered, make_config())] == [1, 2, 3, 4]
    plainer = make_config(hardware={"recompute_stages": 0, "offload_stages": 0})
    assert [number for number, *_ in below(laddered, plainer)] == [1, 2, 4]
    stage = make_config(hardware={"slab_stages": 1, "offload_stages": 1, "recompute_stages": 0})
    assert [number for number, *_ in below(laddered, stage)] == [4]
    on_slabs = replace(laddered, slab_stages=1, offload_stages=1)
    assert [number for number, *_ in below(on_slabs, make_config(hardware={"offload_stages": 1}))] == [2, 3]
    fewer = standing_of(laddered, make_config(hardware={"slab_stages": 0})).below
    assert [(number, rung.execution) for number, rung in fewer] == [(3, (2, 0, 0)), (4, (1, 0, 0))]


def test_a_rung_that_falls_together_with_the_first_step_hides_none_above_it(plan, make_config):
    rungs = (
        Rung(patch_size=PATCH, batch_size=1, accumulate_grad_batches=2),
        Rung(patch_size=PATCH, batch_size=2, slab_stages=1),
    )
    assert below(with_fallbacks(plan, *rungs), make_config(), own=True) == [(1, PATCH, 1)]


@pytest.mark.parametrize(
    ("batch_size", "left"),
    [
        ("auto", [(1, PATCH, 4), (3, (8, 8, 8), 4)]),
        (8, [(1, PATCH, 8), (3, (8, 8, 8), 8)]),
        (2, [(1, PATCH, 2), (3, (8, 8, 8), 2)]),
        (1, [(1, PATCH, 1), (3, (8, 8, 8), 1), (4, (8, 8, 4), 1)]),
    ],
)
def test_with_batch_norm_no_rung_trains_with_another_batch(plan, make_config, batch_size, left):
    rungs = (
        Rung(patch_size=PATCH, batch_size=4, recompute_stages=1),
        Rung(patch_size=PATCH, batch_size=1, accumulate_grad_batches=4, recompute_stages=1),
        Rung(patch_size=(8, 8, 8), batch_size=4, recompute_stages=1),
        Rung(patch_size=(8, 8, 4), batch_size=1, accumulate_grad_batches=4, recompute_stages=1),
    )
    network = replace(plan.network, norm="batch")
    laddered = with_fallbacks(replace(plan, batch_size=4, network=network), *rungs)
    assert below(laddered, make_config(batch_size=batch_size, effective_batch=8)) == left
    # Of a network of one's own the plan says nothing.
    assert [batch for *_, batch in below(laddered, make_config(effective_batch=8), own=True)] == [1, 1]


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
        # No window of a validation is run otherwise in the fourth rung than in the third.
        assert taken == [*first, *((number, on_host) for number in ((2, 3, 5) if on_host else (1, 2, 3, 4, 5)))]


def test_a_validation_that_runs_out_of_memory_where_no_rung_helps_it_ends_there(plan, make_config):
    rungs = (
        Rung(patch_size=PATCH, batch_size=2, recompute_stages=1),
        Rung(patch_size=PATCH, batch_size=1, accumulate_grad_batches=2, recompute_stages=1),
    )
    standing = standing_of(with_fallbacks(plan, *rungs), make_config())
    assert standing.step_down("validation", on_gpu=False) is None
    on_host = standing.step_down("validation", on_gpu=True)
    assert (on_host.rung, on_host.below, on_host.scores_on_host) == (standing.rung, standing.below, True)
    assert on_host.step_down("validation", on_gpu=True) is None
    assert standing.step_down("report", on_gpu=False).fallback == 1


@pytest.mark.parametrize(
    ("options", "where", "named"),
    [
        ({}, "forward", []),
        ({"recompute_stages": 0}, "forward", ["hardware.recompute_stages"]),
        ({"recompute_stages": 0}, "validation", []),
        ({"slab_stages": 0}, "validation", ["hardware.slab_stages"]),
        ({"recompute_stages": 0, "slab_stages": 0}, "backward", ["hardware.recompute_stages", "hardware.slab_stages"]),
        ({"offload_stages": 0}, "backward", []),
    ],
    ids=str,
)
def test_only_options_that_lower_rungs_would_have_otherwise_are_in_the_way(plan, make_config, options, where, named):
    rungs = (
        Rung(patch_size=PATCH, batch_size=2, recompute_stages=1),
        Rung(patch_size=PATCH, batch_size=2, slab_stages=1),
    )
    laddered, config = with_fallbacks(plan, *rungs), make_config(hardware=options)
    standing = standing_of(laddered, config)
    assert options_in_the_way(laddered, config, standing, where) == named
    assert options_in_the_way(laddered, config, replace(standing, fallback=2), where) == []


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
    volume, network = torch.zeros(1, 8, 8, 8), nn.Conv3d(1, 3, 1)
    sliding = SlidingWindow(window=plan.patch_size, num_classes=plan.num_classes)
    memory = plan_label_memory(network, (8, 8, 8), sliding, num_channels=1)
    assert validator._scores_fit(volume, memory, torch.device("cuda")) != scores_on_host
    result = validator.score(network.cuda(), device=torch.device("cuda"), forward_context=nullcontext)
    assert len(result.by_case) == 1
