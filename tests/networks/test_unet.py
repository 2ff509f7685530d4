"""The U-Net against the concatenating composition it stands for, its shapes, its heads and its recomputation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.blocks import Head, MergeBlock, ResidualBlock
from pipeline.networks.norms import GroupNorm
from pipeline.networks.unet import UNet, num_heads
from pipeline.planning.storages import StorageCounter

SHAPE = (4, 12, 24)


class Composition(nn.Module):
    """The plain composition of a plain-block U-Net out of torch's own functions, on the very weights of ours."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for stage in self.network.encoder:
            for block in stage:
                x = self._norm(block.norm, F.conv3d(x, block.conv.weight, None, block.conv.stride, block.conv.padding))
            skips.append(x)
        x, outputs = skips.pop(), []
        for index in reversed(range(len(self.network.decoder))):
            stage = self.network.decoder[index]
            up = F.conv_transpose3d(x, stage.upsample.weight, stage.upsample.bias, stage.upsample.stride)
            weight = torch.cat([stage.merge.up_conv.weight, stage.merge.skip_conv.weight], dim=1)
            x = F.conv3d(torch.cat([up, skips.pop()], dim=1), weight, None, 1, stage.merge.up_conv.padding)
            x = self._norm(stage.merge.norm, x)
            for block in stage.blocks:
                x = self._norm(block.norm, F.conv3d(x, block.conv.weight, None, 1, block.conv.padding))
            if index < len(self.network.heads):
                head = self.network.heads[index]
                outputs.insert(0, F.conv3d(x, head.weight, head.bias))
        return outputs

    @staticmethod
    def _norm(norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, GroupNorm):
            return F.leaky_relu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias), 0.01)
        return F.leaky_relu(F.batch_norm(x, None, None, norm[0].weight, norm[0].bias, training=True), 0.01)


@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_outputs_and_gradients_equal_the_concatenating_composition(small_plan, gradients_of, norm, dtype, tolerance):
    network = UNet(2, 3, small_plan(norm=norm)).to(dtype)
    composition = Composition(network)
    x = torch.randn(2, 2, *SHAPE, dtype=dtype)
    for ours, theirs in zip(network(x), composition(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    expected = gradients_of(composition, x)
    for name, found in gradients_of(network, x).items():
        theirs = expected["input" if name == "input" else f"network.{name}"]
        torch.testing.assert_close(found, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) + 1e-12)


def test_anisotropic_strides_give_logits_of_each_decoder_stage_but_the_lowest(small_plan):
    logits = UNet(1, 4, small_plan())(torch.randn(2, 1, *SHAPE))
    assert [tuple(part.shape) for part in logits] == [(2, 4, 4, 12, 24), (2, 4, 4, 6, 12)]


@pytest.mark.parametrize(("num_stages", "expected"), [(2, 1), (3, 1), (4, 2), (6, 4)])
def test_number_of_heads_follows_the_stages(num_stages, expected, small_plan):
    shape = {
        "features_per_stage": (2,) * num_stages,
        "strides": ((1, 1, 1),) + ((2, 2, 2),) * (num_stages - 1),
        "kernel_sizes": ((3, 3, 3),) * num_stages,
        "num_blocks_per_stage": (1,) * num_stages,
    }
    assert num_heads(small_plan(**shape)) == expected
    assert num_heads(small_plan(**shape, deep_supervision=False)) == 1


def test_eval_mode_and_no_deep_supervision_return_one_tensor(small_plan):
    x = torch.randn(1, 1, *SHAPE)
    network = UNet(1, 3, small_plan())
    full = network(x)[0]
    assert torch.equal(network.eval()(x), full)
    assert UNet(1, 3, small_plan(deep_supervision=False))(x).shape == (1, 3, *SHAPE)


def test_a_size_that_is_no_multiple_of_the_stride_is_named(small_plan):
    with pytest.raises(InputError, match=r"\[4, 13, 24\] is not a multiple of the network's stride \[4, 4, 8\]"):
        UNet(1, 3, small_plan())(torch.randn(1, 1, 4, 13, 24))


def _plan_for(small_plan, block):
    return small_plan(block=block, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)))


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("recompute_stages", [1, 2, 4])
def test_recomputed_gradients_are_bitwise_the_plain_ones(small_plan, gradients_of, block, norm, recompute_stages):
    plan = small_plan(block=block, norm=norm)
    plain, recomputed = UNet(1, 3, plan), UNet(1, 3, plan, recompute_stages=recompute_stages)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, *SHAPE)
    for _ in range(2):
        expected, found = gradients_of(plain, x), gradients_of(recomputed, x)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(found, plain.state_dict()[key]) for key, found in recomputed.state_dict().items())


def _kept_bytes(network: nn.Module, x: Tensor) -> int:
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(x)
    assert outputs is not None
    return sum(storages.values())


