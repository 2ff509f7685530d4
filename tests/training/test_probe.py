"""The probe: real steps in real processes under real limits, and what is made of their answers.

The list is that of what went wrong with Ultralytics' AutoBatch: sizes that were never run, optimiser and validation
forgotten, other errors read as a ceiling, a default where nothing fits, an error path that fails itself.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import HardwareConfig, TrainConfig
from pipeline.errors import InputError
from pipeline.losses.segmentation_loss import make_loss
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan, ProbeOutcome, Rung
from pipeline.planning.meter import StepMemory, meter_step
from pipeline.planning.storages import StorageCounter
from pipeline.training import probe_step
from pipeline.training.assembly import make_network
from pipeline.training.probe import STEP_MODULE, probe_plan, run_apart, search_ladder
from pipeline.training.probe_step import StepRequest, make_probed_network, run_step
from pipeline.training.probed_plan import with_probe
from pipeline.training.settings import resolve_settings

MIB = 1024**2
NETWORK = NetworkPlan(
    features_per_stage=(16, 32),
    strides=((1, 1, 1), (2, 2, 2)),
    kernel_sizes=((3, 3, 3), (3, 3, 3)),
    num_blocks_per_stage=(1, 1),
    num_decoder_blocks=1,
    num_groups=2,
)
SMALL = replace(NETWORK, features_per_stage=(4, 8))
LARGE_PATCH = (96, 80, 64)


def make_plan(**changes: Any) -> Plan:
    options: dict[str, Any] = {"patch_size": (12, 20, 8), "precision": "32-true", "network": SMALL}
    options |= {"num_classes": 3, **changes}
    labels = {f"class {index}": index for index in range(options.pop("num_classes"))}
    return Plan(
        dataset_name="made up",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels=labels,
        target_spacing=(1.0, 1.0, 1.0),
        median_shape=LARGE_PATCH,
        memory=MemoryPlan(budget_bytes=1, peak_bytes=10**9, overhead_bytes=0, parts={}),
        **options,
    )


def ladder_plan() -> Plan:
    """Two rungs of some 400 MiB and two of some 130 and 50."""
    rungs = [(LARGE_PATCH, 900), ((64, 56, 48), 300), ((48, 40, 32), 100)]
    fallbacks = tuple(Rung(patch_size=patch, recompute_stages=2, required_bytes=mib * MIB) for patch, mib in rungs)
    return make_plan(patch_size=LARGE_PATCH, network=NETWORK, fallbacks=fallbacks)


def metered_on_cpu(plan: Plan) -> StepMemory:
    """What the meter says of the plan's step."""
    return meter_step(
        make_probed_network(plan, plan.rung),
        make_loss(),
        patch_size=plan.patch_size,
        in_channels=1,
        precision="32-true",
        optimizer=plan.optimizer,
        accumulate_grad_batches=plan.accumulate_grad_batches,
        device_type="cpu",
    )


