"""CUDA's autocast rules, under which steps for a GPU are metered on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.networks.unet import UNet
from pipeline.planning import cuda_autocast
from pipeline.planning.cuda_autocast import cuda_autocast_rules
from pipeline.planning.meter import StepMemory, count_step, meter_step
from tests.planning.conftest import OUR_LOSS, PATCH, TINY

# Kernels behind the operators that users call, and one that is refused instead of cast.
NOT_IN_LISTS = {"cudnn_convolution", "cudnn_convolution_transpose", "binary_cross_entropy"}


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_every_operator_that_torch_knows_for_cuda_autocast_is_in_one_list() -> None:
    lists = (
        cuda_autocast.LOWER_PRECISION,
        cuda_autocast.FLOAT32,
        cuda_autocast.FLOAT32_RESULT,
        cuda_autocast.SOFTMAXES.keys(),
        cuda_autocast.WIDEST,
    )
    names = [name for part in lists for name in part]
    assert len(names) == len(set(names))
    # Wheels without CUDA register its autocast rules too.
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    assert {name.removeprefix("aten::") for name in registered} <= set(names) | NOT_IN_LISTS


def test_kernels_that_other_libraries_register_for_autocast_are_left_alone() -> None:
    """Torchvision registers some at import, which any tracker or metric may do."""
    library = torch.library.Library("of_another_library", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: (2 * x).to(torch.float16), "AutocastCPU")
    try:
        with cuda_autocast_rules(), torch.autocast("cpu", torch.bfloat16):
            assert torch.ops.of_another_library.twice(half(2, 4)).dtype == torch.float16
            assert half(2, 4).sum().dtype == torch.float32
    finally:
        library._destroy()


OPERATORS: dict[str, tuple[Callable[[], Tensor], torch.dtype, torch.dtype]] = {
    # An operator, its result's dtype under the CPU's rules and under CUDA's.
    "group norm": (lambda: F.group_norm(half(1, 4, 4, 4, 4), 2), torch.bfloat16, torch.float32),
    "layer norm": (lambda: F.layer_norm(half(2, 4), (4,)), torch.bfloat16, torch.float32),
    "softmax": (lambda: half(2, 4).softmax(1), torch.bfloat16, torch.float32),
    "softmax of a given dtype": (lambda: half(2, 4).softmax(1, torch.float64), torch.float64, torch.float64),
    "sum": (lambda: half(2, 4).sum(), torch.bfloat16, torch.float32),
    "sum of a given dtype": (lambda: half(2, 4).sum(1, dtype=torch.bfloat16), torch.bfloat16, torch.bfloat16),
    "sum of integers": (lambda: torch.ones(3, dtype=torch.int64).sum(), torch.int64, torch.int64),
    "exp": (lambda: half(2, 4).exp(), torch.bfloat16, torch.float32),
    "exp of float64": (lambda: torch.ones(3, dtype=torch.float64).exp(), torch.float64, torch.float64),
    "trilinear": (
        lambda: F.interpolate(half(1, 2, 2, 2, 2), scale_factor=2, mode="trilinear"),
        torch.bfloat16,
        torch.float32,
    ),
    "max pool": (lambda: F.max_pool3d(half(1, 2, 4, 4, 4), 2), torch.float32, torch.bfloat16),
    "padding": (
        lambda: F.pad(half(1, 2, 4, 4, 4), (1,) * 6, mode="replicate"),
        torch.float32,
        torch.bfloat16,
    ),
    "convolution": (
        lambda: F.conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 1, 1, 1)),
        torch.bfloat16,
        torch.bfloat16,
    ),
    "matrix and vector": (lambda: torch.ones(2, 3).mv(torch.ones(3)), torch.float32, torch.bfloat16),
    "widest of two": (
        lambda: torch.addcmul(half(2), half(2), torch.ones(2)),
        torch.float32,
        torch.float32,
    ),
    "leaky ReLU": (lambda: F.leaky_relu(half(2)), torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_run_in_the_dtype_of_their_list_and_only_inside_the_block(name: str) -> None:
    run, on_cpu, on_cuda = OPERATORS[name]
    with torch.autocast("cpu", torch.bfloat16):
        assert run().dtype == on_cpu
        with cuda_autocast_rules():
            assert run().dtype == on_cuda
        assert run().dtype == on_cpu
    with cuda_autocast_rules():
        plain = run().dtype
    assert plain == run().dtype


class PlainNet(nn.Module):
    """What users write."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv3d(8, 8, 3, padding=1, stride=2)
        self.last = nn.Conv3d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool3d(self.second(x), 2)
        return self.last(F.interpolate(x, scale_factor=4, mode="trilinear"))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        probability = logits.log_softmax(1).exp()
        return F.mse_loss(probability[:, 0], (target == 0).to(probability.dtype))


