"""Small samples of a batch of one, convolved by oneDNN: held to float64, and where torch is left alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.networks.small_convolution import IS_X86, MOST_VALUES, Convolution

needs_onednn = pytest.mark.skipif(
    not (IS_X86 and torch.backends.mkldnn.is_available()), reason="oneDNN is asked for on x86 only"
)


def small(batch: int = 1, shape: tuple[int, int, int] = (12, 9, 7), **options) -> tuple[Convolution, Tensor]:
    torch.manual_seed(3)
    layer = Convolution(5, 11, options.pop("kernel_size", 3), padding=options.pop("padding", 1), **options)
    return layer, torch.randn(batch, 5, *shape, requires_grad=True)


def operators(layer: nn.Module, x: Tensor) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        layer(x)
    return {event.name for event in found.events()}


@needs_onednn
@pytest.mark.parametrize(
    ("stride", "kernel_size", "bias"),
    list(product([(1, 1, 1), (2, 2, 1)], [(3, 3, 3), (1, 3, 3), (5, 3, 1)], [True, False])),
)
def test_values_and_gradients_are_those_of_float64(stride, kernel_size, bias) -> None:
    padding = tuple(size // 2 for size in kernel_size)
    layer, x = small(stride=stride, kernel_size=kernel_size, padding=padding, bias=bias)
    assert "aten::mkldnn_convolution" in operators(layer, x)
    exact = nn.Conv3d(5, 11, kernel_size, stride, padding, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    out, exact_out = layer(x), exact(exact_x)
    gradient = torch.randn_like(out)
    # As it comes from a norm that writes channels last.
    out.backward(gradient.contiguous(memory_format=torch.channels_last_3d))
    exact_out.backward(gradient.double())
    pairs = [(out, exact_out), (x.grad, exact_x.grad)]
    pairs += [(mine.grad, theirs.grad) for mine, theirs in zip(layer.parameters(), exact.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert mine is not None
        assert theirs is not None
        assert mine.shape == theirs.shape
        assert mine.layout == torch.strided
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))


@needs_onednn
def test_what_needs_no_gradient_gets_none() -> None:
    layer, x = small()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.weight.grad = layer.bias.grad = None
    layer(x).sum().backward()
    assert (layer.weight.grad is None, layer.bias.grad is None, x.grad is None) == (True, False, False)


@needs_onednn
def test_torch_still_leaves_a_batch_of_one_to_its_slow_code_up_to_the_size_that_is_assumed() -> None:
    # If this fails, torch's rule has changed, and the module may have become needless.
    for columns, is_slow in ((MOST_VALUES // 40, True), (MOST_VALUES // 40 + 1, False)):
        x = torch.randn(1, 5, 8, columns, 2)
        names = operators(nn.Conv3d(5, 3, 3, padding=1), x)
        assert ("aten::slow_conv3d" in names) == is_slow
        assert "aten::slow_conv3d" not in operators(Convolution(5, 3, 3, padding=1), x)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_batch_of_any_size_gives_what_torch_gives(batch) -> None:
    layer, x = small(batch)
    plain = nn.Conv3d(5, 11, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_autocast_float64_and_other_devices_keep_their_dtype_and_place() -> None:
    layer, x = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.to("meta")(x.to(device="meta", dtype=torch.float64)).is_meta


def test_what_counts_operators_is_shown_torch_s_own() -> None:
    layer, x = small()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 11 * 5 * 27 * x[0, 0].numel()


def test_an_export_and_a_traced_network_have_torch_s_own_operator_only() -> None:
    layer, x = small()
    exported = torch.export.export(layer, (x.detach(),))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    traced = torch.jit.trace(layer, x.detach())
    assert "_convolution" in str(traced.inlined_graph)
    assert "mkldnn" not in str(traced.inlined_graph)


@needs_onednn
@pytest.mark.parametrize("view", ["channels last", "a slice", "transposed"])
def test_the_layout_of_the_input_changes_nothing(view) -> None:
    layer, x = small()
    x = x.detach()
    views = {
        "channels last": x.contiguous(memory_format=torch.channels_last_3d),
        "a slice": nn.functional.pad(x, (1, 2, 3, 1, 2, 0))[:, :, 2:, 3:-1, 1:-2],
        "transposed": x.transpose(2, 4).contiguous().transpose(2, 4),
    }
    found = views[view].requires_grad_()
    expected = x.clone().requires_grad_()
    out, same = layer(found), layer(expected)
    torch.testing.assert_close(out, same)
    out.square().sum().backward()
    same.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)
