"""What only a GPU can show: half precision and determinism of the step, and that augmentation does not wait for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import AugmentationConfig
from pipeline.doctor.gpu import find_devices
from pipeline.inference.case_context import CaseContext, case_context
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_batch import MOST_WINDOWS_ON_GPU, set_window_batch
from pipeline.io.volume import Volume
from pipeline.kernels import availability
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.norms import GroupNorm
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan, Rung
from pipeline.planning.meter import meter_step
from pipeline.sampling.augmentation import Augmentation
from pipeline.sampling.intensity import ChannelParameters, change_intensity
from pipeline.sizes import GIB
from pipeline.slabs import store as slab_store
from pipeline.training.probe import probe_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = (8, 24, 16)
PATCH = (12, 17, 10)
NETWORK = NetworkPlan(
    features_per_stage=(8, 12, 16, 16),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    num_blocks_per_stage=(2, 1, 1, 1),
    num_groups=4,
)
WIDE_NETWORK = replace(NETWORK, features_per_stage=(32, 48, 64, 64), num_blocks_per_stage=(2, 2, 2, 2))
EVERY_CHANGE = ChannelParameters(
    noise_std=0.2,
    noise_seed=5,
    blur_sigma=0.8,
    brightness=1.2,
    contrast=0.8,
    low_resolution=0.6,
    gamma=1.3,
    gamma_inverted=True,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---- norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_keeps_half_precision_under_autocast_with_statistics_in_float32(dtype: torch.dtype) -> None:
    norm = GroupNorm(4, 12).cuda()
    x = (torch.randn(2, 12, *SHAPE, device="cuda") * 3 + 1).to(dtype).requires_grad_()
    with torch.autocast("cuda", dtype):
        y = norm(x)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == dtype
    exact = F.group_norm(x.detach().double(), 4, eps=norm.eps)
    # Half precision holds a value of 4 to 0.02; sums of thousands of values in it would be off by far more.
    torch.testing.assert_close(y.detach().double(), exact, atol=0.05, rtol=0)


def test_norms_of_a_network_leave_no_float32_activation_under_autocast() -> None:
    network, seen = UNet(1, 3, NETWORK).cuda(), set()
    for module in network.modules():
        module.register_forward_hook(lambda _module, _inputs, output: seen.add(getattr(output, "dtype", None)))
    with torch.autocast("cuda", torch.bfloat16):
        network(torch.randn(1, 1, *SHAPE, device="cuda"))
    assert seen <= {torch.bfloat16, None}


def test_activations_of_a_network_are_channels_last_from_the_first_convolution_on() -> None:
    network, found = UNet(1, 3, NETWORK).cuda(), []
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and module.out_channels > 3:
            module.register_forward_hook(lambda _module, _inputs, output: found.append(output.stride(1) == 1))
    with torch.autocast("cuda", torch.bfloat16):
        network(torch.randn(2, 1, *SHAPE, device="cuda"))
    assert found
    assert all(found)


@pytest.mark.parametrize("num_classes", [3, 60])
def test_a_network_in_torch_s_own_kernels_has_the_same_loss_and_gradients(
    num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image, target = torch.randn(2, 1, *SHAPE).cuda(), torch.randint(-1, num_classes, (2, *SHAPE)).cuda()
    network = UNet(1, num_classes, NETWORK, fused_head=True).cuda()
    assert availability.serves(image)
    in_triton = gradients(network, image, target, bf16=False)
    network.zero_grad()
    monkeypatch.setattr(availability, "_works", lambda _device: False)
    expected = gradients(network, image, target, bf16=False)
    for name, gradient in in_triton.items():
        tolerance = 1e-3 * float(expected[name].abs().max()) + 1e-12
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance)


def test_the_doctor_finds_triton_or_says_why_not() -> None:
    *_, fact = find_devices()
    assert (fact.name, fact.value, fact.advice) == ("Triton", True, "")


# ---- loss


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_the_cpu(dtype: torch.dtype, batch_dice: bool) -> None:
    logits, target = (3 * torch.randn(2, 4, *SHAPE)).to(dtype), torch.randint(-1, 4, (2, *SHAPE))
    here, there = logits.clone().requires_grad_(), logits.cuda().requires_grad_()
    loss = DiceCELoss(batch_dice=batch_dice)
    values = [loss(here, target), loss(there, target.cuda())]
    for value in values:
        value.backward()
    assert there.grad.dtype == dtype
    torch.testing.assert_close(values[1].cpu(), values[0], rtol=1e-4, atol=1e-5)
    largest = float(here.grad.abs().max())
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=0.02, atol=1e-3 * largest)


# ---- augmentation


def test_augmentation_gives_the_same_as_on_the_cpu_but_for_the_noise() -> None:
    chances = dict.fromkeys(("mirror", "rotate", "scale", "blur", "brightness", "contrast"), 0.6)
    config = AugmentationConfig(**chances, low_resolution=0.6, gamma=0.6, noise=0.0)
    augmentation = Augmentation(config, patch_size=PATCH, num_channels=2)
    images, labels = torch.randn(6, 2, 21, 26, 19), torch.randint(-1, 4, (6, 21, 26, 19), dtype=torch.int16)
    drawn = [augmentation.draw(np.random.default_rng([1, n])) for n in range(6)]
    here = augmentation.augment_batch(images, labels, drawn)
    there = augmentation.augment_batch(images.cuda(), labels.cuda(), drawn)
    assert there[0].is_cuda
    torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-3, rtol=0)
    assert (there[1].cpu() == here[1]).float().mean() > 0.999


def test_intensity_changes_do_not_wait_for_the_gpu() -> None:
    rows = torch.randn(3, *PATCH, device="cuda")
    drawn = [EVERY_CHANGE, ChannelParameters(), EVERY_CHANGE._replace(noise_seed=6)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = change_intensity(rows, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(changed[1], rows[1])
    assert torch.isfinite(changed).all()
    assert not torch.allclose(changed[0], rows[0])


# ---- probe


def probed_plan() -> Plan:
    """A step of several GiB, and a fallback of next to nothing."""
    return Plan(
        dataset_name="made up",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels={"background": 0, "organ": 1},
        target_spacing=(1.0, 1.0, 1.0),
        median_shape=(128, 192, 160),
        patch_size=(128, 192, 160),
        network=WIDE_NETWORK,
        memory=MemoryPlan(budget_bytes=GIB, peak_bytes=4 * GIB, overhead_bytes=0, parts={}),
        fallbacks=(Rung(patch_size=SHAPE, required_bytes=GIB),),
    )


def test_a_probe_measures_a_step_that_fits() -> None:
    held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    (tried,) = probe_plan(probed_plan(), budget_bytes=total).tried
    assert tried.outcome == "fits", tried.message
    assert 0 < tried.allocated_bytes < tried.measured_bytes < total
    assert torch.cuda.memory_reserved() == held


def test_a_probe_holds_a_step_to_a_budget_below_the_gpu_and_steps_down() -> None:
    first, second = probe_plan(probed_plan(), budget_bytes=2 * GIB).tried
    assert (first.outcome, second.outcome) == ("out of memory", "fits"), (first.message, second.message)
    assert second.measured_bytes <= 2 * GIB


def test_a_gpu_that_others_hold_is_said_and_is_no_ceiling() -> None:
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(free - 3 * GIB // 2, dtype=torch.uint8, device="cuda")
    try:
        (tried,) = probe_plan(probed_plan(), budget_bytes=total).tried
    finally:
        del held
        torch.cuda.empty_cache()
    assert tried.outcome == "busy"
    assert "other processes hold" in tried.message


# ---- step


def take_steps(
    network: nn.Module, image: Tensor, target: Tensor, dtype: torch.dtype, *, num_steps: int, scaled: bool
) -> list[float]:
    """Losses of AdamW steps under autocast, as Lightning's mixed precision takes them."""
    loss, optimizer = make_loss(), torch.optim.AdamW(network.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    values = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            value = loss(network(image), target)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(float(value.detach()))
    return values


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("recompute_stages", [0, 4])
def test_a_network_learns_one_patch_in_half_precision(dtype: torch.dtype, scaled: bool, recompute_stages: int) -> None:
    target = torch.zeros(1, *SHAPE, dtype=torch.int64)
    target[:, 2:6, 3:15, 4:10] = 1
    image = (0.3 * torch.randn(1, 1, *SHAPE) + target[:, None]).cuda()
    network = UNet(1, 2, NETWORK, recompute_stages=recompute_stages).cuda()
    values = take_steps(network, image, target.cuda(), dtype, num_steps=60, scaled=scaled)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert np.isfinite(values).all()
    assert values[-1] < 0.6 * values[0]


def gradients(network: nn.Module, image: Tensor, target: Tensor, *, bf16: bool) -> dict[str, Tensor]:
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        value = make_loss()(network(image), target)
    value.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_gradients_are_the_plain_ones(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    image, target = torch.randn(2, 1, *SHAPE).cuda(), torch.randint(0, 3, (2, *SHAPE)).cuda()
    plain, recomputed = UNet(1, 3, NETWORK).cuda(), UNet(1, 3, NETWORK, recompute_stages=4).cuda()
    recomputed.load_state_dict(plain.state_dict())
    expected, found = (gradients(network, image, target, bf16=bf16) for network in (plain, recomputed))
    for name, gradient in found.items():
        tolerance = 0.01 * float(expected[name].abs().max()) + 1e-12
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("offload_stages", [0, 1, 2])
def test_gradients_of_a_step_in_slabs_are_as_exact_as_the_plain_ones(
    bf16: bool, offload_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both round differently, and bf16 leaves few digits of the first weights' gradient, a sum that nearly cancels."""
    monkeypatch.setattr(slab_store, "SLAB_BYTES", 1)
    monkeypatch.setattr(slab_store, "SMALLEST_SLAB_ROWS", 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image, target = torch.randn(2, 1, *SHAPE).cuda(), torch.randint(0, 3, (2, *SHAPE)).cuda()
    exact, plain = UNet(1, 3, NETWORK).cuda().double(), UNet(1, 3, NETWORK, fused_head=True).cuda()
    slabs = UNet(1, 3, NETWORK, slab_stages=2, offload_stages=offload_stages, fused_head=True).cuda()
    for network in (exact, slabs):
        network.load_state_dict(plain.state_dict())
    expected = gradients(exact, image.double(), target, bf16=False)
    of_plain, of_slabs = (
        relative_error(gradients(network, image, target, bf16=bf16), expected) for network in (plain, slabs)
    )
    assert of_slabs < 1.25 * of_plain + 1e-4
    assert of_plain < (0.3 if bf16 else 1e-4)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together."""
    distance = sum(float((found[name].double() - value).square().sum()) for name, value in expected.items())
    return (distance / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def peak_bytes(shape: tuple[int, ...], **rung: int) -> int:
    network = UNet(1, 60, WIDE_NETWORK, fused_head=True, **rung).cuda()
    image, target = torch.randn(1, 1, *shape).cuda(), torch.randint(0, 60, (1, *shape)).cuda()
    gradients(network, image, target, bf16=True)
    network.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    gradients(network, image, target, bf16=True)
    return torch.cuda.max_memory_allocated()


def test_slabs_and_host_memory_lower_the_peak_of_the_device() -> None:
    shape = (96, 96, 80)
    plain, slabs, offloaded = (
        peak_bytes(shape, **rung) for rung in ({}, {"slab_stages": 2}, {"slab_stages": 2, "offload_stages": 2})
    )
    assert slabs < 0.6 * plain
    assert offloaded < 0.8 * slabs


def test_pinned_buffers_that_are_used_again_hold_what_was_written_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the device by whole steps, so buffers are written to anew while copies are queued."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shape = (48, 64, 56)
    images = [torch.randn(1, 1, *shape).cuda() for _ in range(3)]
    target = torch.randint(0, 3, (1, *shape)).cuda()
    plain, slabs = UNet(1, 3, NETWORK).cuda(), UNet(1, 3, NETWORK, slab_stages=2, offload_stages=2).cuda()
    slabs.load_state_dict(plain.state_dict())
    for _ in range(3):
        for image in images:
            expected, found = (gradients(network, image, target, bf16=False) for network in (plain, slabs))
            for name, gradient in found.items():
                tolerance = 1e-3 * float(expected[name].abs().max()) + 1e-12
                torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance)


def test_pinned_memory_is_what_the_plan_says_and_does_not_grow_from_step_to_step() -> None:
    shape = (96, 96, 80)
    with torch.device("meta"):
        metered = UNet(1, 60, WIDE_NETWORK, fused_head=True, slab_stages=2, offload_stages=2)
    predicted = meter_step(metered, make_loss(), patch_size=shape, in_channels=1).pinned_bytes
    torch.cuda.synchronize()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    taken = []
    for _ in range(3):
        peak_bytes(shape, slab_stages=2, offload_stages=2)
        taken.append(torch.cuda.host_memory_stats()["allocated_bytes.current"] - before)
    assert taken[0] <= predicted
    assert taken[1:] == taken[:1] * 2


# ---- prediction


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_windows_in_batches_that_fit_give_the_labels_of_single_windows(precision: str) -> None:
    torch.manual_seed(0)
    plan = make_prediction_plan()
    predictor = Predictor(UNet(1, 3, plan.network), plan, device_type="cuda", precision=precision)  # type: ignore[arg-type]
    prepared = predictor.prepare(Volume.from_array(torch.randn(90, 100, 110).numpy(), np.eye(4)))
    single = predictor.segment(prepared)
    set_window_batch(predictor, "auto")
    assert 1 < predictor.window_batch <= MOST_WINDOWS_ON_GPU
    predictor.count_seams = predictor.skip_air = True
    context = CaseContext()
    with case_context(context):
        batched = predictor.segment(prepared)
    assert (single == batched).mean() > 0.98
    assert 0 < context.notes.disagreeing <= context.notes.compared
    assert context.notes.skipped == 0


def make_prediction_plan() -> Plan:
    return Plan(
        dataset_name="noise",
        fingerprint_hash="0",
        channels=(ChannelPlan(name="T1", scheme="none"),),
        labels={"background": 0, "organ_1": 1, "organ_2": 2},
        target_spacing=(1.0, 1.1, 0.9),
        median_shape=(32, 32, 32),
        patch_size=(32, 32, 32),
        network=NETWORK,
        memory=MemoryPlan(budget_bytes=1, peak_bytes=1, overhead_bytes=0, parts={}),
    )
