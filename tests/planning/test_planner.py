from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.config import PlanConfig
from pipeline.datasets.class_order import ClassOrder
from pipeline.datasets.fingerprint import Fingerprint
from pipeline.errors import InputError
from pipeline.plan import Execution, Plan
from pipeline.planning.budget import CONTEXT_BYTES, estimate_overhead_bytes
from pipeline.planning.candidates import fallback_patches, patch_candidates
from pipeline.planning.explain import describe_plan
from pipeline.planning.ladder import LEAST_SAVED_BYTES, list_fallbacks
from pipeline.planning.planner import make_plan, normalization_scheme
from pipeline.planning.rung_meter import RungMeter
from pipeline.planning.topology import round_up_patch
from pipeline.sizes import GIB

MIB = 1024**2
FingerprintOf = Callable[..., Fingerprint]


def tiny_config(**options: Any) -> PlanConfig:
    return PlanConfig(dataset="unused", **{"base_features": 4, "max_features": 8, **options})


def required_bytes(plan: Plan) -> int:
    return plan.memory.peak_bytes + plan.memory.overhead_bytes


@pytest.fixture(scope="module")
def plan(fingerprint_of: FingerprintOf) -> Plan:
    return make_plan(fingerprint_of((35, 50, 36)), tiny_config(), budget_bytes=8 * GIB, budget_note="As on the box.")


@given(
    shape=st.tuples(st.integers(10, 40), st.integers(20, 48), st.integers(10, 31)),
    coarse=st.sampled_from([1.0, 1.7, 5.0]),
    mebibytes=st.integers(2, 12),
)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_a_plan_fits_its_budget_its_network_and_its_data(
    fingerprint_of: FingerprintOf, shape: tuple[int, int, int], coarse: float, mebibytes: int
) -> None:
    spacing = (1.0, 1.1, coarse)
    budget_bytes = CONTEXT_BYTES + mebibytes * MIB
    plan = make_plan(fingerprint_of(shape, spacing), tiny_config(), budget_bytes=budget_bytes)
    assert required_bytes(plan) <= budget_bytes == plan.memory.budget_bytes
    assert plan.memory.overhead_bytes == estimate_overhead_bytes(plan.memory.peak_bytes)
    assert sum(plan.memory.parts.values()) == plan.memory.peak_bytes
    assert plan.patch_size in patch_candidates(shape, spacing)
    assert all(a <= b for a, b in zip(plan.patch_size, round_up_patch(shape, spacing), strict=True))
    assert plan.recompute_stages == 0 or plan.patch_size != patch_candidates(shape, spacing)[-1]


