"""Convolution, norm and activation in slabs against torch's plain composition."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.planning.storages import StorageCounter
from pipeline.slabs import store
from pipeline.slabs.convolution import convolve_and_norm, convolve_whole
from pipeline.slabs.normed_rows import GroupStatistics
from pipeline.slabs.resolution import UpsampledRows, make_whole
from pipeline.slabs.rows import WholeRows

SLOPE = 0.01
SHAPE = (2, 5, 11, 6, 7)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store, "SLAB_BYTES", 1)
    monkeypatch.setattr(store, "SMALLEST_SLAB_ROWS", 2)
    return


def make_layers(in_channels: int, *, kernel=(3, 3, 3), stride=(1, 1, 1), dtype=torch.float64) -> nn.ModuleDict:
    padding = tuple(size // 2 for size in kernel)
    layers = nn.ModuleDict(
        {
            "first": nn.Conv3d(in_channels, 4, kernel, stride, padding, bias=False),
            "first_norm": nn.GroupNorm(2, 4),
            "second": nn.Conv3d(4, 6, kernel, 1, padding, bias=False),
            "second_norm": nn.GroupNorm(3, 6),
        }
    )
    for name in ("first_norm", "second_norm"):
        nn.init.normal_(layers[name].weight)
        nn.init.normal_(layers[name].bias)
    return layers.to(dtype)


def in_slabs(layers: nn.ModuleDict, x: Tensor, **options: bool) -> Tensor:
    rows = convolve_and_norm([WholeRows(x)], [layers["first"]], layers["first_norm"], negative_slope=SLOPE)
    rows = convolve_and_norm([rows], [layers["second"]], layers["second_norm"], negative_slope=SLOPE, **options)
    return make_whole(rows)


def plain(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    x = F.leaky_relu(layers["first_norm"](layers["first"](x)), SLOPE)
    return F.leaky_relu(layers["second_norm"](layers["second"](x)), SLOPE)


def gradients(function, layers: nn.ModuleDict, x: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
    layers.zero_grad()
    x = x.clone().requires_grad_()
    out = function(layers, x)
    out.backward(torch.ones_like(out) if gradient is None else gradient)
    return [out.detach(), x.grad, *(parameter.grad for parameter in layers.parameters())]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2))])
@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("options", [{}, {"on_host": True}, {"has_one_reader": True}])
def test_outputs_and_gradients_equal_the_plain_composition(dtype, tolerance, kernel, stride, in_channels, options):
    layers = make_layers(in_channels, kernel=kernel, stride=stride, dtype=dtype)
    x = torch.randn(2, in_channels, *SHAPE[2:], dtype=dtype)
    out = plain(layers, x).detach()
    gradient = torch.randn_like(out)
    expected = gradients(plain, layers, x, gradient)
    for _ in range(2):
        found = gradients(lambda parts, value: in_slabs(parts, value, **options), layers, x, gradient)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-12)


class _Holder(nn.Module):
    """The layers with an output that both `functional_call` and gradcheck can ask for."""

    def __init__(self, layers: nn.ModuleDict, has_one_reader: bool) -> None:
        super().__init__()
        self.layers, self.has_one_reader = layers, has_one_reader

    def forward(self, x: Tensor) -> Tensor:
        return in_slabs(self.layers, x, has_one_reader=self.has_one_reader)


class _RunAnew(torch.autograd.Function):
    """Runs a function anew for every backward pass, of which gradcheck takes several on one output."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return None, *torch.autograd.grad(ctx.function(*tensors), tensors, gradient)


