"""Time per voxel of one training step: our network and loss against the plain composition, paired in one run.

    python scripts/benchmarks/step.py --patch_size 40 56 40 --batch_size 2
    python scripts/benchmarks/step.py --clock cpu --num_threads 1        # on a machine that others use too

The variants take turns in every round and ratios are taken within a round, so that a machine that is shared slows all
of them alike. "plain" is the textbook composition of the same U-Net: skip and up-sampled tensor concatenated, torch's
group norm, a convolution as head, MONAI's DiceCELoss. Patches and labels are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from torch import Tensor, nn

from pipeline.geometry import Shape3
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.blocks import NEGATIVE_SLOPE, ConvBlock, DecoderStage
from pipeline.networks.norms import GroupNorm
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    name: str
    bf16: bool
    plain: bool = False
    channels_last: bool = False
    recompute_stages: int = 0


class PlainNorm(nn.GroupNorm):
    """Torch's group norm and leaky ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, I, J, K) -> the same shape."""
        return nn.functional.leaky_relu(super().forward(x), NEGATIVE_SLOPE)


class PlainDecoderStage(nn.Module):
    """A decoder stage that concatenates skip and up-sampled tensor."""

    def __init__(self, stage: DecoderStage) -> None:
        super().__init__()
        own = stage.merge.skip_conv
        self.upsample, self.norm, self.blocks = stage.upsample, stage.merge.norm, stage.blocks
        self.conv = nn.Conv3d(2 * own.in_channels, own.out_channels, own.kernel_size, padding=own.padding, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """X at the lower resolution and skip -> like skip."""
        return self.blocks(self.norm(self.conv(torch.cat([skip, self.upsample(x)], dim=1))))


def make_plain(network: UNet) -> UNet:
    """The textbook composition of our network, in place."""
    network.decoder = nn.ModuleList(PlainDecoderStage(stage) for stage in network.decoder)
    network.heads = nn.ModuleList(nn.Conv3d(head.in_channels, head.out_channels, 1) for head in network.heads)
    for block in [module for module in network.modules() if isinstance(module, ConvBlock | PlainDecoderStage)]:
        if isinstance(block.norm, GroupNorm):
            block.norm = PlainNorm(block.norm.num_groups, block.norm.num_channels)
    return network


class PlainLoss(nn.Module):
    """MONAI's loss with the arguments that ours corresponds to."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MonaiDiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (B, K, I, J, K'), target (B, I, J, K') -> scalar."""
        return self.loss(logits.float(), target[:, None])


def make_step(variant: Variant, plan: NetworkPlan, args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one whole optimiser step."""
    torch.manual_seed(0)
    device = args.device
    network = UNet(args.channels, args.classes, plan, recompute_stages=variant.recompute_stages)
    network = (make_plain(network) if variant.plain else network).to(device)
    images = torch.randn(args.batch_size, args.channels, *args.patch_size, device=device)
    labels = torch.randint(0, args.classes, (args.batch_size, *args.patch_size), device=device)
    if variant.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
        images = images.contiguous(memory_format=torch.channels_last_3d)
    loss = DeepSupervisionLoss(PlainLoss() if variant.plain else DiceCELoss())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=variant.bf16):
            value = loss(network(images), labels)
        value.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if number:
                seconds[name].append(clock() - start)
    return seconds


def make_rows(seconds: dict[str, list[float]], voxels: int) -> list[dict[str, object]]:
    """Per variant: best seconds, voxels per second at best, median of the ratios to the first variant by round."""
    first = next(iter(seconds.values()))
    return [
        {
            "variant": name,
            "seconds": round(min(taken), 4),
            "voxels_per_second": round(voxels / min(taken)),
            "ratio": round(statistics.median(a / b for a, b in zip(taken, first, strict=True)), 3),
        }
        for name, taken in seconds.items()
    ]


def make_variants(num_stages: int) -> list[Variant]:
    """The plain float32 composition first: ratios are taken to it."""
    return [
        Variant("plain float32", bf16=False, plain=True),
        Variant("ours float32", bf16=False),
        Variant("plain bf16", bf16=True, plain=True),
        Variant("ours bf16", bf16=True),
        Variant("ours bf16, channels last", bf16=True, channels_last=True),
        Variant("ours bf16, first stage recomputed", bf16=True, recompute_stages=1),
        Variant("ours bf16, every stage recomputed", bf16=True, recompute_stages=num_stages),
    ]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch_size", type=int, nargs=3, default=(40, 56, 40))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--features", type=int, nargs="+", default=(32, 64, 128, 256))
    parser.add_argument("--norm", choices=("group", "instance", "batch"), default="group")
    parser.add_argument("--block", choices=("plain", "residual"), default="plain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds, of one thread best.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=(), help="Names of variants; the first one is the reference.")
    parser.add_argument("--out", type=Path, help="Write the rows here as JSON.")
    return parser.parse_args()


def make_plan(features: tuple[int, ...], norm: str, block: str) -> NetworkPlan:
    """An isotropic U-Net with these features."""
    stages = len(features)
    first: Shape3 = (1, 1, 1)
    return NetworkPlan(
        features_per_stage=tuple(features),
        strides=(first, *[(2, 2, 2)] * (stages - 1)),
        kernel_sizes=((3, 3, 3),) * stages,
        num_blocks_per_stage=(2,) * stages,
        norm=norm,
        block=block,
    )


def main() -> None:
    """Measure, print the table, write the rows."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    plan = make_plan(tuple(args.features), args.norm, args.block)
    variants = make_variants(plan.num_stages)
    wanted = args.only or [variant.name for variant in variants]
    steps = {variant.name: make_step(variant, plan, args) for variant in variants if variant.name in wanted}
    voxels = args.batch_size * args.patch_size[0] * args.patch_size[1] * args.patch_size[2]
    rows = make_rows(measure(steps, args.rounds, CLOCKS[args.clock]), voxels)
    print(f"{'variant':36}{'seconds':>9}{'voxels/s':>11}{'ratio':>8}")
    for row in rows:
        print(f"{row['variant']:36}{row['seconds']:9.3f}{row['voxels_per_second']:11,}{row['ratio']:8.3f}")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
