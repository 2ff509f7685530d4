"""Head and loss in one function against the head, MONAI's loss and autograd, for whatever gives the features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.losses import chunks, fused_head
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.blocks import Head
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.slabs.rows import PendingLogits, WholeRows

SHAPE = (5, 4, 6)
REGIONS = ((1, 2, 3), (2, 3), (3,))
WEIGHTS = (0.3, 2.0, 1.1)
OPTIONS = {
    "plain": {},
    "class weights": {"class_weights": WEIGHTS},
    "class weights, Dice too": {"class_weights": WEIGHTS, "weighted_dice": True},
    "regions": {"regions": REGIONS},
    "regions, weights, Dice too": {"regions": REGIONS, "class_weights": WEIGHTS, "weighted_dice": True},
}
Leaves = dict[str, Tensor]


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request) -> dict[str, Any]:
    return request.param


def _leaves(dtype: torch.dtype = torch.float64, *, classes: int = 3, batch: int = 2) -> Leaves:
    """Features with the weight and bias of a head, all with gradients."""
    made = {
        "features": torch.randn(batch, 7, *SHAPE, dtype=dtype),
        "weight": torch.randn(classes, 7, 1, 1, 1, dtype=dtype),
        "bias": torch.randn(classes, dtype=dtype),
    }
    return {name: leaf.requires_grad_() for name, leaf in made.items()}


def _target(num_values: int = 3, batch: int = 2) -> Tensor:
    return torch.randint(0, num_values, (batch, *SHAPE))


def _pending(leaves: Leaves) -> PendingLogits:
    return PendingLogits(WholeRows(leaves["features"]), leaves["weight"], leaves["bias"])


def _results(value: Tensor, leaves: Leaves) -> Leaves:
    """The value and the gradient of every leaf."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return {"value": value.detach(), **dict(zip(wanted, torch.autograd.grad(value, wanted.values()), strict=True))}


def _assert_close(found: Leaves, expected: Leaves, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(
            found[name], wanted, rtol=tolerance, atol=atol, msg=lambda text, name=name: name + text
        )


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_a_convolution_and_the_reference_losses(
    options, monai_loss, dtype, tolerance, batch_dice
):
    leaves, target = _leaves(dtype), _target(5 if "regions" in options else 3)
    options = {**options, "batch_dice": batch_dice, "smooth": 1e-3, "dice_weight": 0.7, "ce_weight": 1.9}
    found = _results(DiceCELoss(**options)(_pending(leaves), target), leaves)
    logits = F.conv3d(leaves["features"], leaves["weight"], leaves["bias"])
    _assert_close(found, _results(monai_loss(**options)(logits, target), leaves), tolerance)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("batch_dice", [False, True])
def test_gradients_pass_gradcheck_with_ignored_voxels(options, batch_dice):
    target = _target(5 if "regions" in options else 3)[:, :2, :2, :3]
    target[:, 0, 0] = -1
    loss = DiceCELoss(**options, batch_dice=batch_dice)
    inputs = [leaf.detach() for leaf in _leaves().values()]
    inputs[0] = inputs[0][:, :, :2, :2, :3]

    def function(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 3 * loss(PendingLogits(WholeRows(features), weight, bias), target)

    assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_() for leaf in inputs])


@st.composite
def _problems(draw: st.DrawFn) -> dict[str, Any]:
    channels = draw(st.integers(1, 5))
    regions = draw(
        st.none() | st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=channels, max_size=channels).map(tuple)
    )
    channels = max(channels, 2) if regions is None else channels
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=channels, max_size=channels)
    class_weights = draw(st.none() | weights)
    return {
        "shape": draw(st.tuples(*[st.integers(1, 3), st.integers(1, 4), *[st.integers(1, 6)] * 3])),
        "channels": channels,
        "layout": draw(st.sampled_from([torch.contiguous_format, torch.channels_last_3d])),
        "flat_weight": draw(st.booleans()),
        "ignored": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "chunk_elements": draw(st.integers(1, 300)),
        "block_bytes": draw(st.integers(1, 2000)),
        "seed": draw(st.integers(0, 2**16)),
        "options": {
            "batch_dice": draw(st.booleans()),
            "regions": regions,
            "class_weights": class_weights,
            "weighted_dice": class_weights is not None and draw(st.booleans()),
            "ignore_index": draw(st.sampled_from([-1, 9])),
        },
    }


