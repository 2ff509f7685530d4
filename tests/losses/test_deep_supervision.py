"""One loss over several resolutions: weights, targets, and every form networks return."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DeepSupervisionLoss as MonaiDeepSupervisionLoss
from monai.losses import DiceCELoss as MonaiDiceCELoss
from monai.networks.nets import DynUNet
from torch import nn
from torch.nn import functional as F

from pipeline.losses.deep_supervision import DeepSupervisionLoss, downsample_target
from pipeline.losses.dice_ce import DiceCELoss

SHAPE = (4, 8, 12)


class _Mean(nn.Module):
    def forward(self, logits, target):
        assert target.shape[1:] == logits.shape[2:]
        return logits.mean()


def test_weights_halve_and_sum_to_one():
    outputs = [torch.full((1, 2, 4 // s, 8 // s, 12 // s), float(value)) for s, value in ((1, 7), (2, 70), (4, 700))]
    value = DeepSupervisionLoss(_Mean())(outputs, torch.zeros(1, *SHAPE, dtype=torch.int64))
    assert value.item() == pytest.approx((4 * 7 + 2 * 70 + 700) / 7)


def test_a_tensor_a_list_of_one_and_a_stack_of_one_are_the_same():
    logits, target = torch.randn(2, 3, *SHAPE), torch.randint(0, 3, (2, *SHAPE))
    loss = DeepSupervisionLoss(DiceCELoss())
    expected = DiceCELoss()(logits, target)
    for outputs in (logits, [logits], (logits,), logits[:, None]):
        assert torch.equal(loss(outputs, target), expected)


def test_lists_of_one_resolution_equal_monais_deep_supervision():
    outputs = [torch.randn(2, 3, *SHAPE, dtype=torch.float64) for _ in range(3)]
    target = torch.randint(0, 3, (2, *SHAPE))
    plain = MonaiDiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)
    # MONAI's sums in float32 whatever the logits are.
    expected = MonaiDeepSupervisionLoss(plain, weights=[4 / 7, 2 / 7, 1 / 7])(outputs, target[:, None])
    torch.testing.assert_close(DeepSupervisionLoss(DiceCELoss())(outputs, target).float(), expected, rtol=1e-5, atol=0)


def test_the_stack_of_dynunet_is_taken_in_training_and_its_tensor_in_evaluation():
    network = DynUNet(
        3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=(4, 6, 8, 8), deep_supervision=True, deep_supr_num=2
    )
    x, target = torch.randn(2, 1, 8, 16, 24), torch.randint(0, 3, (2, 8, 16, 24))
    loss = DeepSupervisionLoss(DiceCELoss())
    stack = network(x)
    assert stack.ndim == 6
    expected = sum(w * DiceCELoss()(stack[:, i], target) for i, w in enumerate((4 / 7, 2 / 7, 1 / 7)))
    torch.testing.assert_close(loss(stack, target), expected)
    loss(stack, target).backward()
    assert torch.isfinite(loss(network.eval()(x), target))


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 4, 6), (1, 8, 4), (3, 5, 7), (4, 8, 12)])
def test_targets_are_taken_at_the_nearest_voxel_centre(shape):
    target = torch.randint(-1, 50, (2, *SHAPE))
    expected = F.interpolate(target[:, None].double(), shape, mode="nearest-exact")[:, 0].long()
    assert torch.equal(downsample_target(target, shape), expected)


def test_ignored_voxels_stay_ignored_at_lower_resolutions():
    target = torch.full((1, *SHAPE), -1, dtype=torch.int16)
    outputs = [torch.randn(1, 3, *SHAPE, requires_grad=True), torch.randn(1, 3, 2, 4, 6, requires_grad=True)]
    DeepSupervisionLoss(DiceCELoss())(outputs, target).backward()
    assert not any(logits.grad.any() for logits in outputs)
