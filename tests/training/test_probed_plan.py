"""What a plan becomes of what a probe found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline import api
from pipeline.artifacts import read_artifact, write_artifact
from pipeline.config import PlanConfig
from pipeline.datasets.fingerprint import CaseFingerprint, ChannelStatistics, Fingerprint
from pipeline.errors import InputError
from pipeline.plan import Plan, Probe, ProbedRung, ProbeOutcome
from pipeline.planning.explain import describe_plan
from pipeline.planning.planner import make_plan
from pipeline.planning.rung_meter import RungMeter
from pipeline.sizes import GIB
from pipeline.synthetic import make_synthetic_case, write_msd_dataset
from pipeline.training.probed_plan import NO_GPU, probed, with_probe, without_probe

CONFIG = PlanConfig(dataset="unused", base_features=4, max_features=8, optimizer="adamw", ema=True)
STATISTICS = ChannelStatistics(lower=0.0, upper=1.0, mean=0.5, std=0.2, minimum=0.0, maximum=1.0)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(scope="module")
def plan() -> Plan:
    case = CaseFingerprint(
        case_id="a",
        patient="a",
        spacing=(1.0, 1.0, 1.0),
        shape=(128, 192, 160),
        cropped_shape=(128, 192, 160),
        voxels_by_class=(1, 1, 1),
    )
    fingerprint = Fingerprint(
        dataset_name="made up",
        channel_names=("T1",),
        labels={"background": 0, "a": 1, "b": 2},
        ignore_value=None,
        channels=(STATISTICS,),
        cases=(case,) * 10,
    )
    return make_plan(fingerprint, CONFIG, budget_bytes=8 * GIB)


def probe_of(plan: Plan, outcomes: dict[int, ProbeOutcome]) -> Probe:
    """A probe that ran rungs by number, 0 being the plan's own, with these outcomes."""
    ladder = [plan.rung, *plan.fallbacks]
    tried = [
        ProbedRung(rung=ladder[number], outcome=outcome, measured_bytes=(9 - number) * GIB, message=f"as in {number}")
        for number, outcome in outcomes.items()
    ]
    return Probe(device="some GPU", budget_bytes=8 * GIB, tried=tuple(tried))


def test_a_plan_that_fits_is_the_same_with_what_was_measured(plan: Plan, tmp_path: Path) -> None:
    found = with_probe(plan, probe_of(plan, {0: "fits"}))
    assert found.probe is not None
    assert replace(found, probe=None, notes=plan.notes) == plan
    assert "took 9.00 GiB" in found.notes[-1]
    assert f"{plan.memory.required_bytes / GIB:.2f} were predicted" in found.notes[-1]
    write_artifact(tmp_path / "plan.json", found)
    assert read_artifact(tmp_path / "plan.json", Plan) == found
    saved = json.loads((tmp_path / "plan.json").read_text())["probe"]["tried"][0]
    assert saved["measured_bytes"] == 9 * GIB
    assert saved["rung"]["required_bytes"] == plan.memory.required_bytes


@pytest.mark.parametrize("number", [1, 3])
def test_a_plan_that_does_not_fit_becomes_the_fallback_that_does(plan: Plan, number: int) -> None:
    assert len(plan.fallbacks) > 3
    outcomes: dict[int, ProbeOutcome] = {0: "out of memory", number - 1: "out of memory", number: "fits"}
    found, rung = with_probe(plan, probe_of(plan, outcomes)), plan.fallbacks[number - 1]
    assert found.rung.is_same_step(rung)
    assert found.rung in found.candidates
    assert found.rung.relative_time == rung.relative_time
    assert found.effective_batch == plan.effective_batch
    assert found.fallbacks == plan.fallbacks[number:]
    assert (found.network, found.channels, found.median_shape) == (plan.network, plan.channels, plan.median_shape)
    meter = RungMeter(config=CONFIG, in_channels=1, num_classes=3, spacing=(1.0, 1.0, 1.0))
    assert found.memory.required_bytes == meter.weighed(rung, network=plan.network).required_bytes
    assert sum(found.memory.parts.values()) == found.memory.peak_bytes < plan.memory.peak_bytes
    assert found.memory.budget_bytes == plan.memory.budget_bytes
    assert found.notes[: len(plan.notes)] == plan.notes
    assert "failed the probe on some GPU" in found.notes[-2]
    assert "as in 0" in found.notes[-2]
    assert "took" in found.notes[-1]


