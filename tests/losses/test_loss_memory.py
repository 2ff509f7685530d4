"""What head and loss keep and what is live beside it, counted storage by storage."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.losses import chunks, fused_head
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.blocks import Head
from pipeline.planning.fake_kernels import MeterFakeMode
from pipeline.planning.storages import StorageCounter
from pipeline.slabs.rows import PendingLogits, WholeRows

MIB = 2**20
REGIONS = {3: [[1, 2, 3], [2, 3], [3]], 118: [[index] for index in range(118)]}


def _count_step(classes: int, shape: tuple[int, int, int], *, fused: bool = True, **options) -> StorageCounter:
    """Forward and backward pass of head and loss from 32 bf16 features, on the tensors of the mode that is active."""
    x = torch.ones(1, 32, *shape, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(1, *shape, dtype=torch.int64)
    head, loss = Head(32, classes), DiceCELoss(**options)
    counter = StorageCounter()
    counter.claim([x], "features")
    counter.claim([target], "target")
    counter.claim(head.parameters(), "head")
    with counter:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = PendingLogits(WholeRows(x), head.weight, head.bias) if fused else head(x)
            value = loss(outputs, target)
        value.backward()
    return counter


def _fake_peak(classes: int, shape: tuple[int, int, int], **options) -> int:
    """Peak bytes without the head's weights."""
    with MeterFakeMode():
        counter = _count_step(classes, shape, **options)
    return counter.peak_bytes - counter.peak_parts()["head"]


@pytest.mark.parametrize("kind", ["classes", "class weights", "regions"])
def test_the_peak_at_118_classes_is_that_at_3(kind):
    """Features and gradient 128 MiB each, target 16; measured 333 MiB at 3, 324 at 118, 339 with 118 regions."""
    options = {
        classes: {
            "classes": {},
            "class weights": {"class_weights": [1.0] * classes},
            "regions": {"regions": REGIONS[classes]},
        }[kind]
        for classes in (3, 118)
    }
    few, many = (_fake_peak(classes, (128, 128, 128), **options[classes]) for classes in (3, 118))
    assert many < 1.15 * few
    assert many < 350 * MIB


def test_nothing_but_blocks_and_chunks_comes_on_top_of_features_gradient_and_target():
    shape = (512, 512, 256)
    volume = 2 * 32 * 2 * 512 * 512 * 256 + 8 * 512 * 512 * 256
    on_top = _fake_peak(118, shape) - volume
    assert on_top < 64 * MIB


def test_logits_of_118_classes_take_more_than_twice_as_much():
    assert _fake_peak(118, (128, 128, 128), fused=False) > 2 * _fake_peak(118, (128, 128, 128))


@pytest.mark.parametrize("fused", [True, False])
def test_fake_tensors_are_counted_as_real_ones_though_only_some_chunks_are_worked_on(fused, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 700)
    monkeypatch.setattr(fused_head, "BLOCK_BYTES", 40_000)
    shape = (23, 10, 12)
    real = _count_step(5, shape, fused=fused)
    with FakeTensorMode():
        fake = _count_step(5, shape, fused=fused)
    assert fake.peak_bytes == real.peak_bytes
    assert fake.peak_parts() == real.peak_parts()


def test_only_features_head_and_target_are_kept_for_the_backward_pass():
    x = torch.randn(1, 7, 3, 4, 5, requires_grad=True)
    head, target = Head(7, 3), torch.zeros(1, 3, 4, 5, dtype=torch.int64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        DiceCELoss()(PendingLogits(WholeRows(x), head.weight, head.bias), target)
    assert {part.data_ptr() for part in kept} == {part.data_ptr() for part in (x, head.weight, head.bias, target)}


def test_features_are_freed_by_the_backward_pass_though_the_value_lives_on():
    leaf, head, target = torch.randn(1, 7, 3, 4, 5, requires_grad=True), Head(7, 3), torch.zeros(1, 3, 4, 5).long()
    features = leaf.tanh()
    alive = weakref.ref(features.untyped_storage())
    value = DiceCELoss()(PendingLogits(WholeRows(features), head.weight, head.bias), target)
    del features
    gc.collect()
    assert alive() is not None
    value.backward()
    assert alive() is None
    assert value.isfinite()


def test_features_that_were_written_to_since_are_noticed():
    leaf, head, target = torch.randn(1, 7, 3, 4, 5, requires_grad=True), Head(7, 3), torch.zeros(1, 3, 4, 5).long()
    features = leaf * 2
    value = DiceCELoss()(PendingLogits(WholeRows(features), head.weight, head.bias), target)
    features.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