def probing_processes() -> list[psutil.Process]:
    """Children of this process that run a step; workers that other tests left behind are none of them."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found += [child] if STEP_MODULE in child.cmdline() else []
    return found


# ---- one step in a process of its own


def test_a_plan_that_fits_is_measured_and_leaves_nothing_behind() -> None:
    plan = make_plan(patch_size=(48, 80, 64), network=NETWORK, fallbacks=(Rung(patch_size=(12, 20, 8)),))
    metered = metered_on_cpu(plan).process_bytes
    before = torch.get_rng_state(), random.getstate(), resource.getrlimit(resource.RLIMIT_DATA), Path.cwd()
    probe = probe_plan(plan, budget_bytes=4096 * MIB, device="cpu")
    (tried,) = probe.tried
    assert (probe.device, tried.outcome, tried.rung) == ("cpu", "fits", plan.rung)
    assert probe.fitting == tried
    # Holes that freed blocks leave in the heap are not metered; the meter's own tests compare large steps closely.
    assert metered is not None
    assert 0.7 * metered < tried.measured_bytes < 3 * metered
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), resource.getrlimit(resource.RLIMIT_DATA), Path.cwd()) == before[1:]
    assert not torch.cuda.is_initialized()
    assert not probing_processes()


def test_what_runs_out_of_memory_is_stepped_down_to_a_rung_that_was_run() -> None:
    plan = ladder_plan()
    probe = probe_plan(plan, budget_bytes=220 * MIB, device="cpu")
    ladder = [plan.rung, *plan.fallbacks]
    assert [(ladder.index(each.rung), each.outcome) for each in probe.tried] == [
        (0, "out of memory"),
        (1, "out of memory"),
        (3, "fits"),
        (2, "fits"),
    ]
    assert probe.fitting == probe.tried[3]
    assert "in optimiser step" in probe.tried[0].message
    stepped = with_probe(plan, probe)
    assert stepped.rung.is_same_step(plan.fallbacks[1])
    assert stepped.fallbacks == plan.fallbacks[2:]
    assert stepped.probe == probe


def test_a_limit_that_nothing_fits_is_an_error_that_lists_what_was_run() -> None:
    plan = make_plan(patch_size=LARGE_PATCH, network=NETWORK)
    probe = probe_plan(plan, budget_bytes=64 * MIB, device="cpu")
    assert [each.outcome for each in probe.tried] == ["out of memory"]
    assert probe.fitting is None
    with pytest.raises(InputError, match=r"96 x 80 x 64.*out of memory.*smaller --vram"):
        with_probe(plan, probe)


def test_a_validation_of_many_classes_fits_where_its_training_does() -> None:
    """Scores of 4000 classes would take 188 MiB; neither the training nor the validation ever has them whole."""
    plan = make_plan(patch_size=(16, 32, 24), num_classes=4000)
    (tried,) = probe_plan(plan, budget_bytes=150 * MIB, device="cpu").tried
    assert tried.outcome == "fits"


def test_a_validation_that_does_not_fit_is_found_though_the_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(probe_step, "sliding_window_labels", fail)
    # It prepares a process of its own, which this one is not.
    monkeypatch.setattr(probe_step, "_make_ready", lambda request: None)
    plan = make_plan(patch_size=(16, 32, 24))
    request = StepRequest(plan=plan, rung=plan.rung, device="cpu", budget_bytes=None)
    tried = probe_step.probe_step(request)
    assert tried.outcome == "out of memory"
    assert tried.message.startswith("in the validation window")


def test_a_batch_norm_without_a_second_value_is_an_error_and_no_ceiling() -> None:
    network = replace(SMALL, norm="batch")
    plan = make_plan(patch_size=(2, 2, 2), network=network, fallbacks=(Rung(patch_size=(2, 2, 2), recompute_stages=1),))
    probe = probe_plan(plan, budget_bytes=1024 * MIB, device="cpu")
    (tried,) = probe.tried
    assert tried.outcome == "error"
    assert "Expected more than 1 value per channel" in tried.message
    with pytest.raises(InputError, match=r"Expected more than 1 value.*--probe off"):
        with_probe(plan, probe)


def test_a_process_that_a_signal_ends_is_told_and_is_no_ceiling() -> None:
    plan = ladder_plan()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(probe_plan, plan, budget_bytes=4096 * MIB, device="cpu")
        while not (children := probing_processes()) and not waiting.done():
            sleep(0.01)
        os.kill(children[0].pid, signal.SIGKILL)
        probe = waiting.result()
    (tried,) = probe.tried
    assert (tried.outcome, probe.fitting) == ("died", None)
    assert "SIGKILL" in tried.message
    assert "host memory" in tried.message
    kept = with_probe(plan, probe)
    assert (kept.rung, kept.fallbacks, kept.probe) == (plan.rung, plan.fallbacks, probe)
    assert kept.notes[-1].startswith("Not proven")


def test_a_step_that_does_not_end_is_ended_and_told() -> None:
    request = StepRequest(plan=make_plan(), rung=Rung(patch_size=(12, 20, 8)), device="cpu", budget_bytes=None)
    tried = run_apart(request, timeout_seconds=0.05)
    assert tried.outcome == "timed out"
    assert not probing_processes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_cannot_be_opened_is_no_ceiling() -> None:
    request = StepRequest(plan=make_plan(), rung=Rung(patch_size=(12, 20, 8)), device="cuda", budget_bytes=None)
    tried = run_apart(request)
    assert tried.outcome == "error"
    assert tried.message


# ---- the step itself


def test_the_probed_network_is_that_of_a_training() -> None:
    rung = Rung(patch_size=(12, 20, 8), recompute_stages=2, slab_stages=1, offload_stages=1)
    plan = make_plan(**rung.execution._asdict())
    config = TrainConfig(plan="p", store="s", run_dir="r", hardware=HardwareConfig(accelerator="cpu"))
    trained = make_network(plan, resolve_settings(plan, config))
    probed = make_probed_network(plan, rung)
    assert repr(probed) == repr(trained)
    kinds = (int, bool, tuple)
    assert _plain(probed, kinds) == _plain(trained, kinds)
    assert probed.fused_head
    assert probed.slab_stages == 1


def _plain(module: torch.nn.Module, kinds: tuple[type, ...]) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_probed_step_holds_what_the_meter_says_of_a_training_step(optimizer: str, accumulate: int) -> None:
    plan = make_plan(patch_size=(24, 40, 32), optimizer=optimizer, accumulate_grad_batches=accumulate)
    metered = metered_on_cpu(plan)
    with StorageCounter() as counter:
        for where in run_step(plan, plan.rung, "cpu"):
            if where == "in the validation window":
                break
    # Labels are int16 here and int64 in the meter.
    assert counter.peak_bytes == pytest.approx(metered.peak_bytes - 6 * 24 * 40 * 32, rel=0.02)


def test_averaged_weights_are_held_and_every_part_is_run() -> None:
    parts, peaks = [], []
    for ema in (False, True):
        plan = make_plan(network=replace(SMALL, features_per_stage=(4, 128)), ema=ema)
        with StorageCounter() as counter:
            parts.append([where for where in run_step(plan, plan.rung, "cpu")])
        peaks.append(counter.peak_bytes)
    weights = sum(parameter.nbytes for parameter in make_probed_network(plan, plan.rung).parameters())
    assert peaks[1] - peaks[0] == pytest.approx(weights, rel=0.05)
    expected = ["when the network was made", "in optimiser step 1", "in optimiser step 2", "in the validation window"]
    assert parts == [expected, expected]


# ---- the search


@given(st.lists(st.sampled_from(["fits", "out of memory"]), min_size=1, max_size=20))
def test_the_answer_was_run_and_so_was_the_rung_above_it_whatever_memory_does(outcomes: list[ProbeOutcome]) -> None:
    """Also where more memory is taken by a smaller patch, as algorithms change with the size."""
    run: list[int] = []

    def outcome_of(number: int) -> ProbeOutcome:
        run.append(number)
        return outcomes[number]

    found = search_ladder(len(outcomes), outcome_of)
    assert len(set(run)) == len(run)
    if found is None:
        assert outcomes[run[-1]] == "out of memory"
        assert run[-1] == len(outcomes) - 1
    else:
        assert found in run
        assert outcomes[found] == "fits"
        assert found == 0 or (found - 1 in run and outcomes[found - 1] == "out of memory")


@given(st.integers(0, 40), st.integers(1, 40))
def test_of_rungs_that_take_ever_less_the_first_that_fits_is_found_in_few_steps(first: int, num_rungs: int) -> None:
    run: list[int] = []

    def outcome_of(number: int) -> ProbeOutcome:
        run.append(number)
        return "fits" if number >= first else "out of memory"

    assert search_ladder(num_rungs, outcome_of) == (first if first < num_rungs else None)
    assert len(run) <= 2 * num_rungs.bit_length() + 1


@given(st.data(), st.sampled_from(["error", "died", "timed out", "busy"]))
def test_what_is_no_answer_ends_the_search(data: st.DataObject, outcome: ProbeOutcome) -> None:
    outcomes = data.draw(st.lists(st.sampled_from(["fits", "out of memory", outcome]), min_size=1, max_size=12))
    run: list[ProbeOutcome] = []

    def outcome_of(number: int) -> ProbeOutcome:
        run.append(outcomes[number])
        return outcomes[number]

    found = search_ladder(len(outcomes), outcome_of)
    assert outcome not in run[:-1]
    assert found is None or outcomes[found] == "fits"
