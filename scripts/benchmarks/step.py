"""Time per voxel of one training step: our network and loss against other ways to compute it, paired in one run.

    python scripts/benchmarks/step.py --patch_size 40 56 40 --batch_size 2
    python scripts/benchmarks/step.py --clock cpu --num_threads 1        # on a machine that others use too
    python scripts/benchmarks/step.py --groups rungs peers --peers ../peers --batch_size 1 --patch_size 64 64 96 \
        --features 32 64 128 256 320 320 --reference "nnU-Net"           # every rung against nnU-Net's own step

The variants take turns in every round and ratios are taken within a round, so that a machine that is shared slows all
of them alike. Groups of variants:
    basic    ours and "plain", the textbook composition of the same U-Net: skip and up-sampled tensor concatenated,
             torch's group norm and convolutions, MONAI's DiceCELoss
    rungs    every way of running the stages that a plan may choose, under bf16 autocast, the plain one first
    peers    MONAI's DynUNet; with --peers (see peers_environment.sh) also nnU-Net, in its own process and environment.
             "nnU-Net" is its trainer's own step: float32 on a CPU, float16 and compiled on a GPU
    compile  the first step of basic's "ours bf16" as `torch.compile` makes it; needs a C++ compiler
Patches and labels are random. Every step clips the gradient as both trainers do. Seconds of optimisers alone:
scripts/benchmarks/optimizers.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.losses import DiceCELoss as MonaiDiceCELoss
from peers.dynunet import DynUNetLoss, make_dynunet
from peers.nnunet import NnunetWorker
from run_facts import write_results
from rungs import PLAIN, StepKind, make_network, make_plan, step_kinds
from torch import Tensor, nn

from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.blocks import NEGATIVE_SLOPE, ConvBlock, DecoderStage
from pipeline.networks.norms import GroupNorm
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GROUPS = ("basic", "rungs", "peers", "compile")

PLAIN_KIND = StepKind(fused_head=False)

# One whole optimiser step; where another process takes it, the seconds that it measured.
Step = Callable[[], float | None]


@dataclass(frozen=True)
class Variant:
    """One way to compute the same step."""

    name: str
    bf16: bool
    plain: bool = False
    dynunet: bool = False
    channels_last: bool = False
    compiled: bool = False
    kind: StepKind = PLAIN_KIND


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
        block.conv = _torch_convolution(block.conv)
        if isinstance(block.norm, GroupNorm):
            block.norm = PlainNorm(block.norm.num_groups, block.norm.num_channels)
    return network


def _torch_convolution(own: nn.Conv3d) -> nn.Conv3d:
    """Torch's own, which chooses its algorithm itself."""
    layer = nn.Conv3d(own.in_channels, own.out_channels, own.kernel_size, own.stride, own.padding, bias=False)
    layer.weight = own.weight
    return layer


class PlainLoss(nn.Module):
    """MONAI's loss with the arguments that ours corresponds to."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MonaiDiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (B, K, I, J, K'), target (B, I, J, K') -> scalar."""
        return self.loss(logits.float(), target[:, None])


def make_step(variant: Variant, plan: NetworkPlan, args: argparse.Namespace) -> Step:
    """A function that takes one whole optimiser step."""
    torch.manual_seed(0)
    device = args.device
    # On a GPU both trainers let cuDNN choose its kernels by trying them.
    torch.backends.cudnn.benchmark = True
    network, loss = _network_and_loss(variant, plan, args)
    network = network.to(device)
    images = torch.randn(args.batch_size, args.channels, *args.patch_size, device=device)
    labels = torch.randint(0, args.classes, (args.batch_size, *args.patch_size), device=device)
    if variant.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
        images = images.contiguous(memory_format=torch.channels_last_3d)
    parameters = list(network.parameters())
    run = torch.compile(network) if variant.compiled else network
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.99, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=variant.bf16):
            value = loss(run(images), labels)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 12)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _network_and_loss(
    variant: Variant, plan: NetworkPlan, args: argparse.Namespace
) -> tuple[nn.Module, Callable[..., Tensor]]:
    if variant.dynunet:
        features, deep = plan.features_per_stage, plan.deep_supervision
        return make_dynunet(args.classes, features, in_channels=args.channels, deep_supervision=deep), DynUNetLoss()
    network = make_network(variant.kind, args.classes, plan, args.channels)
    if variant.plain:
        return make_plain(network), DeepSupervisionLoss(PlainLoss())
    return network, make_loss()


def make_nnunet_steps(worker: NnunetWorker, args: argparse.Namespace) -> dict[str, Step]:
    """The steps that nnU-Net's own process takes."""
    request = {
        "features": args.features,
        "in_channels": args.channels,
        "num_classes": args.classes,
        "patch_size": args.patch_size,
        "batch_size": args.batch_size,
        "device": args.device,
        "clock": args.clock,
        "num_threads": args.num_threads,
    }
    on_gpu = args.device == "cuda"
    variants = {"nnU-Net": {"precision": "own", "compiled": on_gpu}, "nnU-Net, bf16": {"precision": "bf16"}}
    if on_gpu:
        variants["nnU-Net, not compiled"] = {"precision": "own"}
    return {name: worker.make_step(name, **request, **own) for name, own in variants.items() if _is_wanted(name, args)}


