"""nnU-Net's own training step: its network, loss and optimiser settings, metered or run on request.

Runs in the environment that scripts/benchmarks/peers_environment.sh makes, with the project on PYTHONPATH; its other
end is `peers.nnunet`. It reads one JSON object a line and answers each with one: {"do": "versions"}, {"do": "meter",
...}, {"do": "make_step", ...} or {"do": "step", "name": ...}, and on a GPU {"do": "cuda_peak"}.

The settings are those of nnU-Net's trainer for `3d_fullres` without regions and ignore label: six stages of 32 to 320
features, two convolutions a stage, instance norm, leaky ReLU, five heads of which the lowest has weight zero,
`DC_and_CE_loss` with per-sample `MemoryEfficientSoftDiceLoss`, SGD with Nesterov momentum, gradients clipped at 12.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from peers.json_worker import answers_stream
from pipeline.planning.meter import meter_step

FEATURES = (32, 64, 128, 256, 320, 320)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_network(num_classes: int, features: tuple[int, ...] = FEATURES, in_channels: int = 1) -> nn.Module:
    """nnU-Net's plain U-Net as its planner configures it for isotropic patches."""
    stages = len(features)
    return PlainConvUNet(
        in_channels,
        stages,
        list(features),
        nn.Conv3d,
        [[3, 3, 3]] * stages,
        [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        [2] * stages,
        num_classes,
        [2] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


class NnunetLoss(nn.Module):
    """nnU-Net's loss and the pyramid of targets that its data loader makes.

    Its trainer's `train_step` has the network's outputs in a local variable until the step is over, so the loss's
    value keeps them here as long as it lives itself.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        weights = 0.5 ** np.arange(num_heads)
        weights[-1] = 0
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
        self.loss = DeepSupervisionWrapper(loss, weights / weights.sum())

    def forward(self, outputs: list[Tensor], target: Tensor) -> Tensor:
        """Logits (B, K, I, J, K') of every head, target (B, I, J, K') -> scalar."""
        steps = [target.shape[1] // output.shape[2] for output in outputs]
        pyramid = [target[:, None, ::step, ::step, ::step].contiguous() for step in steps]
        return _KeepAlive.apply(self.loss(outputs, pyramid), outputs)


class _KeepAlive(torch.autograd.Function):
    """The value itself; its place in the graph holds `kept` until the graph is gone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def meter(request: dict[str, Any]) -> dict[str, Any]:
    """The project's meter on nnU-Net's step."""
    with torch.device("meta"):
        network = make_network(request["num_classes"])
    memory = meter_step(
        network,
        NnunetLoss(len(FEATURES) - 1),
        patch_size=tuple(request["patch_size"]),
        in_channels=1,
        batch_size=request["batch_size"],
        precision=request["precision"],
        device_type=request["device_type"],
    )
    return asdict(memory)


def make_step(request: dict[str, Any]) -> Callable[[], float]:
    """A function that takes one real step as nnU-Net's trainer does and returns its seconds.

    Its trainer has no mixed precision on CPUs and float16 with loss scaling on GPUs, where it also compiles the
    network by default; "bf16" is its network and loss under an autocast that it does not offer.
    """
    torch.set_num_threads(request["num_threads"])
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    device, features, patch = request["device"], tuple(request["features"]), request["patch_size"]
    network = make_network(request["num_classes"], features, request["in_channels"]).to(device)
    images = torch.randn(request["batch_size"], request["in_channels"], *patch, device=device)
    labels = torch.randint(0, request["num_classes"], (request["batch_size"], *patch), device=device)
    loss = NnunetLoss(len(features) - 1)
    run = torch.compile(network) if request.get("compiled") else network
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    dtype = {"own": torch.float16 if device == "cuda" else None, "bf16": torch.bfloat16}[request["precision"]]
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    clock = CLOCKS[request["clock"]]

    def step() -> float:
        start = clock()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            value = loss(run(images), labels)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 12)
        scaler.step(optimizer)
        scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return step


def main() -> None:
    """Answer requests until standard input ends."""
    answers = answers_stream()
    steps: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("do"):
            case "versions":
                answer: Any = {name: version(name) for name in ("nnunetv2", "dynamic-network-architectures", "torch")}
            case "meter":
                answer = meter(request)
            case "make_step":
                steps[request["name"]] = make_step(request)
                answer = request["name"]
            case "step":
                answer = {"seconds": steps[request["name"]]()}
            case "cuda_peak":
                answer = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            case other:
                raise SystemExit(f"unknown request {other}")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