@given(_problems())
@settings(max_examples=100, deadline=None)
def test_fused_and_plain_are_the_same_whatever_the_shapes_options_and_chunks(problem):
    torch.manual_seed(problem["seed"])
    batch, features, *voxels = problem["shape"]
    options = problem["options"]
    made = (
        torch.randn(batch, features, *voxels),
        torch.randn(problem["channels"], features),
        torch.randn(problem["channels"]),
    )
    leaves = {
        name: leaf.double().requires_grad_() for name, leaf in zip(("features", "weight", "bias"), made, strict=True)
    }
    target = torch.randint(0, 5 if options["regions"] else problem["channels"], (batch, *voxels))
    target[torch.rand(target.shape) < problem["ignored"]] = options["ignore_index"]
    loss = DiceCELoss(**options)
    x = leaves["features"].contiguous(memory_format=problem["layout"])
    logits = torch.einsum("kc,bc...->bk...", leaves["weight"], x) + leaves["bias"][:, None, None, None]
    expected = _results(loss(logits, target), leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", problem["chunk_elements"])
        patch.setattr(fused_head, "BLOCK_BYTES", problem["block_bytes"])
        weight = leaves["weight"] if problem["flat_weight"] else leaves["weight"][..., None, None, None]
        found = _results(loss(PendingLogits(WholeRows(x), weight, leaves["bias"]), target), leaves)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_that_is_all_ignored_gives_zero_gradients(options, dtype, batch_dice):
    leaves = _leaves(dtype)
    found = _results(
        DiceCELoss(**options, batch_dice=batch_dice)(_pending(leaves), torch.full_like(_target(), -1)), leaves
    )
    assert not any(part.any() for part in found.values())


@pytest.mark.usefixtures("_chunked")
def test_a_second_call_and_a_second_backward_pass_give_the_same():
    leaves, target = _leaves(), _target()
    loss = DiceCELoss()
    first = loss(_pending(leaves), target)
    once = torch.autograd.grad(first, leaves.values(), retain_graph=True)
    again = torch.autograd.grad(first, leaves.values())
    second = torch.autograd.grad(loss(_pending(leaves), target), leaves.values())
    for a, b, c in zip(once, again, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("frozen", [["features"], ["weight", "bias"], ["bias"]])
def test_what_needs_no_gradient_gets_none_and_the_rest_stays_the_same(frozen):
    leaves, target = _leaves(), _target()
    expected = _results(DiceCELoss()(_pending(leaves), target), leaves)
    for name in frozen:
        leaves[name].requires_grad_(False)
    _assert_close(
        _results(DiceCELoss()(_pending(leaves), target), leaves),
        {name: part for name, part in expected.items() if name not in frozen},
        1e-12,
    )


def test_without_gradients_there_is_the_value():
    leaves, target = _leaves(), _target()
    expected = DiceCELoss()(_pending(leaves), target)
    with torch.no_grad():
        value = DiceCELoss()(_pending(leaves), target)
    assert torch.equal(value, expected)
    assert not value.requires_grad


class _TwoSweeps:
    """Rows as an engine has them: no whole tensor behind the handle, and gradients that come in two sweeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype
        self.handle = torch.zeros((), requires_grad=True)
        self.sums, self.gradient = torch.zeros_like(tensor), torch.full_like(tensor, torch.nan)
        self.last, self.taken = False, set()

    def read(self, start: int, stop: int) -> Tensor:
        assert not self.taken & set(range(start, stop)), "rows are gone once they have their gradient"
        return self.tensor[:, :, start:stop]

    def sweeps(self) -> Iterator[bool]:
        yield False
        self.last = True
        yield True

    def add_gradient(self, start: int, gradient: Tensor) -> None:
        stop = start + gradient.shape[2]
        if self.last:
            self.gradient[:, :, start:stop] = gradient
            self.taken |= set(range(start, stop))
        else:
            self.sums[:, :, start:stop] += gradient

    def take_gradient(self) -> Tensor:
        return torch.zeros_like(self.handle)


@pytest.mark.usefixtures("_chunked")
def test_rows_that_are_swept_twice_get_their_gradients_twice_and_the_head_gets_its_once():
    leaves, target = _leaves(), _target()
    expected = _results(DiceCELoss()(_pending(leaves), target), leaves)
    rows = _TwoSweeps(leaves["features"].detach())
    heads = {name: leaves[name] for name in ("weight", "bias")}
    found = _results(DiceCELoss()(PendingLogits(rows, **heads), target), heads | {"handle": rows.handle})
    assert found.pop("handle") == 0
    assert torch.equal(rows.sums, rows.gradient)
    _assert_close(found | {"features": rows.gradient}, expected, 1e-12)


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
def test_logits_have_the_dtype_that_the_head_gives_them(features_dtype, autocast):
    head, target = Head(7, 3), _target()
    if autocast is None:
        head = head.to(features_dtype)
    x = torch.randn(2, 7, *SHAPE, dtype=features_dtype, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        value = DiceCELoss()(PendingLogits(WholeRows(x), head.weight, head.bias), target)
        expected = DiceCELoss()(head(x), target)
    assert torch.equal(value, expected)
    found = torch.autograd.grad(value, [x, head.weight, head.bias])
    assert [part.dtype for part in found] == [features_dtype, head.weight.dtype, head.bias.dtype]


@pytest.mark.parametrize("backward_under_autocast", [False, True])
def test_the_backward_pass_computes_as_the_forward_pass_did(backward_under_autocast):
    leaves, target = _leaves(torch.float32), _target()
    expected = _results(DiceCELoss()(_pending(leaves), target), leaves)
    value = DiceCELoss()(_pending(leaves), target)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_under_autocast):
        found = _results(value, leaves)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("_chunked")
def test_bfloat16_stays_within_its_rounding_of_float64(options, monai_loss):
    """On the same bf16 logits, all else in float64.

    Measured over these options: value 7e-8, gradients by features 2.5e-3, by the weight 2.3e-3, by the bias 5e-4 (norm
    of the deviation to norm).
    """
    head, target = Head(7, 3), _target(5 if "regions" in options else 3)
    x = torch.randn(2, 7, *SHAPE).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = DiceCELoss(**options)(PendingLogits(WholeRows(x), head.weight, head.bias), target)
        logits = head(x).detach().double().requires_grad_()
    expected = monai_loss(**options)(logits, target)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    (by_logits,) = torch.autograd.grad(expected, logits)
    exact = (
        (x, torch.einsum("kc,bk...->bc...", head.weight.bfloat16().double().flatten(1), by_logits), 4e-3),
        (head.weight, torch.einsum("bkijl,bcijl->kc", by_logits, x.detach().double()).view_as(head.weight), 4e-3),
        (head.bias, by_logits.sum((0, 2, 3, 4)), 1e-3),
    )
    for (leaf, wanted, limit), found in zip(
        exact, torch.autograd.grad(value, [x, head.weight, head.bias]), strict=True
    ):
        assert (found.double() - wanted).norm() < limit * wanted.norm(), leaf.shape


def test_gradient_scaling_keeps_gradients_that_half_precision_would_lose():
    leaves, target = _leaves(torch.float32), _target()
    leaves["features"] = leaves["features"].detach().half().requires_grad_()
    shrink, scale = 2.0**-16, 2.0**16
    with torch.autocast("cpu", torch.float16):
        value = DiceCELoss()(_pending(leaves), target)
    expected = torch.autograd.grad(value, leaves["features"], retain_graph=True)[0].float()
    lost = torch.autograd.grad(value * shrink, leaves["features"], retain_graph=True)[0].float() / shrink
    kept = torch.autograd.grad(value * shrink * scale, leaves["features"])[0].float()
    assert torch.equal(kept, expected)
    assert (lost - expected).norm() > 0.1 * expected.norm()


def _network(**options: Any) -> UNet:
    torch.manual_seed(1)
    plan = NetworkPlan(
        features_per_stage=(6, 8, 10, 12),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        num_blocks_per_stage=(1, 1, 1, 1),
        num_groups=2,
    )
    return UNet(1, 3, plan, **options)


def _train(network: UNet, loss: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Leaves:
    """Value and parameter gradients of a step on fixed data with ignored voxels."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 4, 8, 16, generator=generator).to(dtype)
    target = torch.randint(-1, 3, (2, 4, 8, 16), generator=generator)
    value = loss(network.to(dtype)(x), target)
    return _results(value, dict(network.named_parameters()))


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("recompute_stages", [0, 2])
def test_a_network_learns_the_same_with_pending_logits(recompute_stages):
    outputs = _network(fused_head=True)(torch.randn(1, 1, 4, 8, 16))
    assert [type(part) for part in outputs] == [PendingLogits, PendingLogits]
    expected = _train(_network(), make_loss())
    _assert_close(_train(_network(fused_head=True, recompute_stages=recompute_stages), make_loss()), expected, 1e-9)


def test_the_network_and_the_loss_may_be_recomputed_together():
    network, x, target = (
        _network(fused_head=True).double(),
        torch.randn(2, 1, 4, 8, 16).double(),
        torch.zeros(2, 4, 8, 16).long(),
    )
    parameters = dict(network.named_parameters())
    expected = _results(make_loss()(network(x), target), parameters)
    value = checkpoint(lambda x: make_loss()(network(x), target), x, use_reentrant=False)
    _assert_close(_results(value, parameters), expected, 1e-12)


def test_a_single_output_is_a_list_of_one():
    leaves, target = _leaves(), _target()
    loss = DeepSupervisionLoss(DiceCELoss())
    expected = DiceCELoss()(_pending(leaves), target)
    assert torch.equal(loss(_pending(leaves), target), expected)
    assert torch.equal(loss([_pending(leaves)], target), expected)


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="does not belong to logits"):
        DiceCELoss()(_pending(_leaves()), _target()[:, None])


@pytest.mark.parametrize("fused", [True, False])
def test_a_second_derivative_is_refused_and_not_wrong(fused):
    leaves, target = _leaves(), _target()
    logits = F.conv3d(leaves["features"].tanh(), leaves["weight"], leaves["bias"])
    value = DiceCELoss()(_pending(leaves) if fused else logits, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaves["features"], create_graph=True)


def test_targets_that_are_no_class_indices_are_refused():
    with pytest.raises(ValueError, match=r"integer dtype, not torch\.float32"):
        DiceCELoss()(_pending(_leaves()), _target().float())


def test_a_single_channel_without_regions_is_refused():
    leaves = _leaves(classes=1)
    with pytest.raises(ValueError, match="give regions"):
        DiceCELoss()(_pending(leaves), _target())
    assert DiceCELoss(regions=((1, 2),))(_pending(leaves), _target()).isfinite()
