from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.planning.meter import PARTS, StepMemory, count_step, meter_step
from pipeline.sizes import GIB
from pipeline.slabs.host import allocate_on_host
from pipeline.slabs.rows import PendingLogits
from tests.planning.conftest import OUR_LOSS, PATCH, TINY

SIX_STAGES = NetworkPlan(
    features_per_stage=(32, 64, 128, 256, 320, 320),
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
    kernel_sizes=((3, 3, 3),) * 6,
    num_blocks_per_stage=(2,) * 6,
)
_monai_loss = MonaiDiceCELoss(softmax=True, to_onehot_y=True)


def monai_loss(logits: Tensor, target: Tensor) -> Tensor:
    return _monai_loss(logits, target[:, None])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "plain": (lambda: UNet(2, 3, TINY), OUR_LOSS),
    "recomputed": (lambda: UNet(2, 3, TINY, recompute_stages=2), OUR_LOSS),
    "residual": (lambda: UNet(2, 3, replace(TINY, block="residual", norm="instance")), OUR_LOSS),
    "batch norm": (lambda: UNet(2, 3, replace(TINY, norm="batch", deep_supervision=False)), OUR_LOSS),
    "MONAI UNet, group norm": (
        lambda: MonaiUNet(3, 2, 3, (4, 8), (2,), norm=("group", {"num_groups": 1})),
        monai_loss,
    ),
}


def make_batch(batch_size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 2, *PATCH, generator=generator)
    return images, torch.randint(0, 3, (batch_size, *PATCH), generator=generator)


@pytest.mark.parametrize(
    ("name", "precision", "optimizer", "accumulate"),
    [
        *((name, "bf16-mixed", "sgd", 1) for name in NETWORKS),
        *((name, "32-true", "adamw", 2) for name in ("recomputed", "batch norm", "residual")),
    ],
)
def test_fake_tensors_count_byte_for_byte_as_real_ones(
    name: str, precision: Any, optimizer: Any, accumulate: int
) -> None:
    make_network, loss = NETWORKS[name]
    network = make_network()
    options = {"precision": precision, "optimizer": optimizer, "accumulate_grad_batches": accumulate}
    metered = meter_step(network, loss, patch_size=PATCH, in_channels=2, batch_size=2, device_type="cpu", **options)
    real = count_step(network, loss, *make_batch(), **options)
    assert metered == real
    assert tuple(metered.parts) == PARTS
    assert sum(metered.parts.values()) == metered.peak_bytes


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2)])
def test_the_peak_is_the_one_that_pytorchs_own_tracker_finds_in_two_real_iterations(
    precision: Any, accumulate: int
) -> None:
    network = UNet(2, 3, TINY)
    images, targets = make_batch()
    metered = meter_step(
        network,
        OUR_LOSS,
        patch_size=PATCH,
        in_channels=2,
        batch_size=2,
        precision=precision,
        accumulate_grad_batches=accumulate,
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99, weight_decay=1e-5, foreach=True)
    tracker = MemTracker()
    tracker.track_external(network, optimizer, images, targets)
    with tracker:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                loss = OUR_LOSS(network(images), targets)
            if accumulate == 1:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tracker.reset_mod_stats()
    assert metered.peak_bytes == tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def meter_convolution(*, optimizer: Any = "sgd", features: int = 5) -> StepMemory:
    network = nn.Conv3d(2, features, 1)
    return meter_step(
        network, lambda out, _: out.sum(), patch_size=PATCH, in_channels=2, precision="32-true", optimizer=optimizer
    )


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("adamw", 2)])
def test_parts_of_one_convolution_are_those_counted_by_hand(optimizer: str, copies: int) -> None:
    memory = meter_convolution(optimizer=optimizer)
    weights, voxels = 4 * (2 * 5 + 5), 16 * 24 * 8
    # AdamW keeps a step count in four bytes for each of the two parameters.
    state = copies * weights + (8 if optimizer == "adamw" else 0)
    assert memory.parts["parameters"] == weights
    assert memory.parts["optimizer"] == state
    assert memory.parts["input"] == voxels * (2 * 4 + 8)
    assert memory.parts["activations"] == 0
    # The logits, and the loss itself.
    assert memory.parts["head"] == voxels * 5 * 4 + 4
    assert memory.parts["gradients"] == weights
    assert memory.parts["working"] == 0


def test_what_a_loss_keeps_counts_as_head_beside_the_logits() -> None:
    def probability_loss(logits: Tensor, _: Tensor) -> Tensor:
        return (logits.softmax(1) * logits).sum()

    network = nn.Sequential(nn.Conv3d(2, 4, 1), nn.Conv3d(4, 5, 1))
    memory = meter_step(network, probability_loss, patch_size=PATCH, in_channels=2, precision="32-true")
    voxels = 16 * 24 * 8
    assert memory.parts["activations"] == voxels * 4 * 4
    assert memory.parts["head"] == 2 * voxels * 5 * 4 + 4


def test_a_head_that_gives_no_logits_leaves_the_features_with_the_activations() -> None:
    def loss(logits: PendingLogits, _: Tensor) -> Tensor:
        return logits.features.handle.square().sum()

    network = UNet(2, 3, replace(TINY, deep_supervision=False), fused_head=True)
    memory = meter_step(network, loss, patch_size=PATCH, in_channels=2, precision="32-true")
    # The loss alone.
    assert memory.parts["head"] == 4