def test_every_stage_recomputed_keeps_less_than_half_for_the_backward_pass(small_plan):
    plan = small_plan(deep_supervision=False)
    x = torch.randn(1, 1, 8, 24, 40)
    kept = [_kept_bytes(UNet(1, 3, plan, recompute_stages=stages), x) for stages in (0, 1, 4)]
    assert kept[2] < kept[1] < kept[0]
    assert kept[2] < kept[0] / 2


def test_merging_keeps_nothing_of_twice_the_channels(small_plan):
    block = MergeBlock(6, (3, 3, 3), small_plan())
    up, skip = (torch.randn(1, 6, 8, 16, 24, requires_grad=True) for _ in range(2))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor.shape[1:2]) or tensor, lambda t: t):
        block(up, skip)
    assert not any(channels == (12,) for channels in seen)


def test_a_residual_block_starts_as_its_shortcut(small_plan):
    block = ResidualBlock(6, 6, (3, 3, 3), small_plan())
    x = torch.randn(2, 6, *SHAPE)
    assert torch.equal(block(x), F.leaky_relu(x, 0.01))


def test_residual_blocks_train_every_weight(small_plan, gradients_of):
    network = UNet(1, 3, _plan_for(small_plan, "residual"))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    found = gradients_of(network, torch.randn(1, 1, *SHAPE))
    assert all(torch.isfinite(part).all() and part.abs().max() > 0 for part in found.values())


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_head_equals_the_convolution_it_stands_for(channels_last):
    head = Head(5, 3).double()
    x = torch.randn(2, 5, 3, 4, 7, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    torch.testing.assert_close(head(x), F.conv3d(x, head.weight, head.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_takes_nothing_of_the_logits_size_beyond_logits_and_gradient(dtype):
    head, counter = Head(2, 7), StorageCounter()
    x = torch.randn(2, 2, 8, 16, 24, dtype=dtype)
    counter.claim([x, *head.parameters()], "input")
    given = counter.live_bytes
    with counter, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = head(x)
        forward_bytes = counter.peak_bytes - given
        logits.backward(torch.ones_like(logits))
    assert logits.dtype == dtype
    assert forward_bytes < 1.01 * logits.nbytes
    assert counter.peak_bytes - given < 2.01 * logits.nbytes


def test_state_dict_has_one_key_per_weight(small_plan):
    network = UNet(1, 3, small_plan(), recompute_stages=2)
    state = network.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert set(state) == {name for name, _ in network.named_parameters()}


def test_logits_keep_the_autocast_dtype_and_every_activation_too(small_plan):
    network = UNet(1, 3, small_plan())
    seen = set()
    for module in network.modules():
        module.register_forward_hook(lambda _module, _inputs, output: seen.add(getattr(output, "dtype", None)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(1, 1, *SHAPE))
    assert all(part.dtype == torch.bfloat16 for part in logits)
    assert seen <= {torch.bfloat16, None}


def test_copies_and_pickles_are_networks_of_their_own(small_plan):
    network = UNet(1, 3, small_plan(), recompute_stages=2).eval()
    x = torch.randn(1, 1, *SHAPE)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("recompute_stages", [0, 4])
def test_a_training_step_runs_on_fake_tensors(small_plan, recompute_stages):
    with FakeTensorMode():
        network = UNet(1, 3, small_plan(), recompute_stages=recompute_stages)
        target = torch.randint(0, 3, (1, 64, 128, 128))
        with torch.autocast("cpu", torch.bfloat16):
            value = DeepSupervisionLoss(DiceCELoss())(network(torch.randn(1, 1, 64, 128, 128)), target)
        value.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in network.parameters())


def test_shapes_follow_on_the_meta_device(small_plan):
    network = UNet(1, 3, small_plan()).to("meta").eval()
    assert network(torch.empty(1, 1, *SHAPE, device="meta")).shape == (1, 3, *SHAPE)


@pytest.mark.parametrize(("block", "bf16"), [("plain", True), ("residual", False)])
def test_the_network_overfits_one_patch(small_plan, block, bf16):
    image = torch.randn(1, 1, *SHAPE) * 0.3
    target = torch.zeros(1, *SHAPE, dtype=torch.int64)
    target[:, 1:3, 3:9, 4:12], target[:, :, 2:5, 14:18] = 1, 2
    image += target[:, None]
    network = UNet(1, 3, _plan_for(small_plan, block))
    loss, optimizer = DeepSupervisionLoss(DiceCELoss()), torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(network(image), target)
        value.backward()
        optimizer.step()
    found = network.eval()(image).argmax(1)
    for index in (1, 2):
        overlap = ((found == index) & (target == index)).sum()
        assert 2 * overlap / ((found == index).sum() + (target == index).sum()) > 0.95
