"""A head and its loss in kernels of GPUs against the loss of logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.kernels import head_loss
from pipeline.losses import fused_head, gpu_head
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.slabs.rows import PendingLogits, WholeRows

SHAPE = (5, 4, 7)


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CPU too, with several tiles a block and several blocks."""
    monkeypatch.setattr(head_loss, "NUM_PROGRAMS", 4)
    monkeypatch.setattr(head_loss, "TILE_VALUES", 512)
    monkeypatch.setattr(head_loss, "serves", lambda _features: True)


def make_inputs(
    device: str, num_features: int, num_classes: int, dtype: torch.dtype = torch.float32, *, is_last: bool = True
) -> tuple[list[Tensor], Tensor]:
    """Features, weight and bias; and a target with voxels to be ignored."""
    memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
    features = torch.randn(2, num_features, *SHAPE).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(num_classes, num_features, 1, 1, 1), torch.randn(num_classes)
    target = torch.randint(-1, num_classes, (2, *SHAPE), dtype=torch.int16)
    return [part.to(device).requires_grad_() for part in (features, weight, bias)], target.to(device)


def logits_of(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("kc,bcxyz->bkxyz", weight.flatten(1), features) + bias[:, None, None, None]


def loss_and_gradients(loss: DiceCELoss, inputs: list[Tensor], target: Tensor) -> list[Tensor]:
    features, weight, bias = inputs
    value = loss(PendingLogits(WholeRows(features), weight, bias), target)
    return [value.detach(), *torch.autograd.grad(3 * value, inputs)]


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("num_features", "num_classes", "is_last"), [(8, 2, True), (32, 3, False), (20, 37, True)])
def test_loss_and_gradients_are_those_of_logits_in_float64(
    device, num_features, num_classes, is_last, is_weighted, batch_dice
):
    weights = [0.5 + index for index in range(num_classes)] if is_weighted else None
    loss = DiceCELoss(batch_dice=batch_dice, class_weights=weights).to(device)
    inputs, target = make_inputs(device, num_features, num_classes, is_last=is_last)
    found = loss_and_gradients(loss, inputs, target)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    value = loss(logits_of(*exact), target)
    expected = [value.detach(), *torch.autograd.grad(3 * value, exact)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    assert found[1].stride() == inputs[0].stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_own_digits(device, dtype):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no matrix product of bf16")
    inputs, target = make_inputs(device, 32, 5, dtype)
    found = loss_and_gradients(DiceCELoss().to(device), inputs, target)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    value = DiceCELoss().to(device)(logits_of(*exact), target)
    for mine, theirs in zip(found, [value.detach(), *torch.autograd.grad(3 * value, exact)], strict=True):
        assert float((mine.double() - theirs).norm() / theirs.norm()) < 0.02


def test_a_patch_without_a_voxel_that_counts_has_a_finite_loss_and_no_gradient(device):
    inputs, target = make_inputs(device, 8, 3)
    value, *gradients = loss_and_gradients(DiceCELoss().to(device), inputs, torch.full_like(target, -1))
    assert torch.isfinite(value)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("label", [3, -2])
def test_a_label_that_is_no_class_makes_the_loss_not_a_number(device, label):
    inputs, target = make_inputs(device, 8, 3)
    target[1, 2, 3, 4] = label
    assert torch.isnan(loss_and_gradients(DiceCELoss().to(device), inputs, target)[0])


def test_regions_and_heads_that_fit_no_program_take_the_other_way(device, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(fused_head, "gpu_head_loss", refuse)
    inputs, target = make_inputs(device, 8, 2)
    loss_and_gradients(DiceCELoss(regions=[(1,), (1, 2)]).to(device), inputs, target.clamp(0, 2))
    inputs, target = make_inputs(device, 300, 40)
    loss_and_gradients(DiceCELoss().to(device), inputs, target)
    inputs, target = make_inputs(device, 8, 3)
    with pytest.raises(AssertionError):
        loss_and_gradients(DiceCELoss().to(device), inputs, target)


def test_features_that_are_read_by_rows_take_the_other_way(device):
    inputs, _ = make_inputs(device, 8, 3)

    pending = PendingLogits(WholeRows(inputs[0]), *inputs[1:])
    terms = DiceCELoss()._terms()
    assert gpu_head.gpu_head(pending, terms) is not None
    by_rows = type("ByRows", (), {"handle": inputs[0], "shape": inputs[0].shape, "dtype": inputs[0].dtype})()
    assert gpu_head.gpu_head(PendingLogits(by_rows, *inputs[1:]), terms) is None
