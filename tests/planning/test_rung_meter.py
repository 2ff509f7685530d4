from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import OptimConfig, PlanConfig
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.plan import Rung
from pipeline.planning.meter import StepMemory, count_step, meter_step
from pipeline.planning.rung_meter import AVERAGED_WEIGHTS, RungMeter
from pipeline.training.optim import make_optimizer


def meter_for(**options: Any) -> RungMeter:
    config = PlanConfig(dataset="unused", **{"base_features": 4, "max_features": 8, **options})
    return RungMeter(config=config, in_channels=2, num_classes=9, spacing=(1.0, 1.0, 1.0))


def expected_memory(meter: RungMeter, rung: Rung, **options: Any) -> StepMemory:
    plan = meter.network_plan(rung.patch_size)
    network = UNet(2, 9, plan, **rung.execution._asdict(), fused_head=True)
    return meter_step(
        network,
        make_loss(),
        patch_size=rung.patch_size,
        in_channels=2,
        batch_size=rung.batch_size,
        accumulate_grad_batches=rung.accumulate_grad_batches,
        **options,
    )


@pytest.mark.parametrize("effective_batch", [2, 4])
@pytest.mark.parametrize("execution", [(0, 0, 0), (3, 1, 0), (0, 1, 1)])
def test_a_rung_is_metered_as_it_is_trained(effective_batch: int, execution: tuple[int, int, int]) -> None:
    meter = meter_for(effective_batch=effective_batch)
    ways = [way for family in meter.families((16, 24, 16), 2) for way in family]
    rung = next(way for way in ways if way.execution == execution)
    assert rung.effective_batch == effective_batch
    expected = expected_memory(meter, rung, optimizer="adamw")
    assert meter.memory(rung) == expected
    assert meter.weighed(rung).host_bytes == expected.pinned_bytes
    assert (expected.host_bytes > 0) == (execution[2] > 0)


def test_adamw_is_metered_and_takes_more_than_sgd() -> None:
    rung = Rung(patch_size=(16, 24, 16), accumulate_grad_batches=2)
    sgd, adamw = (meter_for(optimizer=name) for name in ("sgd", "adamw"))
    assert adamw.memory(rung) == expected_memory(adamw, rung, optimizer="adamw")
    assert adamw.memory(rung).peak_bytes > sgd.memory(rung).peak_bytes


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_is_the_one_that_a_training_makes(name: Any) -> None:
    # So wide for so few voxels that another optimiser's step would take more than any pass.
    meter, shape = meter_for(base_features=32, max_features=256, optimizer=name), (8, 16, 8)
    rung = Rung(patch_size=shape, accumulate_grad_batches=2)
    network = UNet(2, 9, meter.network_plan(shape), fused_head=True)
    optimizer = make_optimizer(network, OptimConfig(name=name))
    batch = torch.randn(1, 2, *shape), torch.randint(0, 9, (1, *shape))
    counted = count_step(network, make_loss(), *batch, optimizer=lambda _: optimizer, accumulate_grad_batches=2)
    assert meter.memory(rung).peak_bytes == counted.peak_bytes
    assert counted.peak_bytes < expected_memory(meter, rung, optimizer=name).peak_bytes


def test_averaged_weights_are_a_copy_of_the_network_beside_the_step() -> None:
    rung = Rung(patch_size=(16, 24, 16), accumulate_grad_batches=2)
    plain, averaged = meter_for().memory(rung), meter_for(ema=True).memory(rung)
    copy_bytes = averaged.peak_bytes - plain.peak_bytes
    assert copy_bytes == averaged.parts[AVERAGED_WEIGHTS] == plain.parts["parameters"]
    assert sum(averaged.parts.values()) == averaged.peak_bytes


def test_offload_off_leaves_out_every_way_with_host_memory() -> None:
    for offload, expected in (("auto", True), ("off", False)):
        ways = [way for family in meter_for(offload=offload).families((16, 24, 16), 1) for way in family]
        assert any(way.offload_stages for way in ways) == expected


def test_a_rung_is_metered_once() -> None:
    meter = meter_for()
    rung = meter.families((16, 24, 16), 1)[0][0]
    assert not meter.is_known(rung)
    assert meter.memory(rung) is meter.memory(rung)
    assert meter.is_known(rung)
