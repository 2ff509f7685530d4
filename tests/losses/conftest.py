"""Seeds, chunk sizes, and the losses of other libraries that ours must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from monai.losses import DiceLoss as MonaiDiceLoss
from torch import Tensor
from torch.nn import BCEWithLogitsLoss

from pipeline.losses import chunks, fused_head

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[(2**21, 2**25), (61, 700)], ids=["one chunk", "many chunks"])
def _chunked(request, monkeypatch) -> None:
    chunk_elements, block_bytes = request.param
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setattr(fused_head, "BLOCK_BYTES", block_bytes)


@pytest.fixture
def monai_loss() -> Callable[..., Loss]:
    """MONAI's (and for regions torch's) loss with our options, of logits (B, K, I, J, K') and target (B, I, J, K')."""

    def make(
        *,
        batch_dice: bool = True,
        smooth: float = 1e-5,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        weighted_dice: bool = False,
        regions: Sequence[Sequence[int]] | None = None,
    ) -> Loss:
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
        dice = {"smooth_nr": smooth, "smooth_dr": smooth, "batch": batch_dice}

        def of_classes(logits: Tensor, target: Tensor) -> Tensor:
            softmax = {"include_background": False, "softmax": True, "to_onehot_y": True}
            weight = None if weights is None else weights.to(logits)
            whole = MonaiDiceCELoss(**softmax, **dice, weight=weight, lambda_dice=dice_weight, lambda_ce=ce_weight)
            if not weighted_dice:
                plain = MonaiDiceCELoss(**softmax, **dice)
                return dice_weight * plain.dice(logits, target[:, None]) + ce_weight * whole.ce(logits, target[:, None])
            return whole(logits, target[:, None])

        def of_regions(logits: Tensor, target: Tensor) -> Tensor:
            hot = torch.stack([torch.isin(target, torch.tensor(region)) for region in regions], 1).to(logits)
            weight = None if weights is None else weights.to(logits)
            overlap = MonaiDiceLoss(sigmoid=True, **dice, weight=weight if weighted_dice else None)
            pos_weight = None if weight is None else weight[:, None, None, None]
            binary = BCEWithLogitsLoss(pos_weight=pos_weight)
            return dice_weight * overlap(logits, hot) + ce_weight * binary(logits, hot)

        return of_classes if regions is None else of_regions

    return make