@pytest.mark.parametrize("outcome", ["died", "timed out", "busy"])
def test_what_is_no_answer_changes_nothing_and_is_said(plan: Plan, outcome: ProbeOutcome) -> None:
    found = with_probe(plan, probe_of(plan, {0: outcome}))
    assert replace(found, probe=None, notes=plan.notes) == plan
    assert found.probe is not None
    assert found.probe.fitting is None
    assert found.notes[-1].startswith("Not proven on some GPU")
    assert outcome in found.notes[-1]
    assert "as in 0" in found.notes[-1]


@pytest.mark.parametrize("outcomes", [{0: "error"}, {0: "out of memory", 1: "error"}])
def test_another_error_is_shown_with_its_cause(plan: Plan, outcomes: dict[int, ProbeOutcome]) -> None:
    with pytest.raises(InputError, match=r"step fails.*as in \d.*--probe off"):
        with_probe(plan, probe_of(plan, outcomes))


@pytest.mark.parametrize("outcomes", [{0: "out of memory"}, {0: "out of memory", 1: "died"}])
def test_a_plan_that_does_not_fit_is_not_kept_when_nothing_else_is_known_to(
    plan: Plan, outcomes: dict[int, ProbeOutcome]
) -> None:
    with pytest.raises(InputError, match=r"no rung .* known to fit 8.00 GiB on some GPU.*as in 0"):
        with_probe(plan, probe_of(plan, outcomes))


def test_a_rung_that_fits_is_taken_though_the_search_ended_early(plan: Plan) -> None:
    found = with_probe(plan, probe_of(plan, {0: "out of memory", 1: "out of memory", 3: "fits", 2: "died"}))
    assert found.rung.is_same_step(plan.fallbacks[2])
    assert "died" in found.notes[-2]


def test_the_tables_show_what_was_measured_beside_what_was_predicted(plan: Plan) -> None:
    def shown(each: Plan) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(describe_plan(each))
        return capture.get()

    found = with_probe(plan, probe_of(plan, {0: "fits"}))
    assert "measured on some GPU" in shown(found)
    assert "9.000" in shown(found)
    # A step that was edited by hand afterwards was not measured.
    edited = replace(found, patch_size=plan.fallbacks[-1].patch_size)
    assert "measured on some GPU" not in shown(edited).split("Fallbacks")[0].split("What was looked at")[0]


@needs_no_gpu
def test_without_a_gpu_nothing_is_run_and_the_plan_says_so(plan: Plan) -> None:
    found = probed(plan)
    assert replace(found, notes=plan.notes) == plan
    assert found.notes[-1] == NO_GPU == "Not probed: no GPU here."
    assert "switched off" in without_probe(plan).notes[-1]


@needs_no_gpu
@pytest.mark.parametrize(("probe", "said"), [("auto", "no GPU here"), ("off", "switched off")])
def test_the_plan_command_says_why_nothing_was_run(tmp_path: Path, probe: str, said: str) -> None:
    case = make_synthetic_case(0, shape=(18, 26, 20), spacing=(1.0, 1.2, 0.9), num_classes=3)
    write_msd_dataset(tmp_path / "msd", {"case_0": case})
    out = tmp_path / "plan.json"
    options = {"vram": "2GiB", "base_features": 4, "max_features": 8, "num_workers": 1, "probe": probe}
    api.plan(PlanConfig(dataset=str(tmp_path / "msd"), out=str(out), **options))  # type: ignore[arg-type]
    saved = read_artifact(out, Plan)
    assert saved.probe is None
    assert said in saved.notes[-1]


def test_a_plan_written_before_there_were_probes_is_read(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_artifact(path, plan)
    values = json.loads(path.read_text())
    del values["probe"]
    path.write_text(json.dumps(values))
    assert read_artifact(path, Plan) == plan
