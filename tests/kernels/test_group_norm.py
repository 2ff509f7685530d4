"""The group norm of GPUs against torch's own in float64, in both memory formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.kernels import group_norm as module
from pipeline.kernels.group_norm import group_norm
from pipeline.kernels.tensors import channels_last

# Channels, groups, voxels: tiles that are full, that are cut off, and of a single voxel.
SIZES = [
    (6, 3, (5, 3, 7)),
    (32, 8, (8, 4, 8)),
    (96, 32, (2, 1, 1)),
    (48, 48, (3, 5, 7)),
    (1, 1, (4, 5, 6)),
    (8, 2, (1, 1, 1)),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a block and several blocks, as large activations have."""
    monkeypatch.setattr(module, "TILE_VALUES", 256)
    monkeypatch.setattr(module, "NUM_PROGRAMS", 8)


def normalise_in_torch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(F.group_norm(x, groups, weight, bias, 1e-5), slope)


def make_inputs(
    device: str, channels: int, shape: tuple[int, ...], dtype: torch.dtype, *, is_last: bool
) -> list[Tensor]:
    memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
    x = (2 * torch.randn(2, channels, *shape) + 9).to(dtype).contiguous(memory_format=memory_format)
    return [part.to(device).requires_grad_() for part in (x, torch.randn(channels), torch.randn(channels))]


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "slope", "size"),
    [
        *((torch.float32, 0.01, size) for size in SIZES),
        *((dtype, slope, SIZES[0]) for dtype in TOLERANCE for slope in (0.01, 1.0)),
    ],
)
def test_values_and_gradients_are_those_of_float64(device, dtype, slope, size, is_last):
    channels, groups, shape = size
    inputs = make_inputs(device, channels, shape, dtype, is_last=is_last)
    dy = torch.randn(2, channels, *shape, device=device).to(dtype)
    y = group_norm(inputs[0], groups, *inputs[1:], eps=1e-5, negative_slope=slope)
    found = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    exact_inputs = [part.detach().double().requires_grad_() for part in inputs]
    exact = normalise_in_torch(exact_inputs[0], groups, *exact_inputs[1:], slope)
    expected = [exact.detach(), *torch.autograd.grad(exact, exact_inputs, dy.double())]
    # A sum over few voxels of one channel may cancel, so it is measured by what it is a sum of.
    scales = [float(part.abs().max()) for part in expected]
    scales[2:] = [max(scale, float(dy.abs().max())) for scale in scales[2:]]
    for mine, theirs, scale in zip(found, expected, scales, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2 * TOLERANCE[dtype] * scale + 1e-7)


@pytest.mark.parametrize("is_last", [False, True])
def test_results_are_channels_last_and_gradients_like_the_input(device, is_last):
    inputs = make_inputs(device, 6, (5, 3, 7), torch.float32, is_last=is_last)
    y = group_norm(inputs[0], 3, *inputs[1:], eps=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    (dx,) = torch.autograd.grad(y, inputs[0], torch.randn_like(y))
    assert dx.stride() == inputs[0].stride()


def test_the_same_comes_out_every_time(device):
    inputs = make_inputs(device, 6, (9, 8, 7), torch.float32, is_last=True)
    dy = torch.randn(2, 6, 9, 8, 7, device=device)

    def run() -> list[Tensor]:
        y = group_norm(inputs[0], 3, *inputs[1:], eps=1e-5, negative_slope=0.01)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_an_input_whose_axes_are_neither_order_is_taken_too(device):
    x = torch.randn(2, 6, 7, 5, 4, device=device).transpose(2, 4)
    y = group_norm(x, 3, None, None, eps=1e-5)
    torch.testing.assert_close(y, F.group_norm(x, 3), atol=1e-5, rtol=0)


def test_a_mean_far_from_zero_costs_no_digits(device):
    x = 1e4 + torch.randn(1, 4, 6, 8, 10, device=device)
    y = group_norm(x, 2, None, None, eps=1e-5)
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 2), atol=2e-3, rtol=0)


def test_one_channel_is_channels_last_by_its_strides_without_a_copy():
    x = torch.randn(2, 1, 4, 5, 6)
    last = channels_last(x)
    assert last.stride(1) == 1
    assert last.data_ptr() == x.data_ptr()
    assert torch.equal(last, x)


def test_a_second_derivative_is_refused(device):
    inputs = make_inputs(device, 6, (5, 3, 7), torch.float32, is_last=True)
    y = group_norm(inputs[0], 3, *inputs[1:], eps=1e-5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