def measure(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds of every variant's first step, which is not counted, and of its step in every round after it."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            own = step()
            seconds[name].append(clock() - start if own is None else own)
    return {name: taken.pop(0) for name, taken in seconds.items()}, seconds


def make_rows(seconds: dict[str, list[float]], voxels: int, reference: str | None = None) -> list[dict[str, object]]:
    """Per variant: best seconds, voxels per second at best, median by round of the ratio to the reference.

    Without a reference ratios are to the first variant.
    """
    base = seconds[reference or next(iter(seconds))]
    return [
        {
            "variant": name,
            "seconds": round(min(taken), 4),
            "voxels_per_second": round(voxels / min(taken)),
            "ratio": round(statistics.median(a / b for a, b in zip(taken, base, strict=True)), 3),
        }
        for name, taken in seconds.items()
    ]


def make_variants(plan: NetworkPlan, groups: tuple[str, ...] = ("basic",)) -> list[Variant]:
    """The variants that this process runs, a group after the other."""
    made = {
        "basic": [
            Variant("plain float32", bf16=False, plain=True),
            Variant("ours float32", bf16=False),
            Variant("plain bf16", bf16=True, plain=True),
            Variant("ours bf16", bf16=True),
            Variant("ours bf16, channels last", bf16=True, channels_last=True),
            Variant("ours bf16, first stage recomputed", bf16=True, kind=_recomputed(1)),
            Variant(
                "ours bf16, every stage recomputed",
                bf16=True,
                kind=_recomputed(plan.num_stages),
            ),
        ],
        "rungs": [Variant(kind.name, bf16=True, kind=kind) for kind in step_kinds(plan)],
        "peers": [
            Variant("MONAI DynUNet float32", bf16=False, dynunet=True),
            Variant("MONAI DynUNet bf16", bf16=True, dynunet=True),
        ],
        "compile": [Variant("ours bf16, compiled", bf16=True, compiled=True)],
    }
    return [variant for group in GROUPS if group in groups for variant in made[group]]


def _recomputed(recompute_stages: int) -> StepKind:
    return StepKind(execution=PLAIN._replace(recompute_stages=recompute_stages), fused_head=False)


def has_cpp_compiler() -> bool:
    """Whether `torch.compile` finds what it needs on a CPU."""
    return any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++"))


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
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=("basic",))
    parser.add_argument("--peers", type=Path, help="Environment that peers_environment.sh made, for nnU-Net.")
    parser.add_argument("--only", nargs="+", default=(), help="Names of variants.")
    parser.add_argument("--reference", help="Variant that ratios are taken to; the first one without it.")
    parser.add_argument("--out", type=Path, help="Folder for step-DATE.json, or a file that ends in .json.")
    return parser.parse_args()


def _is_wanted(name: str, args: argparse.Namespace) -> bool:
    return not args.only or name in args.only


def make_steps(plan: NetworkPlan, args: argparse.Namespace, stack: ExitStack) -> dict[str, Step]:
    """Every wanted step by its name; nnU-Net's process ends with `stack`."""
    groups = set(args.groups)
    if "compile" in groups and not has_cpp_compiler():
        print("torch.compile is left out: there is no C++ compiler", file=sys.stderr)
        groups.remove("compile")
    steps: dict[str, Step] = {
        variant.name: make_step(variant, plan, args)
        for variant in make_variants(plan, tuple(groups))
        if _is_wanted(variant.name, args)
    }
    if "peers" in groups and args.peers:
        steps |= make_nnunet_steps(stack.enter_context(NnunetWorker(args.peers)), args)
    return steps


def main() -> None:
    """Measure, print the table, write the rows."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    plan = make_plan(tuple(args.features), args.norm, args.block)
    voxels = args.batch_size * args.patch_size[0] * args.patch_size[1] * args.patch_size[2]
    with ExitStack() as stack:
        steps = make_steps(plan, args, stack)
        if not steps or (args.reference and args.reference not in steps):
            raise SystemExit(f"error: no variant of that name; there are {', '.join(steps) or 'none'}")
        first, seconds = measure(steps, args.rounds, CLOCKS[args.clock])
    rows = make_rows(seconds, voxels, args.reference)
    print(f"{'variant':44}{'seconds':>9}{'voxels/s':>11}{'ratio':>8}{'first step':>12}")
    for row in rows:
        name = row["variant"]
        print(f"{name:44}{row['seconds']:9.3f}{row['voxels_per_second']:11,}{row['ratio']:8.3f}{first[name]:10.1f} s")
    if args.out:
        whole = [{**row, "first_seconds": first[row["variant"]], "rounds": seconds[row["variant"]]} for row in rows]
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "peers")}
        print(f"Written to {write_results(args.out, 'step', {'settings': settings, 'steps': whole})}")


if __name__ == "__main__":
    main()
