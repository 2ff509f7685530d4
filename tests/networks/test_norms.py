"""The norm against torch's own composition, its dtypes, and batch norms replaced in networks of others."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.networks.norms import GroupNorm, clip_num_groups, make_norm, replace_batchnorm

SHAPE = (2, 6, 3, 5, 7)


@pytest.mark.parametrize(
    ("num_groups", "channels", "expected"), [(8, 32, 8), (8, 12, 6), (8, 7, 7), (8, 11, 1), (5, 32, 4), (8, 3, 3)]
)
def test_groups_are_clipped_to_a_divisor_of_the_channels(num_groups, channels, expected):
    assert clip_num_groups(num_groups, channels) == expected
    assert GroupNorm(num_groups, channels)(torch.randn(1, channels, 2, 3, 4)).shape == (1, channels, 2, 3, 4)


def _norm_with_random_affine(**options) -> GroupNorm:
    norm = GroupNorm(3, 6, **options).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_norm_with_activation_equals_torch_and_a_leaky_relu(dtype, tolerance, channels_last):
    norm = _norm_with_random_affine(negative_slope=0.01).to(dtype)
    plain = nn.Sequential(nn.GroupNorm(3, 6), nn.LeakyReLU(0.01)).to(dtype)
    plain[0].load_state_dict(norm.state_dict())
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    x = torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    weights = torch.randn(SHAPE, dtype=dtype)
    results = []
    for module in (norm, plain):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * weights).sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance * expected.detach().abs().max().item()
        )


def test_gradients_of_norm_and_activation_pass_gradcheck():
    norm = _norm_with_random_affine(negative_slope=0.01)
    x = torch.randn(1, 6, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


class _Watch(TorchFunctionMode):
    """Records whether autocast is on, and the dtypes, where the group norm kernel is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, set[torch.dtype]]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.group_norm:
            dtypes = {part.dtype for part in args if isinstance(part, Tensor)}
            self.calls.append((torch.is_autocast_enabled("cpu"), dtypes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_runs_in_half_precision_out_of_reach_of_autocast(dtype):
    norm = GroupNorm(3, 6, negative_slope=0.01)
    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype), _Watch() as watch:
        y = norm(x)
    assert watch.calls == [(False, {dtype})]
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert norm.weight.grad.dtype == torch.float32


def test_half_precision_statistics_are_taken_in_float32():
    x = (1000 + torch.randn(1, 6, 9, 31, 33)).bfloat16()
    y = GroupNorm(2, 6)(x).float()
    expected = F.group_norm(x.double(), 2)
    assert (y - expected).abs().max() < 2**-7 * expected.abs().max()


def test_norm_and_activation_keep_only_input_output_and_statistics():
    x = torch.randn(2, 6, 8, 16, 16, requires_grad=True)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = GroupNorm(3, 6, negative_slope=0.01)(x)
    assert sum(kept.values()) - x.nbytes - y.nbytes < 200


def test_instance_norm_is_torchs_instance_norm():
    norm = make_norm("instance", 6, num_groups=2)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(norm(x), F.instance_norm(x), rtol=1e-5, atol=1e-5)


NETWORKS = {
    "unet": lambda: MonaiUNet(3, 1, 3, channels=(6, 12, 16), strides=(2, 2), num_res_units=1, norm="batch"),
    "dynunet": lambda: DynUNet(
        3,
        1,
        3,
        [3] * 3,
        [1, 2, 2],
        [2, 2],
        filters=(5, 10, 20),
        norm_name="batch",
        deep_supervision=True,
        res_block=True,
    ),
    "segresnet": lambda: SegResNet(3, init_filters=6, norm="batch", blocks_down=(1, 2), blocks_up=(1,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norms_of_monai_networks_become_group_norms_with_their_weights(name):
    network = NETWORKS[name]()
    norms = {key: module for key, module in network.named_modules() if isinstance(module, nn.BatchNorm3d)}
    for parameter in (parameter for norm in norms.values() for parameter in norm.parameters()):
        nn.init.normal_(parameter)
    parameters = {key: parameter for key, parameter in network.named_parameters()}
    converted = replace_batchnorm(network, num_groups=4)
    assert converted is network
    assert norms
    for key, norm in norms.items():
        layer = network.get_submodule(key)
        assert isinstance(layer, GroupNorm)
        assert layer.num_channels == norm.num_features
        assert (layer.weight is norm.weight, layer.bias is norm.bias, layer.eps == norm.eps) == (True, True, True)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    found = dict(network.named_parameters())
    assert set(found) == set(parameters)
    assert all(found[key] is parameter for key, parameter in parameters.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_converted_networks_do_not_mix_the_samples_of_a_batch(name):
    network = replace_batchnorm(NETWORKS[name](), num_groups=4).train()
    x = torch.randn(2, 1, 8, 16, 24)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-4)
    network(x).sum().backward()


def test_converting_twice_changes_nothing_more():
    network = replace_batchnorm(NETWORKS["unet"]())
    modules = dict(network.named_modules())
    assert dict(replace_batchnorm(network).named_modules()) == modules


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(6), nn.BatchNorm2d(6), nn.BatchNorm3d(6, eps=0.1), nn.SyncBatchNorm(6)], ids=repr
)
def test_a_network_that_is_itself_a_batch_norm_comes_back_as_group_norm(norm):
    norm = norm.double().eval()
    nn.init.normal_(norm.weight)
    layer = replace_batchnorm(norm, num_groups=2)
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    expected = F.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(layer(x), expected)
    assert not layer.training


def test_a_batch_norm_in_two_places_becomes_one_group_norm_in_both():
    shared = nn.BatchNorm3d(6, affine=False)
    network = replace_batchnorm(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}))
    assert network["a"][0] is network["b"]
    assert network["b"].weight is None
    assert network["b"](torch.randn(SHAPE)).shape == SHAPE


def test_instance_norms_and_frozen_weights_stay_as_they_are():
    network = nn.Sequential(nn.InstanceNorm3d(6), nn.BatchNorm3d(6))
    network[1].weight.requires_grad_(False)
    converted = replace_batchnorm(copy.deepcopy(network))
    assert isinstance(converted[0], nn.InstanceNorm3d)
    assert (converted[1].weight.requires_grad, converted[1].bias.requires_grad) == (False, True)


def test_a_lazy_batch_norm_without_channels_is_refused():
    with pytest.raises(ValueError, match="run the network once"):
        replace_batchnorm(nn.Sequential(nn.LazyBatchNorm3d()))
