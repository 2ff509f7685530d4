"""Dice + cross entropy against MONAI's loss, against autograd, and with ignored voxels."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from torch import Tensor

from pipeline.losses.dice_ce import DiceCELoss

SHAPE = (5, 7, 9)


def _value_and_gradient(loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


LAYOUTS = {
    "contiguous": lambda logits: logits,
    "channels last": lambda logits: logits.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda logits: logits.transpose(2, 4).contiguous().transpose(2, 4),
    "channels last, transposed": lambda logits: (
        logits.transpose(3, 4).contiguous(memory_format=torch.channels_last_3d).transpose(3, 4)
    ),
}


def _case(num_classes: int, dtype: torch.dtype, *, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(2, num_classes, *SHAPE, dtype=dtype)
    return LAYOUTS[layout](logits), torch.randint(0, num_classes, (2, *SHAPE))


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradient_equal_monai(dtype, tolerance, num_classes, batch_dice, layout):
    logits, target = _case(num_classes, dtype, layout=layout)
    target[1] = target[1].clamp(max=num_classes - 2)
    ours = DiceCELoss(batch_dice=batch_dice, smooth=1e-3, dice_weight=0.7, ce_weight=1.9)
    options = {"smooth_nr": 1e-3, "smooth_dr": 1e-3, "lambda_dice": 0.7, "lambda_ce": 1.9, "batch": batch_dice}
    theirs = MonaiDiceCELoss(include_background=False, softmax=True, to_onehot_y=True, **options)
    value, gradient = _value_and_gradient(ours, logits, target)
    expected, expected_gradient = _value_and_gradient(theirs, logits, target[:, None])
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=tolerance, atol=tolerance * expected_gradient.abs().max().item()
    )


def test_the_gradient_of_a_network_that_permutes_its_output_is_that_of_its_plain_output():
    logits, target = _case(3, torch.float64)
    leaves = [logits.clone().requires_grad_(), logits.transpose(2, 4).contiguous().requires_grad_()]
    DiceCELoss()(leaves[0], target).backward()
    DiceCELoss()(leaves[1].transpose(2, 4), target).backward()
    torch.testing.assert_close(leaves[1].grad.transpose(2, 4), leaves[0].grad, rtol=1e-12, atol=1e-15)


def test_the_default_arguments_are_monais():
    logits, target = _case(3, torch.float64)
    theirs = MonaiDiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)
    torch.testing.assert_close(DiceCELoss()(logits, target), theirs(logits, target[:, None]), rtol=1e-9, atol=0)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("batch_dice", [False, True])
def test_gradients_pass_gradcheck_with_ignored_voxels(batch_dice):
    logits = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(-1, 3, (2, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda x: 3 * DiceCELoss(batch_dice=batch_dice)(x, target), (logits,))


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_ignored_voxels_influence_neither_value_nor_gradient(ignore_index):
    logits, target = _case(3, torch.float64)
    ignored = torch.rand(target.shape) < 0.3
    target[ignored] = ignore_index
    loss = DiceCELoss(ignore_index=ignore_index)
    value, gradient = _value_and_gradient(loss, logits, target)
    other = torch.where(ignored[:, None], 10 * torch.randn_like(logits), logits)
    other_value, other_gradient = _value_and_gradient(loss, other, target)
    assert not gradient.movedim(1, -1)[ignored].any()
    torch.testing.assert_close(other_value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-15)


def test_ignored_voxels_are_as_if_they_were_not_there():
    logits, target = _case(4, torch.float64)
    target[:, :, 4:] = -1
    expected = DiceCELoss()(logits[:, :, :, :4], target[:, :, :4])
    torch.testing.assert_close(DiceCELoss()(logits, target), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_all_ignored_gives_zero_gradients(dtype, batch_dice):
    logits, target = _case(3, dtype)
    value, gradient = _value_and_gradient(DiceCELoss(batch_dice=batch_dice), logits, torch.full_like(target, -1))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_a_target_without_foreground_gives_finite_values_and_gradients(scale):
    logits, target = _case(3, torch.float32)
    logits[:, 0] += scale
    value, gradient = _value_and_gradient(DiceCELoss(), logits, torch.zeros_like(target))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_computed_in_float32(dtype, autocast):
    logits, target = _case(3, dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        value, gradient = _value_and_gradient(DiceCELoss(), logits, target)
    expected, expected_gradient = _value_and_gradient(DiceCELoss(), logits.float(), target)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int64])
def test_the_target_may_have_any_integer_dtype(dtype):
    logits, target = _case(3, torch.float32)
    assert torch.equal(DiceCELoss(ignore_index=255)(logits, target.to(dtype)), DiceCELoss()(logits, target))


def test_only_logits_and_target_are_kept_for_the_backward_pass():
    logits, target = _case(3, torch.bfloat16)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        DiceCELoss()(logits, target)
    assert {tensor.data_ptr() for tensor in kept} == {logits.data_ptr(), target.data_ptr()}


def test_a_target_of_another_shape_is_refused():
    logits, target = _case(3, torch.float32)
    with pytest.raises(ValueError, match="does not belong to logits"):
        DiceCELoss()(logits, target[:, None])
