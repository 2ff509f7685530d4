from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.io.dicom.segment_codes import suggest_segment_codes
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, Execution, MemoryPlan, NormName, Plan, Rung
from pipeline.planning.topology import make_topology
from pipeline.sizes import GIB

NETWORK = make_topology((40, 56, 40), (1.0, 1.0, 1.0))
PLAN = Plan(
    dataset_name="made up",
    fingerprint_hash="0",
    channels=(ChannelPlan(name="T1", scheme="zscore"),),
    labels={"background": 0, "tumour": 2},
    target_spacing=(1.0, 1.0, 1.0),
    median_shape=(35, 50, 36),
    patch_size=(40, 56, 40),
    accumulate_grad_batches=2,
    recompute_stages=2,
    slab_stages=1,
    network=NETWORK,
    memory=MemoryPlan(budget_bytes=8 * GIB, peak_bytes=5, overhead_bytes=2, parts={"input": 5}, host_bytes=3),
    candidates=(
        Rung(
            patch_size=(40, 56, 40),
            accumulate_grad_batches=2,
            recompute_stages=2,
            slab_stages=1,
            required_bytes=7,
            relative_time=1.1,
        ),
        # Of another patch, whose own network has another stride.
        Rung(patch_size=(36, 52, 36), accumulate_grad_batches=2, required_bytes=6),
    ),
    fallbacks=(
        Rung(patch_size=(40, 56, 40), accumulate_grad_batches=2, slab_stages=2, offload_stages=1, host_bytes=3),
        Rung(patch_size=(32, 48, 32), accumulate_grad_batches=2),
    ),
)
# What version 1 did not have from its start on.
LATER = ("slab_stages", "offload_stages", "optimizer", "ema", "candidates", "fallbacks", "segment_codes")


def edited(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    path = tmp_path / "plan.json"
    write_artifact(path, PLAN)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_a_plan_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    assert read_artifact(edited(tmp_path, lambda content: None), Plan) == PLAN


def test_a_plan_from_before_slabs_and_fallbacks_means_what_it_meant(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for key in LATER:
            del content[key]
        del content["memory"]["host_bytes"]

    plan = read_artifact(edited(tmp_path, edit), Plan)
    assert plan.execution == Execution(recompute_stages=2)
    assert (plan.optimizer, plan.ema, plan.candidates, plan.fallbacks) == ("sgd", False, (), ())
    assert plan.memory.host_bytes == 0
    assert plan.segment_codes == {}
    assert plan.rung.required_bytes == 7


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("patch_size", to=[40, 55, 40]),
            r"patch_size: \[40, 55, 40\] is not a multiple of the network's stride \[8, 8, 8\];"
            r" the next larger that is: \[40, 56, 40\]",
        ),
        (change("network", "depth", to=5), r"network\.depth: unknown key"),
        (change("schema_version", to=99), r"has schema version 99, this voxfit reads version 1"),
        (change("batch_size", to="two"), r"batch_size: input should be a valid integer"),
        (change("recompute_stages", to=5), r"recompute_stages: must be 0 to 4, got 5"),
        (change("slab_stages", to=-1), r"slab_stages: must be 0 to 4, got -1"),
        (change("offload_stages", to=2), r"offload_stages: must be 0 to slab_stages \(1\), got 2"),
        (change("network", "norm", to="batch"), r"slab_stages: must be 0 with plain blocks and batch norm"),
        (change("network", "block", to="residual"), r"slab_stages: must be 0 with residual blocks and group norm"),
        (change("optimizer", to="lion"), r"optimizer: input should be 'sgd' or 'adamw'"),
        (
            change("fallbacks", 1, "patch_size", to=[36, 48, 32]),
            r"fallbacks\.1\.patch_size: \[36, 48, 32\] is not a multiple of the network's stride \[8, 8, 8\]",
        ),
        (change("fallbacks", 0, "slab_stages", to=9), r"fallbacks\.0\.slab_stages: must be 0 to 4, got 9"),
        (
            change("fallbacks", 1, "accumulate_grad_batches", to=1),
            r"batch_size x accumulate_grad_batches: must be the same .* 2 at the top .* and 1 in fallbacks\.1;",
        ),
        (change("fallbacks", 0, "speed", to=1), r"fallbacks\.0\.speed: unknown key"),
        (change("candidates", 1, "patch_size", to=[0, 8, 8]), r"candidates\.1\.patch_size: must be positive"),
        (change("candidates", 0, "batch_size", to=0), r"candidates\.0\.batch_size: must be at least 1"),
        (change("network", "strides", 3, to=[2, 0, 2]), r"network\.strides\.3: must be at least 1, got \[2, 0, 2\]"),
        (change("network", "strides", 1, to=[2, -2, 2]), r"network\.strides\.1: must be at least 1"),
        (change("network", "strides", 0, to=[2, 2, 2]), r"network\.strides\.0: must be \[1, 1, 1\]"),
        (
            change("network", "features_per_stage", 0, to=0),
            r"network\.features_per_stage\.0: must be at least 1, got 0",
        ),
        (change("network", "features_per_stage", 2, to=-8), r"network\.features_per_stage\.2: must be at least 1"),
        (change("network", "kernel_sizes", 0, to=[0, 3, 3]), r"network\.kernel_sizes\.0: must be odd and at least 1"),
        (change("network", "kernel_sizes", 1, to=[3, 2, 3]), r"network\.kernel_sizes\.1: must be odd and at least 1"),
        (change("network", "num_blocks_per_stage", 1, to=0), r"network\.num_blocks_per_stage\.1: must be at least 1"),
        (change("network", "num_decoder_blocks", to=0), r"network\.num_decoder_blocks: must be at least 1, got 0"),
        (change("network", "num_decoder_blocks", to=-1), r"network\.num_decoder_blocks: must be at least 1, got -1"),
        (change("memory", "budget_bytes", to=-5), r"memory\.budget_bytes: must be at least 0, got -5"),
        (change("memory", "overhead_bytes", to=-1), r"memory\.overhead_bytes: must be at least 0"),
        (change("memory", "parts", to={"input": 6, "head": -1}), r"memory\.parts\.head: must be at least 0, got -1"),
        (change("memory", "parts", to={"input": 1}), r"memory\.parts: must add up to peak_bytes \(5\), got 1"),
        (change("fallbacks", 0, "required_bytes", to=-1), r"fallbacks\.0\.required_bytes: must be at least 0, got -1"),
        (change("fallbacks", 1, "relative_time", to=float("inf")), r"fallbacks\.1\.relative_time: .* finite number"),
        (change("candidates", 1, "relative_time", to=float("nan")), r"candidates\.1\.relative_time: .* finite number"),
        (change("channels", 0, "std", to=0.0), r"channels\.0\.std: must be positive, got 0\.0"),
        (change("channels", 0, "lower", to=1.0), r"channels\.0\.lower: 1\.0 is above upper \(0\.0\)"),
        (change("target_spacing", to=[1.0, 0.0, 1.0]), r"target_spacing: must be positive"),
    ],
)
def test_a_plan_spoilt_by_hand_is_one_clear_error(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = edited(tmp_path, edit)
    with pytest.raises(InputError, match=message) as caught:
        read_artifact(path, Plan)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_edited_batch_is_told_once_with_the_keys_to_change(tmp_path: Path) -> None:
    path = edited(tmp_path, change("batch_size", to=2))
    with pytest.raises(InputError, match=r"change accumulate_grad_batches as well.* or delete fallbacks") as caught:
        read_artifact(path, Plan)
    assert str(caught.value).count("accumulate_grad_batches: must be the same") == 1
    assert "is 4 at the top of the file and 2 in fallbacks.0, fallbacks.1" in str(caught.value)


@pytest.mark.parametrize(
    ("norm", "num_groups", "is_refused"), [("instance", 1, True), ("group", 512, True), ("group", 32, False)]
)
def test_a_single_voxel_is_refused_only_where_a_norm_has_no_second_value(
    norm: NormName, num_groups: int, is_refused: bool
) -> None:
    network = replace(NETWORK, norm=norm, num_groups=num_groups)
    problems = Rung(patch_size=(8, 8, 8)).problems(network)
    assert not Rung(patch_size=(8, 16, 8)).problems(network)
    assert bool(problems) == is_refused
    batch = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="more than 1 value") if is_refused else nullcontext():
        UNet(1, 2, network).train()(batch)
    if is_refused:
        assert f"patch_size: [8, 8, 8] leaves a single voxel in stage 4, where {norm} norm" in problems[0]


