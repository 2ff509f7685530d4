"""What a forward pass is estimated to take, against the tensors of that very pass on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.networks.forward_memory import NUM_GAPS, estimate_forward_memory
from pipeline.networks.small_convolution import IS_X86, Convolution
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.planning.fake_kernels import MeterFakeMode, fake_copy
from pipeline.planning.storages import StorageCounter

WINDOW = (48, 64, 40)


class LiveAndInside(StorageCounter):
    """Keeps the most that tensors and the inside of one operator took at one time."""

    most_bytes = 0

    def _note_process(self, inside_bytes: int) -> None:
        self.most_bytes = max(self.most_bytes, self.live_bytes + inside_bytes)


def make_network(features: int, **options: Any) -> UNet:
    plan = NetworkPlan(
        features_per_stage=(features, 2 * features, 4 * features),
        strides=((1, 1, 1), (2, 2, 2), (1, 2, 2)),
        kernel_sizes=((3, 3, 3), (3, 3, 3), (1, 3, 3)),
        num_blocks_per_stage=(1, 2, 3),
        **options,
    )
    return UNet(2, 3, plan).eval()


def with_convolutions_of_torch(network: UNet) -> UNet:
    """As a meter sees them, from which `Convolution` hides that it asks oneDNN directly."""
    for layer in network.modules():
        if isinstance(layer, Convolution):
            layer.__class__ = nn.Conv3d
    return network


@pytest.mark.parametrize("features", [8, 20])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("num_decoder_blocks", [1, 3])
@pytest.mark.parametrize(("block", "norm"), [("plain", "group"), ("residual", "instance"), ("residual", "batch")])
def test_the_estimate_is_what_the_pass_itself_has_alive(
    features: int, batch_size: int, num_decoder_blocks: int, block: Any, norm: Any
) -> None:
    network = with_convolutions_of_torch(
        make_network(features, num_decoder_blocks=num_decoder_blocks, block=block, norm=norm)
    )
    # Not in inference mode, where a counter would see no convolutions but what they are made of.
    with MeterFakeMode(allow_non_fake_inputs=True), torch.no_grad():
        fake, windows = fake_copy(network), torch.empty(batch_size, 2, *WINDOW)
        counter = LiveAndInside()
        counter.count([*fake.parameters(), *fake.buffers(), windows])
        before = counter.live_bytes
        with counter:
            pending = fake.pending_logits(windows)
    estimated = estimate_forward_memory(network, WINDOW, in_channels=2, batch_size=batch_size)
    assert pending.shape == (batch_size, 3, *WINDOW)
    assert estimated.tensor_bytes == pytest.approx(counter.peak_bytes - before, rel=0.005)
    assert estimated.peak_bytes == pytest.approx(counter.most_bytes - before, rel=0.005)


def test_narrow_networks_take_most_inside_convolutions_of_torch() -> None:
    narrow, wide = (
        estimate_forward_memory(with_convolutions_of_torch(make_network(features)), (40, 56, 40), in_channels=2)
        for features in (8, 32)
    )
    columns = 4 * 27 * 8 * 40 * 56 * 40
    assert narrow.peak_bytes - narrow.tensor_bytes > columns / 2 > 2 * narrow.tensor_bytes
    assert wide.peak_bytes < 2 * wide.tensor_bytes
    # Columns of the first stage go back to the system; those of the next ones are kept.
    assert columns / 4 < narrow.kept_bytes < NUM_GAPS * columns / 2


@pytest.mark.skipif(not (IS_X86 and torch.backends.mkldnn.is_available()), reason="oneDNN is asked for on x86 only")
def test_narrow_networks_are_spared_the_columns_where_onednn_is_asked_for() -> None:
    own, of_torch = (
        estimate_forward_memory(network, (40, 56, 40), in_channels=2)
        for network in (make_network(8), with_convolutions_of_torch(make_network(8)))
    )
    columns = 4 * 27 * 8 * 40 * 56 * 40
    assert own.tensor_bytes == of_torch.tensor_bytes
    assert own.peak_bytes < of_torch.peak_bytes - columns / 2
    # Larger batches torch gives to oneDNN itself.
    batches = [
        estimate_forward_memory(network, (40, 56, 40), in_channels=2, batch_size=2)
        for network in (make_network(8), with_convolutions_of_torch(make_network(8)))
    ]
    assert batches[0] == batches[1]