class Offloading(torch.autograd.Function):
    """Squares its input and keeps it in host memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = allocate_on_host(x).copy_(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.kept.to(gradient.device) * gradient


class Squares(nn.Module):
    """A convolution, and twice the square of what comes out of it."""

    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 1)
        self.square = square

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.square(self.conv(x)))


def sum_of(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.sum()


def test_host_buffers_count_apart_from_the_device() -> None:
    options: dict[str, Any] = {"precision": "32-true"}
    loss = lambda out, _: out.sum()  # noqa: E731
    plain, offloaded = (
        count_step(Squares(square), loss, *make_batch(), **options) for square in (torch.square, Offloading.apply)
    )
    kept = 2 * 3 * 16 * 24 * 8 * 4
    assert plain.host_bytes == 0
    assert offloaded.host_bytes == 2 * kept
    assert sum(offloaded.parts.values()) == offloaded.peak_bytes <= plain.peak_bytes - kept
    metered = meter_step(
        Squares(Offloading.apply), sum_of, patch_size=PATCH, in_channels=2, batch_size=2, device_type="cpu", **options
    )
    assert metered == offloaded


def test_the_process_holds_host_buffers_as_well() -> None:
    memory = count_step(Squares(Offloading.apply), sum_of, *make_batch(), precision="32-true")
    assert memory.process_bytes is not None
    assert memory.process_bytes > memory.peak_bytes + memory.host_bytes // 2


def test_shared_parameters_and_buffers_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(2, 2, 1, bias=False)
            self.second = nn.Conv3d(2, 2, 1, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("scale", torch.ones(3))
            self.register_buffer("view_of_scale", self.scale[:2])

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * self.scale[0]

    memory = count_step(Tied(), lambda out, _: out.sum(), *make_batch(), precision="32-true")
    assert memory.parts["parameters"] == 4 * (2 * 2 + 3)


def test_recomputation_lowers_the_peak() -> None:
    plain, recomputed = (
        meter_step(UNet(2, 3, TINY, recompute_stages=r), OUR_LOSS, patch_size=PATCH, in_channels=2) for r in (0, 3)
    )
    assert recomputed.peak_bytes < plain.peak_bytes
    assert recomputed.parts["activations"] < plain.parts["activations"] / 2


def test_gradients_that_are_being_accumulated_are_live_through_the_whole_step() -> None:
    network = UNet(2, 3, TINY)
    options = {"patch_size": PATCH, "in_channels": 2}
    alone = meter_step(network, OUR_LOSS, **options)
    accumulated = meter_step(network, OUR_LOSS, accumulate_grad_batches=4, **options)
    assert accumulated.parts["gradients"] == sum(4 * p.numel() for p in network.parameters())
    assert accumulated.peak_bytes >= alone.peak_bytes


def test_a_step_of_many_gigabytes_is_metered_without_allocating_it() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        network = UNet(1, 3, SIX_STAGES)
    memory = meter_step(network, OUR_LOSS, patch_size=(512, 512, 256), in_channels=1)
    assert memory.peak_bytes > 40 * GIB
    # ru_maxrss is in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024


def test_the_network_and_the_loss_are_left_as_they_were() -> None:
    network = UNet(2, 3, replace(TINY, norm="batch")).eval()
    state = copy.deepcopy(network.state_dict())
    meter_step(network, OUR_LOSS, patch_size=PATCH, in_channels=2)
    assert not network.training
    assert all(parameter.grad is None and not parameter._backward_hooks for parameter in network.parameters())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, F.smooth_l1_loss, F.l1_loss, F.huber_loss, F.soft_margin_loss, F.binary_cross_entropy_with_logits],
)
def test_losses_of_torch_count_as_they_do_on_real_tensors(loss: Any) -> None:
    # Where a loss allocates more than the scalar that it returns, it is live in the backward pass.
    def against_target(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits, target[:, None].to(logits.dtype).expand_as(logits))

    network = nn.Conv3d(2, 3, 1)
    metered = meter_step(
        network, against_target, patch_size=PATCH, in_channels=2, batch_size=2, precision="32-true", device_type="cpu"
    )
    assert metered == count_step(network, against_target, *make_batch(), precision="32-true")


def test_parameters_without_a_part_in_the_loss_get_neither_gradient_nor_state() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Conv3d(2, 3, 1)
            self.unused = nn.Linear(1000, 1000)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    memory = meter_step(Unused(), lambda out, _: out.sum(), patch_size=PATCH, in_channels=2, optimizer="adamw")
    assert memory.parts["parameters"] > 4_000_000
    assert memory.parts["gradients"] == 4 * (2 * 3 + 3)
    assert memory.parts["optimizer"] == 2 * 4 * (2 * 3 + 3) + 8


def test_an_optimizer_of_ones_own_is_taken_as_it_is() -> None:
    plain = meter_convolution(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert plain.parts["optimizer"] == 0


def test_a_loss_that_reads_values_is_refused_with_the_reason() -> None:
    def branching_loss(logits: Tensor, target: Tensor) -> Tensor:
        return logits.mean() if (target > 0).any() else logits.sum()

    with pytest.raises(InputError, match="cannot be metered because it reads the value of a tensor"):
        meter_step(UNet(2, 3, TINY), branching_loss, patch_size=PATCH, in_channels=2)
