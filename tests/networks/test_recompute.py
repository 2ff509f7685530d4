"""Recomputation of modules in networks that users bring."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet
from monai.networks.nets import UNet as MonaiUNet
from torch import nn

from pipeline.errors import InputError
from pipeline.networks.recompute import recompute_modules

NETWORKS = {
    "segresnet": (
        lambda: SegResNet(3, init_filters=8, blocks_down=(1, 1), blocks_up=(1,), dropout_prob=0.3),
        ("down_layers.0", "up_layers.0"),
        (8, 16, 24),
    ),
    "unet": (
        lambda: MonaiUNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), norm="batch", dropout=0.2),
        ("model.0", "model.1.submodule.1"),
        (8, 12, 16),
    ),
    "dynunet": (
        lambda: DynUNet(
            3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=(4, 6, 8), norm_name="batch", deep_supervision=True
        ),
        ("input_block", "upsamples.1"),
        (8, 12, 16),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_networks_have_bitwise_the_same_gradients_and_keys(name, gradients_of):
    make, names, shape = NETWORKS[name]
    plain = make().train()
    recomputed = recompute_modules(copy.deepcopy(plain), names)
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    x = torch.randn(1, 1, *shape)
    results = []
    for network in (plain, recomputed):
        torch.manual_seed(3)
        results.append(gradients_of(network, x))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    states = plain.state_dict(), recomputed.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class _Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def test_a_recomputed_module_runs_twice_in_training_and_once_without_gradients():
    network = recompute_modules(nn.Sequential(_Counting(3, 3), nn.Tanh()), ["0"])
    _Counting.calls = 0
    network(torch.randn(2, 3)).sum().backward()
    assert _Counting.calls == 2
    with torch.no_grad():
        network(torch.randn(2, 3))
    assert _Counting.calls == 3


def test_naming_a_module_again_changes_nothing():
    network = recompute_modules(nn.Sequential(_Counting(3, 3)), ["0"])
    recompute_modules(network, ["0"])
    _Counting.calls = 0
    network(torch.randn(2, 3)).sum().backward()
    assert _Counting.calls == 2


def test_copies_and_pickles_recompute_on_their_own_weights():
    network = recompute_modules(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), ["0"])
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        nn.init.zeros_(other[0].weight)
        nn.init.zeros_(other[0].bias)
        x = torch.randn(2, 3)
        assert not other(x).any()
        assert network(x).any()
        other(x).sum().backward()
        assert network[0].weight.grad is None


def test_unknown_names_are_all_named():
    with pytest.raises(InputError, match="no module 3, encoder"):
        recompute_modules(nn.Sequential(nn.Linear(3, 3)), ["encoder", "0", "3"])


@pytest.mark.parametrize("names", [["0", "0.1"], ["", "0.1"]])
def test_nested_recomputation_is_refused(names):
    network = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    with pytest.raises(InputError, match=r"contains 0.1.*must not be nested"):
        recompute_modules(network, names)
    recompute_modules(network, names[:1])
    with pytest.raises(InputError, match="must not be nested"):
        recompute_modules(network, names[1:])


def test_a_second_backward_pass_recomputes_again():
    plain = MonaiUNet(3, 1, 2, channels=(4, 8), strides=(2,), norm="batch")
    network = recompute_modules(copy.deepcopy(plain), ["model.0"])
    x = torch.randn(1, 1, 4, 6, 8)
    found = []
    for each in (plain, network):
        value = each(x).square().sum()
        value.backward(retain_graph=True)
        value.backward()
        found.append([parameter.grad for parameter in each.parameters()] + list(each.buffers()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("change", ["in place", "other parameters"])
def test_parameters_that_changed_since_the_forward_pass_are_noticed(change):
    network = recompute_modules(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), ["0"])
    x = torch.randn(2, 3)
    if change == "in place":
        value = network(x).sum()
        with torch.no_grad():
            network[0].weight.mul_(2)
    else:
        others = {name: value.detach() * 2 for name, value in network.named_parameters()}
        value = torch.func.functional_call(network, others, (x.requires_grad_(),)).sum()
    with pytest.raises(RuntimeError, match="parameters of a recomputed Linear were changed"):
        value.backward()
