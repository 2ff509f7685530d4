"""A U-Net whose highest-resolution stages run in slabs against the same U-Net without."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.errors import InputError
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.unet import UNet
from pipeline.planning.meter import count_step, meter_step
from pipeline.planning.storages import StorageCounter
from pipeline.slabs import store

SHAPE = (4, 12, 24)
# A network whose tensors outweigh everything else.
WIDE = {
    "features_per_stage": (32, 64, 80, 96),
    "kernel_sizes": ((3, 3, 3),) * 4,
    "num_blocks_per_stage": (2,) * 4,
}


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store, "SLAB_BYTES", 1)
    monkeypatch.setattr(store, "SMALLEST_SLAB_ROWS", 2)
    return


def pair(plan, *, in_channels: int = 2, dtype: torch.dtype = torch.float64, **options) -> tuple[UNet, UNet]:
    plain, slabs = UNet(in_channels, 3, plan).to(dtype), UNet(in_channels, 3, plan, **options).to(dtype)
    slabs.load_state_dict(plain.state_dict())
    return plain, slabs


def step_gradients(network: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    value = make_loss()(network(x), target)
    value.backward()
    return {"loss": value.detach(), **{name: parameter.grad.clone() for name, parameter in network.named_parameters()}}


def assert_equal_steps(plain: UNet, slabs: UNet, tolerance: float, shape=SHAPE) -> None:
    dtype = next(plain.parameters()).dtype
    x = torch.randn(2, plain.encoder[0][0].conv.in_channels, *shape, dtype=dtype)
    target = torch.randint(-1, 3, (2, *shape))
    expected = step_gradients(plain, x, target)
    for _ in range(2):
        found = step_gradients(slabs, x, target)
        for name, theirs in expected.items():
            torch.testing.assert_close(
                found[name], theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-12, msg=name
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("slab_stages", [1, 2, 4])
@pytest.mark.parametrize("fused_head", [False, True])
def test_loss_and_gradients_equal_the_plain_network(small_plan, dtype, tolerance, slab_stages, fused_head):
    options = {"slab_stages": slab_stages, "fused_head": fused_head}
    assert_equal_steps(*pair(small_plan(), dtype=dtype, **options), tolerance)


@pytest.mark.parametrize("in_channels", [1, 6])
@pytest.mark.parametrize("norm", ["group", "instance"])
@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("num_decoder_blocks", [1, 2, 3])
def test_every_shape_of_network_keeps_its_gradients(
    small_plan, in_channels, norm, deep_supervision, num_decoder_blocks
):
    plan = small_plan(norm=norm, deep_supervision=deep_supervision, num_decoder_blocks=num_decoder_blocks)
    assert_equal_steps(*pair(plan, in_channels=in_channels, slab_stages=2, fused_head=True), 1e-9)


@pytest.mark.parametrize("shape", [(4, 8, 8), (12, 4, 16), (20, 12, 8)])
@pytest.mark.parametrize("offload_stages", [0, 1, 2])
def test_slabs_that_end_anywhere_and_slabs_in_host_memory_change_nothing(small_plan, shape, offload_stages):
    options = {"slab_stages": 2, "offload_stages": offload_stages, "fused_head": True}
    assert_equal_steps(*pair(small_plan(), **options), 1e-9, shape=shape)


@pytest.mark.parametrize("recompute_stages", [2, 4])
def test_stages_below_the_slabs_may_be_recomputed(small_plan, recompute_stages):
    options = {"slab_stages": 1, "recompute_stages": recompute_stages, "fused_head": True}
    assert_equal_steps(*pair(small_plan(), **options), 1e-9)


def test_a_step_in_bfloat16_is_no_further_from_float64_than_the_plain_one(small_plan):
    exact, slabs = pair(small_plan(), slab_stages=2, fused_head=True)
    plain = UNet(2, 3, small_plan())
    plain.load_state_dict(exact.state_dict())
    slabs.float()
    x, target = torch.randn(1, 2, *SHAPE), torch.randint(0, 3, (1, *SHAPE))
    truth = step_gradients(exact, x.double(), target)

    def error(network: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(x)
        network.zero_grad()
        make_loss()(outputs, target).backward()
        squares = [(p.grad.double() - truth[name]).square().sum() for name, p in network.named_parameters()]
        return float(torch.stack(squares).sum().sqrt())

    assert error(slabs) < 1.2 * error(plain)


def test_without_gradients_logits_are_those_of_the_plain_network(small_plan):
    plain, slabs = pair(small_plan(), slab_stages=2, fused_head=True)
    x = torch.randn(1, 2, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(slabs(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slabs.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-12)


def test_evaluation_mode_with_gradients_gives_logits_in_slabs_too(small_plan, gradients_of):
    plain, slabs = pair(small_plan(deep_supervision=False), slab_stages=2, fused_head=True)
    x = torch.randn(1, 2, *SHAPE, dtype=torch.float64)
    expected, found = gradients_of(plain.eval(), x), gradients_of(slabs.eval(), x)
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changes", [{"block": "residual"}, {"norm": "batch"}])
def test_networks_that_cannot_run_in_slabs_are_refused(small_plan, changes):
    with pytest.raises(InputError, match="slab_stages: must be 0 with"):
        UNet(1, 3, small_plan(**changes), slab_stages=1)


@pytest.mark.parametrize(
    "options",
    [{"slab_stages": 9}, {"recompute_stages": -1}, {"offload_stages": 1}, {"slab_stages": 1, "offload_stages": 2}],
)
def test_ways_of_running_that_the_network_does_not_have_are_refused(small_plan, options):
    with pytest.raises(InputError, match="_stages: must be 0 to"):
        UNet(1, 3, small_plan(), **options)


def peak_bytes(network: UNet, shape: tuple[int, ...]) -> int:
    counter, mode = StorageCounter(), FakeTensorMode(allow_non_fake_inputs=True)
    with mode, counter, torch.autocast("cpu", torch.bfloat16):
        value = make_loss()(network(torch.empty(1, 1, *shape)), torch.zeros(1, *shape, dtype=torch.int64))
        value.backward()
    return counter.peak_bytes


def test_each_rung_takes_less_than_the_one_before(small_plan, monkeypatch):
    monkeypatch.undo()
    shape = (128, 128, 96)
    plan = small_plan(**WIDE)
    rungs = [
        {},
        {"fused_head": True},
        {"fused_head": True, "recompute_stages": 4},
        {"fused_head": True, "slab_stages": 1, "recompute_stages": 4},
        {"fused_head": True, "slab_stages": 1, "recompute_stages": 4, "offload_stages": 1},
    ]
    peaks = [
        meter_step(_on_meta(plan, rung), make_loss(), patch_size=shape, in_channels=1).peak_bytes for rung in rungs
    ]
    assert all(after < before for before, after in pairwise(peaks)), peaks
    assert peaks[3] < 0.4 * peaks[0]
    assert peaks[4] < 0.8 * peaks[3]


def test_rows_and_gradients_are_freed_as_they_are_used_up(small_plan, monkeypatch):
    """In full-resolution tensors: 7.36, and 3.69 in host memory; without one or the other freeing 7.5 to 8.1, and 4."""
    monkeypatch.undo()
    monkeypatch.setattr(store, "SLAB_BYTES", 2**25)
    shape = (128, 128, 96)
    plan = small_plan(**WIDE)

    def metered(**rung):
        return meter_step(_on_meta(plan, {"fused_head": True, **rung}), make_loss(), patch_size=shape, in_channels=1)

    full = 2 * 32 * prod(shape)
    assert metered(slab_stages=3).peak_bytes < 7.42 * full
    assert metered(slab_stages=3, offload_stages=1).host_bytes < 3.75 * full


def _on_meta(plan, rung) -> UNet:
    with torch.device("meta"):
        return UNet(1, 118, plan, **rung)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "rung",
    [
        {"slab_stages": 1},
        {"slab_stages": 2, "offload_stages": 1},
        {"slab_stages": 4, "offload_stages": 1, "fused_head": True},
    ],
)
def test_fake_tensors_count_byte_for_byte_as_real_ones(small_plan, precision, rung):
    network, shape = UNet(2, 3, small_plan(), **rung), (40, 12, 24)
    metered = meter_step(network, make_loss(), patch_size=shape, in_channels=2, precision=precision, device_type="cpu")
    images, targets = torch.randn(1, 2, *shape), torch.randint(0, 3, (1, *shape))
    counted = count_step(network, make_loss(), images, targets, precision=precision)
    assert metered.peak_bytes == counted.peak_bytes
    assert metered.host_bytes == counted.host_bytes
    assert (metered.host_bytes > 0) == ("offload_stages" in rung)
    assert metered.parts == counted.parts


def test_an_evaluation_window_takes_no_more_than_the_training_step(small_plan, monkeypatch):
    monkeypatch.undo()
    shape = (128, 128, 96)
    rung = {"fused_head": True, "slab_stages": 1, "recompute_stages": 4}
    plan = small_plan(**WIDE)
    step = meter_step(_on_meta(plan, rung), make_loss(), patch_size=shape, in_channels=1).peak_bytes
    with FakeTensorMode(allow_non_fake_inputs=True), StorageCounter() as counter, torch.no_grad():
        network = UNet(1, 118, plan, **rung).eval()
        with torch.autocast("cpu", torch.bfloat16):
            pending = network.pending_logits(torch.empty(1, 1, *shape))
            for start in range(0, shape[0], 8):
                pending.compute(start, start + 8)
    assert counter.peak_bytes < 0.8 * step
    # The raw skip, the raw rows of the merging convolution, and slabs; what was used up makes it 4 or more.
    assert counter.peak_bytes < 3.9 * 2 * 32 * prod(shape)


@pytest.mark.parametrize("slab_stages", [0, 2])
def test_pending_logits_of_an_evaluation_are_the_logits(small_plan, slab_stages):
    plain, slabs = pair(small_plan(), slab_stages=slab_stages)
    x = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    with torch.inference_mode():
        expected, pending = plain.eval()(x), slabs.eval().pending_logits(x)
        found = torch.cat([pending.compute(start, start + 2) for start in range(0, SHAPE[0], 2)], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
