"""Host memory of predicting one volume, measured in the process that runs this: JSON on standard output.

    python scripts/benchmarks/inference_memory.py --shape 512 512 400 --num_classes 118 --network unet --max_extra 2GiB

What counts is the most that the process held at one time (resident, VmHWM of Linux) beyond what it holds with network
and image loaded, less the label that comes out. Copies of the image that preparing it makes count.
    unet     the project's U-Net, narrow (8 features), so that a CPU gets through
    wide     one convolution to 32 features and a head that leaves its logits to the caller: what is gathered of a
             full-size U-Net, at a fraction of its work
    thin     the same with 8 features: what is gathered of the narrow U-Net
    logits   one convolution to the classes, a network of one's own: whole logits of a window
With --num_networks several of them are one prediction; --outputs names what is written beside the label, as in
"probabilities_blosc2 entropy", whose maps count as results as the label does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from pipeline.inference import attempts
from pipeline.inference.ensemble import Member
from pipeline.inference.export import write_outputs
from pipeline.inference.export_formats import OutputFormat, output_files
from pipeline.inference.predictor import Predictor
from pipeline.io.volume import Volume
from pipeline.networks.blocks import Head
from pipeline.networks.small_convolution import Convolution
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan
from pipeline.sizes import parse_bytes
from pipeline.slabs.rows import PendingLogits, WholeRows

NARROW = NetworkPlan(
    features_per_stage=(8, 16, 32, 32),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 4,
    num_blocks_per_stage=(1, 1, 1, 1),
    num_decoder_blocks=1,
)
NETWORKS = ("unet", "wide", "thin", "logits")


class WideNetwork(nn.Module):
    """As many features as a full-size U-Net has, after a single convolution."""

    def __init__(self, num_classes: int, num_features: int = 32) -> None:
        super().__init__()
        self.num_features = num_features
        self.conv, self.head = Convolution(1, num_features, 3, padding=1), Head(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, i, j, k) -> logits."""
        return self.head(self.conv(x))

    def pending_logits(self, x: Tensor) -> PendingLogits:
        """Features and head."""
        return PendingLogits(WholeRows(self.conv(x)), self.head.weight, self.head.bias)


def make_predictor_plan(patch_size: tuple[int, int, int], num_classes: int, spacing: float) -> Plan:
    """A plan for one channel of CT at a spacing."""
    return Plan(
        dataset_name="benchmark",
        fingerprint_hash="0",
        channels=(ChannelPlan(name="CT", scheme="none"),),
        labels={"background": 0, **{f"class_{index}": index for index in range(1, num_classes)}},
        target_spacing=(spacing,) * 3,
        median_shape=patch_size,
        patch_size=patch_size,
        precision="32-true",
        network=NARROW,
        memory=MemoryPlan(budget_bytes=1, peak_bytes=1, overhead_bytes=0, parts={}),
    )


def make_network(kind: str, num_classes: int, seed: int = 0) -> nn.Module:
    """One of `NETWORKS`, untrained."""
    torch.manual_seed(seed)
    if kind == "unet":
        return UNet(1, num_classes, NARROW)
    if kind in ("wide", "thin"):
        return WideNetwork(num_classes, 32 if kind == "wide" else NARROW.features_per_stage[0])
    return nn.Conv3d(1, num_classes, 3, padding=1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Predict one volume of noise and say what that took."""
    torch.set_num_threads(options.num_threads)
    plan = make_predictor_plan(tuple(options.patch_size), options.num_classes, options.spacing)
    networks = [make_network(options.network, options.num_classes, seed) for seed in range(options.num_networks)]
    members = tuple(Member(network.eval(), plan.patch_size) for network in networks)
    # Libraries take what they take once and for all.
    Predictor(networks[0], plan).predict(_noise(tuple(options.patch_size)))
    volume, allowed = _noise(tuple(options.shape)), parse_bytes(options.max_extra)
    held, label_bytes = psutil.Process().memory_info().rss, volume.array[0].size
    planned: list[Any] = []
    _watch_plans(planned)
    Path("/proc/self/clear_refs").write_text("5")
    started = perf_counter()
    results = label_bytes * (1 + 4 * sum(kind in ("entropy", "variance") for kind in options.outputs))
    predictor = Predictor(networks[0], plan, max_ram=held + results + allowed if allowed else None)
    predictor.members = members
    label = _predict(predictor, volume, options.outputs)
    seconds = perf_counter() - started
    peak = _peak_bytes()
    (memory,) = planned
    return {
        "network": options.network,
        "num_networks": options.num_networks,
        "outputs": options.outputs,
        "shape": options.shape,
        "num_classes": options.num_classes,
        "patch_size": options.patch_size,
        "held_before_bytes": held,
        "label_bytes": label.array.nbytes,
        "peak_bytes": peak,
        "extra_bytes": peak - held - results,
        "allowed_bytes": allowed,
        "planned_bytes": memory.num_bytes,
        "planned": memory.describe(),
        "planned_parts": dict(memory.parts),
        "num_windows": memory.num_windows,
        "fewest_windows": memory.fewest_windows,
        "seconds": round(seconds, 1),
        "classes_found": len(np.unique(label.array)),
    }


def _predict(predictor: Predictor, volume: Volume, outputs: list[OutputFormat]) -> Volume:
    """The label, after what else is wanted was written."""
    if not outputs:
        return predictor.predict(volume)
    with TemporaryDirectory() as folder:
        files = output_files("noise", Path(folder), outputs)
        prediction = predictor.segment(predictor.prepare(volume), volume.grid, volume.source, files)
        write_outputs(prediction, files, predictor.plan)
        return prediction.label


def _watch_plans(planned: list[Any]) -> None:
    """Keep what memory is planned."""
    real = attempts.run_attempts

    def watched(first: attempts.Attempt, *arguments: Any) -> Any:
        planned.append(first.memory)
        return real(first, *arguments)

    sys.modules["pipeline.inference.predictor"].run_attempts = watched


def _noise(shape: tuple[int, int, int]) -> Volume:
    array = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    return Volume.from_array(array, np.eye(4))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400])
    parser.add_argument("--patch_size", type=int, nargs=3, default=[128, 128, 128])
    parser.add_argument("--spacing", type=float, default=1.0)
    parser.add_argument("--num_classes", type=int, default=118)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--max_extra", default="2GiB", help="memory beyond network, image and label; 0 for no bound")
    parser.add_argument("--num_networks", type=int, default=1)
    parser.add_argument("--outputs", nargs="*", default=[])
    parser.add_argument("--num_threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(measure(parse_options())))
