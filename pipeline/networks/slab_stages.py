"""The highest-resolution stages of a U-Net in slabs. Shapes: (B, C, I, J, K)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pipeline.networks.blocks import ConvBlock, DecoderStage
from pipeline.networks.norms import GroupNorm
from pipeline.slabs.convolution import convolve_and_norm, convolve_whole
from pipeline.slabs.resolution import UpsampledRows, make_whole
from pipeline.slabs.rows import PendingLogits, Rows, WholeRows

if TYPE_CHECKING:
    from pipeline.networks.unet import UNet


def run_in_slabs(network: UNet, x: Tensor, *, pending: bool) -> list[Tensor | PendingLogits]:
    """The outputs of a U-Net whose first `slab_stages` stages run in slabs; the rest runs as it always does.

    Args:
        network: The U-Net.
        x: (B, C, I, J, K), a multiple of its stride.
        pending: Leave logits to whoever takes the outputs.
    """
    num_slab_stages = min(network.slab_stages, len(network.encoder))
    # Skips and, last, the activation that the next stage reads. Popped as they are used up: an evaluation, where
    # autograd keeps nothing, then holds no more than what is still to be read.
    held: list[Rows] = []
    for index in range(num_slab_stages):
        held.append(_encode(network, index, held[-1] if held else WholeRows(x)))
    outputs: list[Tensor | PendingLogits] = []
    if num_slab_stages < len(network.encoder):
        deep, outputs = _run_whole_stages(network, held[-1], first=num_slab_stages, pending=pending)
        held.append(WholeRows(deep))
        del deep
    for index in reversed(range(min(num_slab_stages, len(network.decoder)))):
        held.append(_decode(network, index, held, read_once=pending and index == 0))
        if index < network.num_outputs:
            outputs.insert(0, _head(network, index, held[-1], pending=pending))
    return outputs


def _run_whole_stages(
    network: UNet, rows: Rows, *, first: int, pending: bool
) -> tuple[Tensor, list[Tensor | PendingLogits]]:
    """The stages below the slabs, whose first convolution reads rows."""
    return network.run_stages(convolve_whole(rows, network.encoder[first][0].conv), first=first, pending=pending)


def _encode(network: UNet, index: int, rows: Rows) -> Rows:
    for block in network.encoder[index]:
        rows = _run(network, index, block, [rows])
    return rows


def _decode(network: UNet, index: int, held: list[Rows], *, read_once: bool) -> Rows:
    """The activation of a decoder stage, from the last two held, a skip and the activation below it."""
    stage: DecoderStage = network.decoder[index]
    inputs = [UpsampledRows(held.pop(), stage.upsample), held.pop()]
    last = len(stage.blocks) - 1
    layers, norm = [stage.merge.up_conv, stage.merge.skip_conv], stage.merge.norm
    rows = _convolve(network, index, inputs, layers, norm, has_one_reader=read_once and last < 0)
    inputs.clear()
    for number, block in enumerate(stage.blocks):
        # Only the head reads the last rows of all, and it can sweep twice.
        rows = _run(network, index, block, [rows], has_one_reader=read_once and number == last)
    return rows


def _run(network: UNet, index: int, block: ConvBlock, inputs: Sequence[Rows], *, has_one_reader: bool = False) -> Rows:
    return _convolve(network, index, inputs, [block.conv], block.norm, has_one_reader=has_one_reader)


def _convolve(
    network: UNet,
    index: int,
    inputs: Sequence[Rows],
    layers: Sequence[nn.Conv3d],
    norm: GroupNorm,
    *,
    has_one_reader: bool,
) -> Rows:
    return convolve_and_norm(
        inputs,
        layers,
        norm,
        negative_slope=norm.negative_slope,
        on_host=index < network.offload_stages,
        has_one_reader=has_one_reader,
    )


def _head(network: UNet, index: int, rows: Rows, *, pending: bool) -> Tensor | PendingLogits:
    head = network.heads[index]
    if pending:
        return PendingLogits(rows, head.weight, head.bias)
    return head(make_whole(rows))
