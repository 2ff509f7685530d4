"""The step benchmark measures what it says: the same network and step, composed in other ways."""

from __future__ import annotations

import argparse
import importlib.util
import sys

import pytest
import torch

from pipeline.networks.unet import UNet


@pytest.fixture(scope="module")
def benchmark(project_root):
    spec = importlib.util.spec_from_file_location("step_benchmark", project_root / "scripts" / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["step_benchmark"]


def test_the_plain_composition_has_as_many_weights_and_the_same_shapes(benchmark):
    plan = benchmark.make_plan((4, 8, 12, 16), "group", "plain")
    ours, plain = UNet(1, 3, plan), benchmark.make_plain(UNet(1, 3, plan))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())
    x = torch.randn(1, 1, 8, 16, 24)
    assert [part.shape for part in plain(x)] == [part.shape for part in ours(x)]


def test_every_variant_takes_a_step_and_ratios_are_to_the_first(benchmark):
    plan = benchmark.make_plan((4, 8, 12), "group", "residual")
    args = argparse.Namespace(channels=1, classes=3, batch_size=1, patch_size=(4, 8, 12), device="cpu")
    steps = {variant.name: benchmark.make_step(variant, plan, args) for variant in benchmark.make_variants(3)}
    rows = benchmark.make_rows(benchmark.measure(steps, rounds=1), 4 * 8 * 12)
    assert [row["variant"] for row in rows] == [variant.name for variant in benchmark.make_variants(3)]
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 for row in rows)


def test_the_ratio_is_taken_within_rounds(benchmark):
    rows = benchmark.make_rows({"a": [1.0, 10.0, 2.0], "b": [0.5, 5.0, 1.5]}, 100)
    assert [row["ratio"] for row in rows] == [1.0, 0.5]
    assert rows[1]["voxels_per_second"] == 200