def test_less_memory_first_costs_time_and_then_field_of_view(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((24, 20, 28))
    whole = make_plan(fingerprint, tiny_config(offload="off"), budget_bytes=8 * GIB)
    assert (whole.patch_size, whole.execution) == ((24, 20, 28), Execution())
    plans = [
        make_plan(
            fingerprint, tiny_config(offload="off"), budget_bytes=CONTEXT_BYTES + int(share * whole.memory.peak_bytes)
        )
        for share in (1.0, 0.4)
    ]
    assert plans[0].patch_size == whole.patch_size
    assert plans[0].rung.relative_time > 1
    voxels = [prod(plan.patch_size) for plan in (whole, *plans)]
    assert voxels == sorted(voxels, reverse=True)
    assert voxels[-1] < voxels[0]
    assert f"The step is run with {plans[0].execution}" in " ".join(plans[0].notes)
    assert "next larger" in " ".join(plans[1].notes)


def test_classes_get_coded_terms_for_segmentations(fingerprint_of: FingerprintOf) -> None:
    fingerprint = replace(fingerprint_of((24, 20, 28)), labels={"background": 0, "liver": 1, "thing": 2})
    codes = make_plan(fingerprint, tiny_config(), budget_bytes=8 * GIB).segment_codes
    assert {name: code.type.scheme for name, code in codes.items()} == {"liver": "SCT", "thing": "99VOXFIT"}


def test_no_more_time_is_spent_than_allowed(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((24, 20, 28))
    whole = make_plan(fingerprint, tiny_config(), budget_bytes=8 * GIB)
    budget_bytes = CONTEXT_BYTES + whole.memory.peak_bytes
    plain_only = make_plan(fingerprint, tiny_config(max_relative_time=1.0), budget_bytes=budget_bytes)
    assert plain_only.execution == Execution()
    assert prod(plain_only.patch_size) < prod(whole.patch_size)
    assert required_bytes(plain_only) <= budget_bytes


def test_candidates_hold_the_choice_its_alternatives_and_its_neighbours(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((32, 48, 40))
    whole = make_plan(fingerprint, tiny_config(offload="off"), budget_bytes=8 * GIB)
    plan = make_plan(
        fingerprint, tiny_config(offload="off"), budget_bytes=CONTEXT_BYTES + int(0.5 * whole.memory.peak_bytes)
    )
    patches = patch_candidates((32, 48, 40), (1.0, 1.0, 1.0))
    index = patches.index(plan.patch_size)
    shown = {rung.patch_size for rung in plan.candidates}
    assert index > 0
    assert set(patches[index - 1 : index + 3]) <= shown
    assert plan.rung in plan.candidates
    fitting = [rung for rung in plan.candidates if rung.required_bytes <= plan.memory.budget_bytes]
    assert max(prod(rung.patch_size) for rung in fitting) == prod(plan.patch_size)
    same = [rung for rung in fitting if rung.patch_size == plan.patch_size and not rung.offload_stages]
    assert min(rung.relative_time for rung in same or [plan.rung]) == plan.rung.relative_time
    assert any(rung.execution == Execution() for rung in fitting)


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 2, "effective_batch": 4}, {"norm": "batch"}, {"offload": "off"}]
)
def test_fallbacks_train_the_same_network_with_ever_less(
    fingerprint_of: FingerprintOf, options: dict[str, Any]
) -> None:
    config = tiny_config(base_features=16, max_features=32, **options)
    plan = make_plan(fingerprint_of((64, 96, 160)), config, budget_bytes=8 * GIB)
    rungs = [plan.rung, *plan.fallbacks]
    assert len(rungs) > 3
    for before, after in pairwise(rungs):
        assert after.required_bytes <= before.required_bytes - 20 * MIB
        assert after.effective_batch == before.effective_batch == plan.effective_batch
        # One thing gives way at a time: the batch, then the way of running, then the patch.
        assert (prod(after.patch_size), after.batch_size) <= (prod(before.patch_size), before.batch_size)
        assert after.batch_size == before.batch_size or after.execution == before.execution
    meter = RungMeter(config=config, in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    assert not any(rung.problems(plan.network) for rung in rungs)
    for rung in (rungs[1], rungs[-1]):
        assert rung == meter.weighed(rung, network=plan.network)
    assert [rung.batch_size for rung in rungs[:2]] == [options.get("batch_size", 1), 1]
    assert prod(rungs[-1].patch_size) < 0.4 * prod(plan.patch_size)
    if options:
        assert not any(rung.offload_stages for rung in rungs) or "batch_size" in options


def test_no_fallback_is_listed_or_metered_where_nothing_much_is_left_to_save(fingerprint_of: FingerprintOf) -> None:
    plan = make_plan(fingerprint_of((16, 20, 12)), tiny_config(batch_size=2), budget_bytes=8 * GIB)
    assert plan.fallbacks == ()
    assert "No rung below this one would save enough" in " ".join(plan.notes)
    meter = RungMeter(config=tiny_config(), in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    chosen = meter.families((16, 24, 16), 1)[0][0]
    assert list_fallbacks(meter, chosen) == ()
    assert len(meter._known) == 1


def test_of_fallback_patches_that_save_too_little_only_the_smallest_is_metered(fingerprint_of: FingerprintOf) -> None:
    meter = RungMeter(config=tiny_config(), in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    chosen = meter.families((64, 64, 64), 1)[0][0]
    fallbacks = list_fallbacks(meter, chosen)
    assert fallbacks
    leanest = fallbacks[-1]
    network = meter.network_plan(chosen.patch_size)
    patches = list(fallback_patches(leanest.patch_size, network.total_stride))
    known = {step[1] for step in meter._known}
    assert leanest.patch_size == chosen.patch_size
    assert known == {chosen.patch_size, patches[-1]} != {chosen.patch_size, *patches}


def test_fallback_patches_that_are_not_metered_would_save_too_little(fingerprint_of: FingerprintOf) -> None:
    config = tiny_config(base_features=16, max_features=64)
    meter = RungMeter(config=config, in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    chosen = meter.families((40, 56, 40), 1)[0][0]
    network = meter.network_plan(chosen.patch_size)
    fallbacks = list_fallbacks(meter, chosen)
    metered = {step[1] for step in meter._known}
    smaller = [rung for rung in fallbacks if rung.patch_size != chosen.patch_size]
    before = fallbacks[-len(smaller) - 1]
    patches = list(fallback_patches(chosen.patch_size, network.total_stride))
    skipped = [patch for patch in patches if patch not in metered]
    assert smaller
    assert skipped
    for patch in skipped:
        assert prod(patch) > prod(smaller[0].patch_size)
        weighed = meter.weighed(replace(before, patch_size=patch), network=network)
        assert before.required_bytes - weighed.required_bytes < LEAST_SAVED_BYTES


def test_offload_is_named_with_the_host_memory_that_it_takes(fingerprint_of: FingerprintOf) -> None:
    shape = (64, 96, 96)
    fingerprint, config = fingerprint_of(shape), tiny_config(patch_size=shape, base_features=16, max_features=32)
    without = make_plan(fingerprint, replace(config, offload="off"), budget_bytes=8 * GIB)
    least = min(rung.required_bytes for rung in [without.rung, *without.fallbacks] if rung.patch_size == shape)
    plan = make_plan(fingerprint, config, budget_bytes=least - 24 * MIB)
    assert plan.offload_stages > 0
    assert plan.memory.host_bytes == plan.rung.host_bytes > 0
    assert "pinned host memory" in " ".join(plan.notes)
    assert ") (" not in " ".join(plan.notes)
    with pytest.raises(InputError, match=r"patch_size 64 x 96 x 96 does not fit .* Give a smaller patch_size or"):
        make_plan(fingerprint, replace(config, offload="off"), budget_bytes=least - 24 * MIB)


def test_the_optimizer_and_averaged_weights_are_counted_and_written_down(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((16, 20, 12))
    sgd = make_plan(fingerprint, tiny_config(optimizer="sgd"), budget_bytes=GIB)
    adamw = make_plan(fingerprint, tiny_config(optimizer="adamw", ema=True), budget_bytes=GIB)
    assert (sgd.optimizer, sgd.ema, adamw.optimizer, adamw.ema) == ("sgd", False, "adamw", True)
    assert adamw.memory.peak_bytes > sgd.memory.peak_bytes
    assert "with AdamW and averaged weights" in " ".join(adamw.notes)


def test_a_small_volume_is_taken_whole(plan: Plan) -> None:
    assert plan.patch_size == (40, 56, 40)
    assert plan.median_shape == (35, 50, 36)
    assert plan.recompute_stages == 0
    assert (plan.batch_size, plan.accumulate_grad_batches) == (1, 2)


def test_every_rung_that_is_shown_is_metered(fingerprint_of: FingerprintOf) -> None:
    plan = make_plan(fingerprint_of((24, 60, 30)), tiny_config(), budget_bytes=8 * GIB)
    meter = RungMeter(config=tiny_config(), in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    assert len({rung.patch_size for rung in plan.candidates}) > 2
    assert all(rung == meter.weighed(rung) for rung in plan.candidates)


def test_every_choice_has_its_reason(plan: Plan) -> None:
    text = " ".join(plan.notes)
    assert plan.notes[0] == "As on the box."
    assert all(note.endswith(".") for note in plan.notes)
    for word in (
        "median of 10 cases",
        "whole median case",
        "the plain step fits",
        "effective batch of 2",
        "an estimate",
    ):
        assert word in text


def test_axes_on_which_classes_keep_an_order_are_not_mirrored(fingerprint_of: FingerprintOf) -> None:
    orders = tuple(
        ClassOrder(axis=axis, lower="class 2", upper="class 1", share=share, num_cases=40)
        for axis, share in enumerate((0.6, 0.975, 0.89))
    )
    fingerprint = replace(fingerprint_of((16, 24, 16)), class_orders=orders)
    plan = make_plan(fingerprint, tiny_config(), budget_bytes=8 * GIB)
    assert plan.mirror_axes == (0, 2)
    (note,) = [note for note in plan.notes if "mirrored" in note]
    for word in ("Axis 1 (back-front)", "class 1 lies further to the front than class 2 in 98% of 40 cases"):
        assert word in note


def test_an_automatic_batch_fills_the_budget_once_the_volume_is_covered(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((24, 30, 16), num_cases=100)
    plan = make_plan(fingerprint, tiny_config(batch_size="auto", effective_batch=4), budget_bytes=8 * GIB)
    # At most 5% of the dataset's voxels in an iteration: 100 cases of 24 x 30 x 16 in patches of 24 x 32 x 16.
    assert (plan.batch_size, plan.accumulate_grad_batches) == (4, 1)
    assert required_bytes(plan) <= 8 * GIB
    fixed = make_plan(fingerprint, tiny_config(batch_size=2, effective_batch=4), budget_bytes=8 * GIB)
    assert (fixed.batch_size, fixed.accumulate_grad_batches) == (2, 2)
    assert fixed.memory.peak_bytes < plan.memory.peak_bytes


def test_a_given_effective_batch_bounds_an_automatic_batch(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((48, 60, 32), num_cases=150)
    free = make_plan(fingerprint, tiny_config(batch_size="auto"), budget_bytes=8 * GIB)
    assert (free.batch_size, free.accumulate_grad_batches) == (7, 1)
    bound = make_plan(fingerprint, tiny_config(batch_size="auto", effective_batch=6), budget_bytes=8 * GIB)
    assert (bound.batch_size, bound.accumulate_grad_batches) == (6, 1)
    assert "divides effective_batch 6" in " ".join(bound.notes)
    assert {rung.effective_batch for rung in free.fallbacks} == {7}


def test_an_effective_batch_left_to_the_planner_is_two_or_the_batch() -> None:
    meters = [
        RungMeter(config=tiny_config(batch_size=size), in_channels=1, num_classes=2, spacing=(1.0, 1.0, 1.0))
        for size in (1, 2, 5)
    ]
    batches = [meter.families((16, 16, 16), meter.config.batch_size)[0][0].effective_batch for meter in meters]
    assert batches == [2, 2, 5]


def test_batch_norm_with_a_batch_of_one_is_warned_of(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((16, 20, 12), num_cases=1)
    notes = [
        " ".join(make_plan(fingerprint, tiny_config(norm="batch", batch_size=size), budget_bytes=GIB).notes)
        for size in (1, 2)
    ]
    assert ["Warning: with batch 1 a batch norm" in text for text in notes] == [True, False]
    assert "is the median of 1 case per axis" in notes[0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_cases_without_voxels_to_train_on_are_one_clear_error(
    fingerprint_of: FingerprintOf, shape: tuple[int, int, int]
) -> None:
    if shape == (2, 2, 2):
        assert make_plan(fingerprint_of(shape), tiny_config(), budget_bytes=GIB).patch_size == shape
        return
    with pytest.raises(InputError, match=r"made up: patch_size: \[1, 1, 1\] leaves a single voxel.*median case is 1"):
        make_plan(fingerprint_of(shape), tiny_config(), budget_bytes=GIB)


def test_nothing_fits_is_an_error_that_lists_the_smallest_patches(fingerprint_of: FingerprintOf) -> None:
    with pytest.raises(
        InputError, match=r"vram: no patch fits into 0\.85 GiB.*16 x 16 x 16 \(.*needs 0\.85[1-9] GiB"
    ) as caught:
        make_plan(fingerprint_of((20, 24, 16)), tiny_config(), budget_bytes=CONTEXT_BYTES + 1024)
    assert "\n" not in str(caught.value)
    assert "in host memory" in str(caught.value)


def test_a_given_patch_is_kept_and_run_leaner_where_it_must_be(fingerprint_of: FingerprintOf) -> None:
    fingerprint, config = fingerprint_of((64, 96, 48)), tiny_config(patch_size=(24, 40, 12))
    plain = make_plan(fingerprint, config, budget_bytes=8 * GIB)
    assert (plain.patch_size, plain.execution) == ((24, 40, 12), Execution())
    tight = make_plan(fingerprint, config, budget_bytes=CONTEXT_BYTES + plain.memory.peak_bytes)
    assert tight.patch_size == (24, 40, 12)
    assert tight.execution != Execution()


def test_a_given_patch_that_does_not_suit_the_network_names_one_that_does(fingerprint_of: FingerprintOf) -> None:
    with pytest.raises(InputError, match=r"patch_size: 33 x 48 x 32 is not a multiple.*40 x 48 x 32"):
        make_plan(fingerprint_of((64, 96, 48)), tiny_config(patch_size=(33, 48, 32)), budget_bytes=8 * GIB)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "ct") for name in ("CT", "ct", "low_dose CT", "CT-portal")),
        *((name, "zscore") for name in ("T1", "PET", "CTA", "fact", "0000")),
    ],
)
def test_only_the_word_ct_means_hounsfield_units(name: str, scheme: str) -> None:
    assert normalization_scheme(name) == scheme


def test_channels_are_normalised_each_in_its_own_way(fingerprint_of: FingerprintOf) -> None:
    fingerprint = fingerprint_of((16, 20, 12), channel_names=("CT", "PET"))
    ct, pet = make_plan(fingerprint, tiny_config(block="residual"), budget_bytes=GIB).channels
    assert (ct.scheme, ct.lower, ct.upper, ct.mean, ct.std) == ("ct", -950.0, 1200.0, 90.0, 250.0)
    assert (pet.scheme, pet.mean, pet.std) == ("zscore", 0.0, 1.0)
    forced = make_plan(fingerprint, tiny_config(block="residual", normalization="none"), budget_bytes=GIB).channels
    assert [channel.scheme for channel in forced] == ["none", "none"]


@pytest.mark.parametrize(
    ("planes", "expected"),
    [((16, 16, 16), False), ((16, 20, 400), False), ((16, 22, 22), True), ((24, 24, 16, 20), True)],
)
def test_the_body_mask_is_decided_once_by_the_median_case(
    fingerprint_of: FingerprintOf, planes: tuple[int, ...], expected: bool
) -> None:
    # Cropped cases have 16 planes: of 20 that is 80%, of 22 it is 73%, of 24 it is 67%.
    full_shapes = tuple((n, 20, 12) for n in planes)
    fingerprint = fingerprint_of((16, 20, 12), channel_names=("T1", "CT", "T2"), full_shapes=full_shapes)
    plan = make_plan(fingerprint, tiny_config(block="residual"), budget_bytes=GIB)
    assert [channel.use_body_mask for channel in plan.channels] == [expected, False, expected]
    notes = [note for note in plan.notes if "over the body alone" in note]
    assert len(notes) == expected
    assert not expected or "T1, T2" in notes[0]
    forced = make_plan(fingerprint, tiny_config(block="residual", normalization="none"), budget_bytes=GIB)
    assert not any(channel.use_body_mask for channel in forced.channels)


def test_the_description_shows_the_choice_the_memory_and_every_reason(plan: Plan) -> None:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(describe_plan(plan))
    text = capture.get()
    for part in ("40 x 56 x 40", "T1 (zscore)", "overhead (estimate)", f"{required_bytes(plan) / GIB:.3f}"):
        assert part in text
    assert all(name in text for name in plan.memory.parts)
    for rung in (*plan.candidates, *plan.fallbacks):
        assert f"{rung.required_bytes / GIB:.2f}" in text
        assert str(rung.execution) in text
    assert text.count("chosen") == 1
    assert all(note in text for note in plan.notes)
