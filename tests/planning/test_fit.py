from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet
from monai.networks.nets import UNet as MonaiUNet
from torch import nn

from pipeline.errors import InputError
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.recompute import recompute_modules
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.planning.fit import largest_patch, patches_within
from pipeline.planning.kept_bytes import propose_recompute
from pipeline.planning.meter import meter_step

NETWORKS = {
    "UNet": lambda: MonaiUNet(3, 2, 3, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="instance"),
    "DynUNet": lambda: DynUNet(3, 2, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
    "SegResNet": lambda: SegResNet(init_filters=8, in_channels=2, out_channels=3, blocks_down=(1, 2), blocks_up=(1,)),
}
PATCHES = patches_within((64, 96, 48), 8)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]()


def required(network: nn.Module, patch: tuple[int, int, int], names: tuple[str, ...] = ()) -> int:
    if names:
        network = recompute_modules(network, names)
    peak = meter_step(network, make_loss(), patch_size=patch, in_channels=2).peak_bytes
    return peak + estimate_overhead_bytes(peak)


def test_patches_shrink_within_the_limit_by_the_divisor() -> None:
    patches = patches_within((70, 100, 20), (8, 8, 4))
    assert patches[0] == (64, 96, 20)
    for larger, smaller in pairwise(patches):
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
        assert prod(smaller) < prod(larger)
    assert all(n % d == 0 for patch in patches for n, d in zip(patch, (8, 8, 4), strict=True))
    assert min(patches[-1]) >= 16
    with pytest.raises(InputError, match=r"limit: 4 x 100 x 20 holds no multiple of 8 x 8 x 8"):
        patches_within((4, 100, 20), 8)


def test_the_largest_patch_fits_and_the_next_larger_does_not(network: nn.Module) -> None:
    budget = required(network, PATCHES[3])
    fit = largest_patch(network, make_loss(), in_channels=2, budget_bytes=budget, patch_sizes=PATCHES)
    assert fit.best.patch_size == PATCHES[3]
    assert fit.best.required_bytes == budget
    assert {PATCHES[2], PATCHES[3]} <= {trial.patch_size for trial in fit.looked_at}


def test_recomputing_what_is_proposed_gives_a_larger_patch_and_leaves_the_network_alone(network: nn.Module) -> None:
    budget = required(network, PATCHES[-6])
    state, forwards = network.state_dict().keys(), [module.forward for module in network.modules()]
    plain = largest_patch(network, make_loss(), in_channels=2, budget_bytes=budget, patch_sizes=PATCHES)
    fit = largest_patch(network, make_loss(), in_channels=2, budget_bytes=budget, patch_sizes=PATCHES, recompute="auto")
    assert prod(fit.best.patch_size) > prod(plain.best.patch_size)
    assert fit.best.recompute
    assert fit.best.required_bytes <= budget
    assert network.state_dict().keys() == state
    assert [module.forward for module in network.modules()] == forwards
    assert fit.best.required_bytes == required(network, fit.best.patch_size, fit.best.recompute)


def test_proposals_are_modules_of_the_network_none_of_which_keeps_most_of_it(network: nn.Module) -> None:
    names = propose_recompute(network, in_channels=2, patch_size=(16, 24, 16))
    modules = dict(network.named_modules())
    assert len(names) > 2
    assert set(names) <= set(modules)
    inner = [id(part) for name in names for part in modules[name].modules()]
    assert len(inner) == len(set(inner)), "one proposed module holds another"


def test_the_module_that_keeps_most_is_proposed_first() -> None:
    def block(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(4, width, 3, padding=1), nn.Sigmoid(), nn.Conv3d(width, 4, 1))

    network = nn.Sequential(block(8), block(16), block(9), nn.Conv3d(4, 3, 1))
    assert propose_recompute(network, in_channels=4, patch_size=(8, 12, 8)) == ("1", "2", "0")


def test_the_fewest_modules_with_which_the_patch_fits_are_recomputed() -> None:
    network = NETWORKS["DynUNet"]()
    names = propose_recompute(network, in_channels=2, patch_size=(16, 24, 16))
    lists = [names[:1], names[:3], names]
    needs = [required(NETWORKS["DynUNet"](), PATCHES[0], tuple(chosen)) for chosen in ((), *lists)]
    assert needs == sorted(needs, reverse=True)
    assert needs[2] < needs[1]
    fit = largest_patch(
        network, make_loss(), in_channels=2, budget_bytes=needs[2], patch_sizes=PATCHES, recompute=lists
    )
    assert (fit.best.patch_size, fit.best.recompute) == (PATCHES[0], names[:3])


def test_what_cannot_fit_is_an_error_with_the_smallest_need() -> None:
    with pytest.raises(InputError, match=r"budget_bytes: no patch fits into 0 GiB; 16 x 16 x 16 plain needs 0\.851 G"):
        largest_patch(NETWORKS["UNet"](), make_loss(), in_channels=2, budget_bytes=1024, patch_sizes=PATCHES)
