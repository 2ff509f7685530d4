"""The step benchmark measures what it says: the same network and step, composed in other ways."""

from __future__ import annotations

import argparse
import importlib
import sys
from contextlib import ExitStack

import pytest
import torch

from pipeline.networks.unet import UNet


@pytest.fixture(scope="module")
def benchmark(project_root):
    """`scripts/benchmarks/step.py`, imported as when it is run: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(project_root / "scripts" / "benchmarks")
        before = set(sys.modules)
        yield importlib.import_module("step")
        for name in {"step", "rungs", "run_facts", "places", "peers", "peers.nnunet", "peers.dynunet"} - before:
            sys.modules.pop(name, None)


def make_args(**settings):
    small = {"channels": 1, "classes": 3, "batch_size": 1, "patch_size": (4, 8, 12), "device": "cpu"}
    return argparse.Namespace(**small | {"groups": ["basic"], "only": (), "peers": None} | settings)


def test_the_plain_composition_has_as_many_weights_and_the_same_shapes(benchmark):
    plan = benchmark.make_plan((4, 8, 12, 16), "group", "plain")
    ours, plain = UNet(1, 3, plan), benchmark.make_plain(UNet(1, 3, plan))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())
    x = torch.randn(1, 1, 8, 16, 24)
    assert [part.shape for part in plain(x)] == [part.shape for part in ours(x)]


def test_the_plain_loss_is_the_loss_that_ours_trains_with(benchmark):
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 4 * n, 6 * n, 5 * n) for n in (2, 1)]
    target = torch.randint(0, 3, (2, 8, 12, 10))
    plain = benchmark.DeepSupervisionLoss(benchmark.PlainLoss())
    torch.testing.assert_close(plain(logits, target), benchmark.make_loss()(logits, target))


def test_every_basic_variant_takes_a_step_and_ratios_are_to_the_first(benchmark):
    plan = benchmark.make_plan((4, 8, 12), "group", "residual")
    variants = benchmark.make_variants(plan)
    steps = {variant.name: benchmark.make_step(variant, plan, make_args()) for variant in variants}
    first, seconds = benchmark.measure(steps, rounds=1)
    rows = benchmark.make_rows(seconds, 4 * 8 * 12)
    assert [row["variant"] for row in rows] == list(first) == [variant.name for variant in variants]
    assert rows[0]["variant"] == "plain float32"
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)


def test_every_rung_and_peer_takes_the_step_it_is_named_for(benchmark):
    plan = benchmark.make_plan((4, 8, 12), "group", "plain")
    args = make_args(groups=["rungs", "peers"], patch_size=(8, 12, 16))
    steps = benchmark.make_steps(plan, args, ExitStack())
    # The plain way is what the others are compared with.
    assert next(iter(steps)) == "voxfit, plain"
    names = {"voxfit, slabs 1-2 (1 in host memory)", "voxfit, slabs 1, recompute 2-3", "MONAI DynUNet bf16"}
    assert names <= set(steps)
    for step in steps.values():
        assert step() is None


def test_rungs_compute_the_same_gradients(benchmark):
    plan = benchmark.make_plan((4, 8, 12), "group", "plain")
    images, target = torch.randn(1, 1, 8, 12, 16), torch.randint(0, 3, (1, 8, 12, 16))
    gradients = {}
    for variant in benchmark.make_variants(plan, ("rungs",)):
        torch.manual_seed(0)
        network, loss = benchmark._network_and_loss(variant, plan, make_args())
        loss(network(images), target).backward()
        gradients[variant.name] = [parameter.grad for parameter in network.parameters()]
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["voxfit, plain, head not fused"], rtol=1e-4, atol=1e-5)


def test_networks_that_cannot_run_in_slabs_get_no_such_variants(benchmark):
    plan = benchmark.make_plan((4, 8, 12), "group", "residual")
    assert not any(variant.kind.execution.slab_stages for variant in benchmark.make_variants(plan, ("rungs",)))


def test_the_ratio_is_taken_within_rounds(benchmark):
    seconds = {"a": [1.0, 10.0, 2.0], "b": [0.5, 5.0, 1.5]}
    rows = benchmark.make_rows(seconds, 100)
    assert [row["ratio"] for row in rows] == [1.0, 0.5]
    assert rows[1]["voxels_per_second"] == 200
    assert [row["ratio"] for row in benchmark.make_rows(seconds, 100, "b")] == [2.0, 1.0]


def test_the_first_step_is_reported_apart_and_a_step_that_knows_its_seconds_is_believed(benchmark):
    ticks, own = iter(range(100)), iter((30.0, 7.0, 8.0))
    steps = {"here": lambda: None, "elsewhere": lambda: next(own)}
    first, seconds = benchmark.measure(steps, rounds=2, clock=lambda: float(next(ticks)))
    assert first == {"here": 1.0, "elsewhere": 30.0}
    assert seconds == {"here": [1.0, 1.0], "elsewhere": [7.0, 8.0]}


def test_compiling_is_left_out_where_there_is_no_compiler(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    plan = benchmark.make_plan((4, 8), "group", "plain")
    assert not benchmark.make_steps(plan, make_args(groups=["compile"]), ExitStack())
    assert "no C++ compiler" in capsys.readouterr().err
