"""Networks that users bring: MONAI's, through the meter, recomputation by module name and the conversion of norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn

from pipeline.geometry import Shape3
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.norms import GroupNorm, replace_batchnorm
from pipeline.networks.recompute import recompute_modules
from pipeline.planning.meter import PARTS, count_step, meter_step

PATCH: Shape3 = (16, 24, 8)
OUR_LOSS = DeepSupervisionLoss(DiceCELoss())
_monai_loss = MonaiDiceCELoss(softmax=True, to_onehot_y=True)


def monai_loss(logits: Tensor, target: Tensor) -> Tensor:
    return _monai_loss(logits, target[:, None])


class Case(NamedTuple):
    """A network, its loss, a patch that it takes, and modules that are worth recomputing."""

    make: Callable[..., nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    patch_size: Shape3
    recomputed: tuple[str, ...]


def make_unet(norm: str = "instance") -> nn.Module:
    return MonaiUNet(3, 2, 3, (4, 8, 12), (2, 2), num_res_units=1, dropout=0.1, norm=norm)


def make_dynunet(norm: str = "instance") -> nn.Module:
    kernels, strides = (3, (3, 3, 1), 3, 3), (1, (2, 2, 1), 2, 2)
    return DynUNet(
        3,
        2,
        3,
        kernels,
        strides,
        strides[1:],
        filters=(4, 8, 12, 16),
        norm_name=(norm, {"affine": True}),
        deep_supervision=True,
        deep_supr_num=2,
    )


def make_segresnet(norm: Any = ("group", {"num_groups": 4})) -> nn.Module:
    return SegResNet(3, 8, 2, 3, norm=norm, blocks_down=(1, 2), blocks_up=(1,))


def make_swin_unetr(norm: str = "instance") -> nn.Module:
    return SwinUNETR(in_channels=2, out_channels=3, depths=(2, 1, 1, 1), feature_size=12, norm_name=norm)


CASES = {
    "UNet": Case(make_unet, monai_loss, PATCH, ("model.0", "model.2")),
    "DynUNet": Case(make_dynunet, OUR_LOSS, PATCH, ("input_block", "upsamples.2.conv_block")),
    "SegResNet": Case(make_segresnet, monai_loss, PATCH, ("down_layers.0", "down_layers.1", "up_layers.0")),
    "SwinUNETR": Case(make_swin_unetr, monai_loss, (32, 64, 32), ("encoder1", "decoder1", "swinViT.layers1.0")),
}
each_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def make_batch(patch_size: Shape3, batch_size: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 2, *patch_size, generator=generator)
    return images, torch.randint(0, 3, (batch_size, *patch_size), generator=generator)


@pytest.mark.parametrize(("precision", "optimizer", "accumulate"), [("bf16-mixed", "sgd", 1), ("32-true", "adamw", 2)])
@each_network
def test_fake_tensors_count_byte_for_byte_as_real_ones(
    case: Case, precision: Any, optimizer: Any, accumulate: int
) -> None:
    network = case.make()
    options = {"precision": precision, "optimizer": optimizer, "accumulate_grad_batches": accumulate}
    metered = meter_step(network, case.loss, patch_size=case.patch_size, in_channels=2, device_type="cpu", **options)
    assert metered == count_step(network, case.loss, *make_batch(case.patch_size), **options)
    assert tuple(metered.parts) == PARTS
    assert sum(metered.parts.values()) == metered.peak_bytes


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch adds up the gradient of an indexed table atomically: with several threads in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@each_network
def test_recomputation_by_module_name_gives_the_same_gradients_bit_by_bit(case: Case) -> None:
    network = case.make().train()
    recomputed = recompute_modules(copy.deepcopy(network), case.recomputed)
    assert list(recomputed.state_dict()) == list(network.state_dict())
    images, target = make_batch(case.patch_size)
    losses = []
    for each in (network, recomputed):
        torch.manual_seed(1)
        losses.append(case.loss(each(images), target))
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, parameter), other in zip(network.named_parameters(), recomputed.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@each_network
def test_recomputation_by_module_name_lowers_the_metered_peak(case: Case, device_type: Any) -> None:
    options = {"patch_size": case.patch_size, "in_channels": 2, "device_type": device_type}
    plain = meter_step(case.make(), case.loss, **options)
    recomputed = meter_step(recompute_modules(case.make(), case.recomputed), case.loss, **options)
    assert recomputed.peak_bytes < plain.peak_bytes
    assert recomputed.parts["activations"] < plain.parts["activations"]


@each_network
def test_batch_norms_become_group_norms_with_the_same_affine_weights(case: Case) -> None:
    network = case.make("batch")
    norms = {name: part for name, part in network.named_modules() if isinstance(part, nn.BatchNorm3d)}
    generator = torch.Generator().manual_seed(0)
    for norm in norms.values():
        nn.init.normal_(norm.weight, generator=generator)
    affine = {name: (part.weight, part.bias) for name, part in norms.items()}
    assert affine
    parameters = {id(parameter) for parameter in network.parameters()}
    replaced = replace_batchnorm(network, num_groups=4)
    for name, (weight, bias) in affine.items():
        layer = replaced.get_submodule(name)
        assert isinstance(layer, GroupNorm)
        assert layer.weight is weight
        assert layer.bias is bias
    assert not any(isinstance(part, nn.BatchNorm3d) for part in replaced.modules())
    assert {id(parameter) for parameter in replaced.parameters()} == parameters
    case.loss(replaced.train()(make_batch(case.patch_size)[0]), make_batch(case.patch_size)[1]).backward()
    assert all(weight.grad.isfinite().all() for weight, _ in affine.values())


@each_network
def test_a_converted_network_is_metered_byte_for_byte_too(case: Case) -> None:
    network = replace_batchnorm(case.make("batch"), num_groups=4)
    options: dict[str, Any] = {"precision": "bf16-mixed"}
    metered = meter_step(network, case.loss, patch_size=case.patch_size, in_channels=2, device_type="cpu", **options)
    assert metered == count_step(network, case.loss, *make_batch(case.patch_size), **options)


def test_every_output_of_deep_supervision_counts_as_head() -> None:
    case = CASES["DynUNet"]
    memory = meter_step(case.make(), lambda out, _: out.sum(), patch_size=PATCH, in_channels=2, precision="32-true")
    # DynUNet stacks its outputs, all at full resolution: the last one and two of deep supervision.
    assert memory.parts["head"] == 3 * 3 * 16 * 24 * 8 * 4
