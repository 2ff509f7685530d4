"""The one loss that is trained with and metered."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss

from pipeline.losses.segmentation_loss import make_loss
from pipeline.store import IGNORE_INDEX

SHAPE = (4, 8, 12)


def test_it_is_monais_loss_with_dice_per_sample():
    logits, target = torch.randn(3, 4, *SHAPE), torch.randint(0, 4, (3, *SHAPE))
    logits[1] *= 5
    expected = MonaiDiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=False)
    torch.testing.assert_close(make_loss()(logits, target), expected(logits, target[:, None]), rtol=1e-5, atol=0)


def test_a_batch_has_the_mean_loss_of_its_samples():
    outputs = [torch.randn(2, 3, *SHAPE), torch.randn(2, 3, 2, 4, 6)]
    target = torch.randint(0, 3, (2, *SHAPE))
    alone = [make_loss()([logits[n : n + 1] for logits in outputs], target[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(make_loss()(outputs, target), sum(alone) / 2)


def test_voxels_that_the_store_marks_as_ignored_have_no_gradient():
    logits, target = torch.randn(1, 3, *SHAPE, requires_grad=True), torch.randint(0, 3, (1, *SHAPE))
    target[:, :2] = IGNORE_INDEX
    make_loss()(logits, target).backward()
    assert not logits.grad[:, :, :2].any()
    assert logits.grad[:, :, 2:].any()
