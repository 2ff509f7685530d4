"""Class weights and overlapping regions against MONAI and torch, with either kind of Dice, and with ignored voxels."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import InputError
from pipeline.losses import chunks
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.slabs.rows import PendingLogits, WholeRows

SHAPE = (5, 7, 9)
REGIONS = ((1, 2, 3), (2, 3), (3,))
WEIGHTS = (0.3, 2.0, 1.1)
OPTIONS = {
    "plain": {},
    "class weights": {"class_weights": WEIGHTS},
    "class weights, Dice too": {"class_weights": WEIGHTS, "weighted_dice": True},
    "weights of whole numbers": {"class_weights": (1, 0, 3)},
    "regions": {"regions": REGIONS},
    "regions, weights": {"regions": REGIONS, "class_weights": WEIGHTS},
    "regions, weights, Dice too": {"regions": REGIONS, "class_weights": WEIGHTS, "weighted_dice": True},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request) -> dict:
    return request.param


def _case(options: dict, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    num_values = 5 if "regions" in options else 3
    return 3 * torch.randn(2, 3, *SHAPE, dtype=dtype), torch.randint(0, num_values, (2, *SHAPE))


def _value_and_gradient(loss, logits, target):
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf, target)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradient_equal_the_reference_losses(options, monai_loss, dtype, tolerance, batch_dice):
    logits, target = _case(options, dtype)
    options = {**options, "batch_dice": batch_dice, "smooth": 1e-3, "dice_weight": 0.7, "ce_weight": 1.9}
    value, gradient = _value_and_gradient(DiceCELoss(**options), logits, target)
    expected, expected_gradient = _value_and_gradient(monai_loss(**options), logits, target)
    assert value.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=tolerance, atol=tolerance * expected_gradient.abs().max().item()
    )


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_large_logits_give_what_float64_gives(options, scale):
    logits, target = _case(options, torch.float32)
    value, gradient = _value_and_gradient(DiceCELoss(**options), logits * scale, target)
    expected, expected_gradient = _value_and_gradient(DiceCELoss(**options), logits.double() * scale, target)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("_chunked")
def test_ignored_voxels_are_as_if_they_were_not_there(options):
    logits, target = _case(options)
    target[:, :, 4:] = 255
    loss = DiceCELoss(**options, ignore_index=255)
    value, gradient = _value_and_gradient(loss, logits, target)
    expected, expected_gradient = _value_and_gradient(loss, logits[:, :, :, :4], target[:, :, :4])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, :, :, :4], expected_gradient, rtol=1e-12, atol=1e-15)
    assert not gradient[:, :, :, 4:].any()


def test_a_target_that_is_all_ignored_costs_nothing(options):
    logits, target = _case(options)
    value, gradient = _value_and_gradient(DiceCELoss(**options), logits, torch.full_like(target, -1))
    assert value == 0
    assert not gradient.any()


def test_a_target_whose_classes_all_have_weight_zero_leaves_the_dice_term():
    logits, target = torch.randn(1, 3, *SHAPE), torch.ones(1, *SHAPE, dtype=torch.int64)
    value, gradient = _value_and_gradient(DiceCELoss(class_weights=(1, 0, 3)), logits, target)
    expected, expected_gradient = _value_and_gradient(DiceCELoss(ce_weight=0), logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_only_the_ratios_of_class_weights_count():
    logits, target = _case({})
    value, gradient = _value_and_gradient(DiceCELoss(class_weights=WEIGHTS), logits, target)
    small = [weight * 1e-6 for weight in WEIGHTS]
    other, other_gradient = _value_and_gradient(DiceCELoss(class_weights=small), logits, target)
    torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-15)


def test_classes_in_no_region_are_background():
    logits, target = torch.randn(1, 1, *SHAPE), torch.randint(0, 5, (1, *SHAPE))
    other = torch.where(target == 2, 2, 90)
    assert torch.equal(
        DiceCELoss(regions=[[2]])(logits, target), DiceCELoss(regions=[[2]])(logits, other.to(torch.uint8))
    )


def test_weights_and_regions_move_with_the_loss_and_are_not_saved(options):
    loss = DiceCELoss(**options)
    assert not loss.state_dict()
    assert all(buffer.is_meta for buffer in loss.to("meta").buffers())


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("options", [{"class_weights": (1.0, 2.0)}, {"regions": ((1,), (2,))}])
def test_options_for_another_number_of_channels_are_refused(options, pending):
    logits, target = _case({})
    head = PendingLogits(WholeRows(logits), torch.randn(3, 3), torch.randn(3))
    with pytest.raises(ValueError, match=r"2 \w+ do not belong to logits \(2, 3, 5, 7, 9\)"):
        DiceCELoss(**options)(head if pending else logits, target)


@pytest.mark.parametrize(
    "options",
    [
        {"weighted_dice": True},
        {"class_weights": (1.0, -1.0)},
        {"class_weights": (1.0, float("nan"))},
        {"class_weights": (1.0, 2.0), "regions": ((1,),)},
        {"regions": ()},
        {"regions": ((1, 2), ())},
        {"regions": ((1, -1),)},
    ],
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(InputError, match=r"weight|regions"):
        DiceCELoss(**options)


def test_negative_targets_that_are_not_ignored_are_no_class_of_a_region():
    loss = DiceCELoss(regions=REGIONS)
    logits, target = _case({"regions": REGIONS})
    target[0, 0, 0, 0] = -2
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
        loss(logits, target)


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_sums_of_thousands_of_chunks_are_those_of_one(monkeypatch, regions):
    """A float32 sum of so many parts counted the voxels wrong by 3e-5."""
    logits = torch.zeros(1, 3, 24, 64, 64)
    logits[:, 1] = 1.3
    target = torch.zeros(1, 24, 64, 64, dtype=torch.int64)
    expected, expected_gradient = _value_and_gradient(DiceCELoss(regions=regions), logits.double(), target)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 31)
    value, gradient = _value_and_gradient(DiceCELoss(regions=regions), logits, target)
    torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-6, atol=0)