class WrittenOut(PlainNet):
    """The same with what CUDA's autocast does written out, so that rules of the CPU have nothing to say."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            x = F.relu(F.group_norm(x.float(), 2, self.norm.weight, self.norm.bias))
        x = self.second(x)
        with torch.autocast("cpu", enabled=False):
            x = F.max_pool3d(x, 2)
            x = F.interpolate(x.float(), scale_factor=4, mode="trilinear")
        return self.last(x)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            # A GPU's softmax makes no copy in float32, which this one frees at once.
            probability = logits.float().log_softmax(1).exp()
            return F.mse_loss(probability[:, 0], (target == 0).to(probability.dtype))


def meter(network: nn.Module, loss: Any = OUR_LOSS, **options: Any) -> StepMemory:
    return meter_step(network, loss, patch_size=PATCH, in_channels=2, **options)


def test_a_plain_network_is_metered_for_a_gpu_as_if_its_casts_were_written_out() -> None:
    plain, written_out = PlainNet(), WrittenOut()
    targets = torch.zeros(1, *PATCH, dtype=torch.int64)
    real = count_step(written_out, written_out.loss, torch.randn(1, 2, *PATCH), targets, precision="bf16-mixed")
    metered = meter(plain, plain.loss, device_type="cuda")
    assert metered == replace(real, process_bytes=None)
    assert metered.peak_bytes > meter(plain, plain.loss, device_type="cpu").peak_bytes


def test_the_norm_of_a_plain_network_doubles_what_is_kept_on_a_gpu() -> None:
    network = nn.Sequential(nn.Conv3d(2, 8, 1, bias=False), nn.GroupNorm(2, 8, affine=False), nn.Sigmoid())
    voxels = 16 * 24 * 8
    kept = {kind: meter(network, lambda out, _: out.sum(), device_type=kind).parts for kind in ("cpu", "cuda")}
    # The images in half precision, the norm's input and its float32 or bf16 statistics of two groups; behind the norm
    # the sigmoid keeps its output, which here is the network's. The convolution's weight is cast too.
    images, weight = voxels * 2 * 2, 8 * 2 * 2
    assert kept["cpu"]["activations"] == images + weight + voxels * 8 * 2 + 2 * 2 * 2
    assert kept["cuda"]["activations"] == images + weight + voxels * 8 * 4 + 2 * 2 * 4
    assert kept["cpu"]["head"] == voxels * 8 * 2
    assert kept["cuda"]["head"] == voxels * 8 * 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("options", [{}, {"recompute_stages": 2}], ids=str)
def test_our_network_takes_the_same_under_the_rules_of_both(precision: Any, options: dict[str, int]) -> None:
    on_cpu, on_cuda = (
        meter(UNet(2, 3, TINY, **options), precision=precision, device_type=kind) for kind in ("cpu", "cuda")
    )
    assert replace(on_cpu, process_bytes=None) == on_cuda


def test_average_pooling_takes_less_under_the_rules_of_cuda_and_no_kernel_of_a_cpu() -> None:
    network = UNet(2, 3, replace(TINY, block="residual"))
    assert meter(network, device_type="cuda").peak_bytes <= meter(network, device_type="cpu").peak_bytes
    pooling = nn.Sequential(nn.Conv3d(2, 8, 1), nn.AvgPool3d(2), nn.Conv3d(8, 3, 1))
    on_cpu, on_cuda = (
        meter(pooling, lambda out, _: out.sum(), device_type=kind).parts["activations"] for kind in ("cpu", "cuda")
    )
    # The CPU pools a float32 copy of the convolution's output, which it keeps.
    assert on_cpu - on_cuda == 16 * 24 * 8 * 8 * (4 - 2)


def test_rules_are_those_of_the_cpu_again_when_a_step_cannot_be_metered() -> None:
    def failing(logits: Tensor, _: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(InputError, match=r"UNet: the step fails .*RuntimeError: no loss"):
        meter(UNet(2, 3, TINY), failing)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.group_norm(half(1, 4, 4), 2).dtype == torch.bfloat16
