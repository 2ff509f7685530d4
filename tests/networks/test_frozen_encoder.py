"""A U-Net whose encoder is frozen, run in every way: what is still trained gets the gradients that it would get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.planning.meter import count_step, meter_step
from pipeline.slabs import store

SHAPE = (4, 12, 24)
WAYS = [
    {},
    {"recompute_stages": 1},
    {"recompute_stages": 4},
    {"slab_stages": 1},
    {"slab_stages": 4},
    {"slab_stages": 2, "offload_stages": 1},
    {"slab_stages": 4, "offload_stages": 4},
    {"slab_stages": 1, "recompute_stages": 3},
]


@pytest.fixture
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store, "SLAB_BYTES", 1)
    monkeypatch.setattr(store, "SMALLEST_SLAB_ROWS", 2)
    return


def step_gradients(network: UNet, x: Tensor, target: Tensor) -> dict[str, Tensor | None]:
    network.zero_grad()
    make_loss()(network(x), target).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("fused_head", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_rest_gets_the_gradients_of_the_plain_network_in_every_step(small_plan, way, fused_head):
    plain = UNet(2, 3, small_plan()).double()
    frozen = UNet(2, 3, small_plan(), fused_head=fused_head, **way).double()
    frozen.load_state_dict(plain.state_dict())
    frozen.freeze_encoder()
    x, target = torch.randn(2, 2, *SHAPE, dtype=torch.float64), torch.randint(-1, 3, (2, *SHAPE))
    expected = step_gradients(plain, x, target)
    for _ in range(2):
        found = step_gradients(frozen, x, target)
        for name, theirs in expected.items():
            if name.startswith("encoder."):
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("recompute_stages", [0, 2])
@pytest.mark.parametrize("changes", [{"block": "residual"}, {"norm": "batch"}, {"block": "residual", "norm": "batch"}])
def test_networks_without_slabs_keep_their_gradients_too(small_plan, changes, recompute_stages):
    plan = small_plan(**changes)
    plain = UNet(1, 3, plan).double()
    frozen = UNet(1, 3, plan, recompute_stages=recompute_stages).double()
    frozen.load_state_dict(plain.state_dict())
    frozen.freeze_encoder()
    # A frozen batch norm is one in evaluation mode, in train mode as well.
    for stage in plain.encoder if plan.norm == "batch" else ():
        stage.eval()
    x, target = torch.randn(2, 1, 8, 12, 24, dtype=torch.float64), torch.randint(0, 3, (2, 8, 12, 24))
    expected = step_gradients(plain, x, target)
    found = step_gradients(frozen.eval().train(), x, target)
    for name, theirs in expected.items():
        if not name.startswith("encoder."):
            torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_way_of_running_takes_more_than_with_all_of_it_trained(small_plan, way):
    """So that what a plan predicts stays an upper bound."""
    shape, plan = (64, 48, 48), small_plan(features_per_stage=(32, 48, 64, 80), num_blocks_per_stage=(2,) * 4)

    def metered(*, is_frozen: bool) -> tuple[int, int]:
        with torch.device("meta"):
            network = UNet(1, 3, plan, fused_head=True, **way)
        if is_frozen:
            network.freeze_encoder()
        found = meter_step(network, make_loss(), patch_size=shape, in_channels=1)
        return found.peak_bytes, found.host_bytes

    (whole, whole_host), (frozen, frozen_host) = metered(is_frozen=False), metered(is_frozen=True)
    assert frozen < whole
    assert frozen_host <= whole_host


@pytest.mark.usefixtures("_small_slabs")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_meter_counts_it_byte_for_byte_as_it_is(small_plan, way):
    network, shape = UNet(2, 3, small_plan(), fused_head=True, **way), (40, 12, 24)
    network.freeze_encoder()
    metered = meter_step(network, make_loss(), patch_size=shape, in_channels=2, device_type="cpu")
    images, targets = torch.randn(1, 2, *shape), torch.randint(0, 3, (1, *shape))
    counted = count_step(network, make_loss(), images, targets)
    assert (metered.peak_bytes, metered.host_bytes) == (counted.peak_bytes, counted.host_bytes)


def test_copies_stay_frozen_and_validation_gives_its_mode_back(small_plan):
    network = UNet(1, 3, small_plan(norm="batch"))
    network.freeze_encoder()
    network.eval().train()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm3d)]
    inside = {id(module) for module in network.encoder.modules()}
    assert {norm.training for norm in norms if id(norm) in inside} == {False}
    assert {norm.training for norm in norms if id(norm) not in inside} == {True}
