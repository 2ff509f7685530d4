from __future__ import annotations

import pytest

from pipeline.config import PlanConfig
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.planning.candidates import Rung
from pipeline.planning.meter import meter_step
from pipeline.planning.rung_meter import RungMeter


@pytest.mark.parametrize("effective_batch", [2, 4])
def test_a_rung_is_metered_with_the_loss_of_training(effective_batch: int) -> None:
    config = PlanConfig(dataset="unused", base_features=4, max_features=8, effective_batch=effective_batch)
    meter = RungMeter(config=config, in_channels=2, num_classes=9, spacing=(1.0, 1.0, 1.0))
    rung = Rung(patch_size=(16, 24, 16), batch_size=2)
    network = UNet(2, 9, meter.network_plan(rung.patch_size))
    step = {"precision": "bf16-mixed", "accumulate_grad_batches": effective_batch // 2}
    expected = meter_step(network, make_loss(), patch_size=rung.patch_size, in_channels=2, batch_size=2, **step)
    assert meter.memory(rung) == expected