@pytest.mark.parametrize("has_one_reader", [False, True])
def test_gradients_are_those_of_finite_differences(has_one_reader):
    holder = _Holder(make_layers(5), has_one_reader)
    names = [name for name, _ in holder.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(holder, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 5, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in holder.parameters()]
    # Along random directions: perturbing every value by itself takes 23 s.
    inputs = (x, *parameters)
    assert torch.autograd.gradcheck(lambda *tensors: _RunAnew.apply(function, *tensors), inputs, fast_mode=True)


def test_sums_of_two_inputs_and_upsampled_rows_equal_the_plain_composition():
    up = nn.ConvTranspose3d(3, 4, 2, 2).double()
    skip_layer, up_layer = (nn.Conv3d(4, 4, 3, padding=1, bias=False).double() for _ in range(2))
    norm = nn.GroupNorm(4, 4).double()
    low = torch.randn(2, 3, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(2, 4, 10, 8, 6, dtype=torch.float64, requires_grad=True)
    leaves = [low, skip, *(p for layer in (up, skip_layer, up_layer, norm) for p in layer.parameters())]

    expected = F.leaky_relu(norm(up_layer(up(low)) + skip_layer(skip)), SLOPE)
    gradient = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    inputs = [UpsampledRows(WholeRows(low), up), WholeRows(skip)]
    found = make_whole(convolve_and_norm(inputs, [up_layer, skip_layer], norm, negative_slope=SLOPE))
    ours = torch.autograd.grad(found, leaves, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_rows_with_two_readers_get_the_gradients_of_both():
    layers = make_layers(5)
    down = nn.Conv3d(4, 2, 3, 2, 1, bias=False).double()
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    leaves = [x, layers["first"].weight, *layers["first_norm"].parameters(), down.weight]
    activation = F.leaky_relu(layers["first_norm"](layers["first"](x)), SLOPE)
    expected = torch.autograd.grad(activation.square().sum() + down(activation).square().sum(), leaves)
    rows = convolve_and_norm([WholeRows(x)], [layers["first"]], layers["first_norm"], negative_slope=SLOPE)
    value = make_whole(rows).square().sum() + convolve_whole(rows, down).square().sum()
    for ours, theirs in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def half_precision_errors(function, exact: nn.ModuleDict, x: Tensor, dtype: torch.dtype) -> float:
    """Sum of the relative deviations of output and gradients under autocast from those in float64."""
    half = make_layers(5, dtype=torch.float32)
    half.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})

    def under_autocast(layers: nn.ModuleDict, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return function(layers, value)

    truth, found = gradients(plain, exact, x), gradients(under_autocast, half, x.float())
    return sum(float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64_than_the_plain_composition(dtype):
    ours, theirs = 0.0, 0.0
    for _ in range(8):
        exact, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
        ours += half_precision_errors(in_slabs, exact, x, dtype)
        theirs += half_precision_errors(plain, exact, x, dtype)
    assert ours < 1.3 * theirs


def test_statistics_stay_exact_for_values_far_from_zero():
    values = torch.randn(2, 6, 12, 4, 5, dtype=torch.float64) * 0.1 + 50
    statistics = GroupStatistics(3, 1e-5)
    for start in (0, 5, 7):
        statistics.observe(values[:, :, start : {0: 5, 5: 7, 7: 12}[start]].float())
    mean, variance = statistics.mean_and_variance()
    groups = values.reshape(2, 3, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(2, correction=0), rtol=2e-3, atol=0)
    # The way that is taken on a GPU.
    mean, variance = GroupStatistics(3, 1e-5)._of_channels(values.float())
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(2, correction=0), rtol=2e-3, atol=0)


def test_a_constant_input_has_variance_zero_and_finite_gradients():
    layers = make_layers(5)
    found = gradients(in_slabs, layers, torch.ones(SHAPE, dtype=torch.float64))
    expected = gradients(plain, layers, torch.ones(SHAPE, dtype=torch.float64))
    assert all(bool(torch.isfinite(part).all()) for part in found)
    torch.testing.assert_close(found[0], expected[0])


def test_between_the_passes_only_raw_rows_are_kept():
    layers, x, counter = make_layers(5, dtype=torch.float32), torch.randn(SHAPE), StorageCounter()
    with counter:
        rows = convolve_and_norm([WholeRows(x)], [layers["first"]], layers["first_norm"], negative_slope=SLOPE)
        rows = convolve_and_norm([rows], [layers["second"]], layers["second_norm"], negative_slope=SLOPE)
        kept = counter.live_bytes
    raw_bytes = (4 + 6) * x[:, 0].numel() * 4
    weight_bytes = sum(parameter.nbytes for parameter in layers.parameters())
    assert raw_bytes <= kept < raw_bytes + 2 * weight_bytes + 4096


def test_a_second_backward_pass_is_refused():
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    out = in_slabs(layers, x)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        out.sum().backward()


def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs():
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    expected = gradients(plain, layers, x)
    layers["first"].requires_grad_(False)
    found = gradients(in_slabs, layers, x)
    assert found[2] is None
    for ours, theirs in zip(found[3:], expected[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.fixture
def counter() -> Iterator[StorageCounter]:
    """Counts live storages without the help of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        with StorageCounter() as counting:
            yield counting
    finally:
        gc.enable()


def upsampled_step(layers: nn.ModuleDict, up: nn.ConvTranspose3d, last: nn.Conv3d, x: Tensor) -> Tensor:
    rows = convolve_and_norm([WholeRows(x)], [layers["first"]], layers["first_norm"], negative_slope=SLOPE)
    rows = UpsampledRows(rows, up)
    return make_whole(convolve_and_norm([rows], [last], layers["second_norm"], negative_slope=SLOPE))


@pytest.mark.parametrize("ending", ["backward", "dropped", "fails in the backward pass"])
def test_a_step_leaves_nothing_behind_without_garbage_collection(counter, ending):
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    up, last = nn.ConvTranspose3d(4, 4, 2, 2).double(), nn.Conv3d(4, 6, 3, padding=1, bias=False).double()
    live = []
    for _ in range(4):
        out = upsampled_step(layers, up, last, x)
        if ending == "backward":
            out.sum().backward()
        elif ending != "dropped":
            layers["first"].weight.register_hook(_run_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                out.sum().backward()
        del out
        layers.zero_grad(set_to_none=True)
        for layer in (up, last):
            layer.zero_grad(set_to_none=True)
        live.append(counter.live_bytes)
    assert len(set(live[1:])) == 1, live


def _run_out_of_memory(_: Tensor) -> None:
    raise torch.OutOfMemoryError("made up")


def test_a_loss_that_lives_on_after_its_backward_pass_holds_no_rows(counter):
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    before = counter.live_bytes
    value = in_slabs(layers, x).sum()
    value.backward()
    layers.zero_grad(set_to_none=True)
    assert counter.live_bytes - before < 2 * 8 * x[:, 0].numel()


def test_rows_that_gave_way_to_their_gradients_are_not_read_again():
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    rows = convolve_and_norm(
        [WholeRows(x)], [layers["first"]], layers["first_norm"], negative_slope=SLOPE, has_one_reader=True
    )
    value = make_whole(rows).sum() + make_whole(rows).square().sum()
    with pytest.raises(RuntimeError, match="serve one loss and one backward pass"):
        value.backward()
    with pytest.raises(RuntimeError, match="these rows are gone"):
        rows.read(0, 2)


@pytest.mark.parametrize("name", ["input", "first", "second", "second_norm"])
def test_tensors_that_changed_since_the_forward_pass_are_noticed(name):
    layers, x = make_layers(5), torch.randn(SHAPE, dtype=torch.float64)
    out = in_slabs(layers, x)
    with torch.no_grad():
        (x if name == "input" else layers[name].weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("function", [in_slabs, lambda layers, x: make_whole(UpsampledRows(WholeRows(x), layers))])
def test_a_second_derivative_is_refused(function):
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    layers = make_layers(5) if function is in_slabs else nn.ConvTranspose3d(5, 4, 2, 2).double()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(layers, x).square().sum(), x, create_graph=True)


def test_upsampling_weights_that_changed_since_the_forward_pass_are_noticed():
    up, x = nn.ConvTranspose3d(5, 4, 2, 2).double(), torch.randn(SHAPE, dtype=torch.float64)
    out = make_whole(UpsampledRows(WholeRows(x), up))
    with torch.no_grad():
        up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layer", [nn.Conv3d(1, 2, 1, bias=False), nn.ConvTranspose3d(1, 2, (2, 1, 1), (2, 1, 1))])
def test_gradients_of_half_precision_weights_are_summed_over_slabs_in_float32(layer):
    """Each of 24 slabs adds 70 ones; bf16 knows no odd tens above 512."""
    rows, plane = (48, (5, 7)) if isinstance(layer, nn.Conv3d) else (24, (7, 10))
    x = WholeRows(torch.ones(1, 1, rows, *plane))
    with torch.autocast("cpu", torch.bfloat16):
        out = convolve_whole(x, layer) if isinstance(layer, nn.Conv3d) else make_whole(UpsampledRows(x, layer))
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.sum(dtype=torch.float32), layer.weight)
    assert torch.equal(gradient, torch.full_like(gradient, 1680))


def test_a_backward_pass_under_autocast_gives_the_same_gradients():
    layers, x, found = make_layers(5, dtype=torch.float32), torch.randn(SHAPE), []
    for enabled in (False, True):
        layers.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = in_slabs(layers, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out.backward(torch.ones_like(out))
        found.append([parameter.grad for parameter in layers.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
