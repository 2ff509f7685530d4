from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.networks.plain_form import PlainUNet
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan

SMALL_PLAN = Callable[..., NetworkPlan]


@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
@pytest.mark.parametrize("block", ["plain", "residual"])
def test_the_same_weights_under_the_same_names_give_the_same_outputs(
    norm: str, block: str, small_plan: SMALL_PLAN
) -> None:
    plan = small_plan(norm=norm, block=block)
    network = UNet(2, 3, plan)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            # Running statistics of batch norms, that they are used and not only zeros and ones.
            buffer.uniform_(0.5, 1.5)
    for module in network.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    plain = PlainUNet(2, 3, plan)
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 2, 4, 8, 16)
    with torch.inference_mode():
        torch.testing.assert_close(plain(x), network.eval()(x), rtol=1e-5, atol=1e-5)
    assert list(plain.state_dict()) == list(network.state_dict())


def test_a_network_of_slabs_has_the_same_plain_form(small_plan: SMALL_PLAN) -> None:
    plan = small_plan()
    slabs = UNet(1, 3, plan, slab_stages=2).eval()
    plain = PlainUNet(1, 3, plan)
    plain.load_state_dict(slabs.state_dict())
    x = torch.randn(1, 1, 8, 8, 16)
    with torch.inference_mode():
        torch.testing.assert_close(plain(x), slabs(x), rtol=1e-4, atol=1e-5)


def test_it_holds_no_operation_that_depends_on_autocast_or_on_the_size(small_plan: SMALL_PLAN) -> None:
    plain = PlainUNet(1, 3, small_plan())
    traced = torch.jit.trace(plain, torch.randn(1, 1, 4, 8, 16))
    other = torch.randn(3, 1, 8, 4, 32)
    with torch.inference_mode():
        torch.testing.assert_close(traced(other), plain(other))
    assert "autocast" not in str(traced.inlined_graph)