def test_the_chosen_rung_is_found_among_the_candidates_and_nothing_is_predicted_of_it_after_an_edit() -> None:
    assert PLAN.rung == PLAN.candidates[0]
    changed = replace(PLAN, recompute_stages=0, fallbacks=())
    assert changed.rung.execution == Execution(slab_stages=1)
    assert (changed.rung.required_bytes, changed.rung.host_bytes, changed.rung.relative_time) == (0, 0, 1.0)


def test_without_candidates_the_plan_s_own_memory_is_what_is_predicted() -> None:
    rung = replace(PLAN, candidates=()).rung
    assert (rung.required_bytes, rung.host_bytes) == (PLAN.memory.required_bytes, PLAN.memory.host_bytes)


def test_an_optimizer_other_than_the_planned_one_is_told() -> None:
    assert PLAN.optimizer_warning("sgd", ema=False) == ""
    warning = PLAN.optimizer_warning("adamw", ema=True)
    assert "metered for sgd, but the training uses adamw with averaged weights" in warning
    assert "sgd with averaged weights" in PLAN.optimizer_warning("sgd", ema=True)


def test_codes_of_classes_come_back_from_the_file_and_their_problems_are_named(tmp_path: Path) -> None:
    codes = suggest_segment_codes(["tumour"])
    plan = replace(PLAN, segment_codes=codes)
    write_artifact(tmp_path / "plan.json", plan)
    assert read_artifact(tmp_path / "plan.json", Plan) == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    content["segment_codes"]["tumour"]["type"] = {"value": "", "scheme": "SCT", "meaning": "x" * 65}
    content["segment_codes"]["tumor"] = content["segment_codes"]["background"] = content["segment_codes"]["tumour"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_artifact(tmp_path / "plan.json", Plan)
    assert "segment_codes.tumor: must be a class other than the background (tumour)" in str(caught.value)
    assert "segment_codes.background: must be a class" in str(caught.value)
    assert "segment_codes.tumour.type.value: must not be empty" in str(caught.value)
    assert "segment_codes.tumour.type.meaning: must have at most 64 characters, got 65" in str(caught.value)
