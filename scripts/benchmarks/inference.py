"""Time of predicting a whole volume against MONAI's sliding window, paired in one run; its memory, in a process apart.

    python scripts/benchmarks/inference.py                     # all; an hour on two cores
    python scripts/benchmarks/inference.py --only time --clock cpu --num_threads 1
    python scripts/benchmarks/inference.py --only memory

Time: the same U-Net, windows, overlap and Gaussian on both sides, from the prepared image to class indices on the same
grid. Both sides take turns in every round and ratios are taken within a round, so that a machine that is shared slows
both alike. Shapes hold a whole number of steps, where both place the same windows. Volumes and weights are random.
Memory: see inference_memory.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from run_facts import write_results
from torch import Tensor

from pipeline.geometry import Shape3, format_shape
from pipeline.inference.streamed_labels import plan_label_memory, sliding_window_labels
from pipeline.inference.windows import SlidingWindow
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.sizes import GIB

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NUM_STAGES = 4
MEMORY_RUNS = (
    ["--network", "unet", "--max_extra", "2GiB"],
    ["--network", "wide", "--max_extra", "4GiB"],
)


@dataclass(frozen=True)
class Case:
    """A volume, how it is swept and by which network.

    Attributes:
        name: For the results.
        shape: Of the volume.
        window: Of the sweep.
        num_classes: Of the network.
        features: Of its highest-resolution stage.
    """

    name: str
    shape: Shape3
    window: Shape3
    num_classes: int
    features: int


CASES = (
    Case("hippocampus", (36, 50, 35), (40, 56, 40), 3, 32),
    Case("160 cubed", (160, 160, 160), (64, 64, 64), 3, 16),
    Case("128 cubed", (128, 128, 128), (64, 64, 64), 118, 16),
)


def make_network(case: Case) -> UNet:
    """The case's U-Net with the weights of seed 0, in evaluation mode."""
    torch.manual_seed(0)
    plan = NetworkPlan(
        features_per_stage=tuple(case.features * 2**index for index in range(NUM_STAGES)),
        strides=((1, 1, 1), *((2, 2, 2),) * (NUM_STAGES - 1)),
        kernel_sizes=((3, 3, 3),) * NUM_STAGES,
        num_blocks_per_stage=(2,) * NUM_STAGES,
    )
    return UNet(1, case.num_classes, plan).eval()


def predict_ours(case: Case, network: UNet, image: Tensor) -> Tensor:
    """Class indices by this project."""
    sliding = SlidingWindow(window=case.window, num_classes=case.num_classes)
    memory = plan_label_memory(network, case.shape, sliding, num_channels=1)
    return sliding_window_labels(network, image, sliding, memory)


@torch.inference_mode()
def predict_monai(case: Case, network: UNet, image: Tensor) -> Tensor:
    """Class indices by MONAI."""
    scores = sliding_window_inference(image[None], case.window, 1, network, overlap=0.5, mode="gaussian")
    return scores[0].argmax(0)


def time_case(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both sides in every round, and what is between them."""
    network, image = make_network(case), torch.randn(1, *case.shape)
    seconds: dict[str, list[float]] = {"ours": [], "monai": []}
    sides = {"ours": predict_ours, "monai": predict_monai}
    labels = {}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            started = clock()
            labels[name] = sides[name](case, network, image)
            # The first round warms both up.
            if number:
                seconds[name].append(clock() - started)
    ratios = [ours / monai for ours, monai in zip(seconds["ours"], seconds["monai"], strict=True)]
    return {
        "case": case.name,
        "shape": list(case.shape),
        "window": list(case.window),
        "num_classes": case.num_classes,
        "features": case.features,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
        "same_labels": round(float((labels["ours"].long() == labels["monai"]).float().mean()), 6),
    }


def measure_memory(arguments: list[str], num_threads: int) -> dict[str, Any]:
    """One run of inference_memory.py in its own process."""
    script = Path(__file__).with_name("inference_memory.py")
    command = [sys.executable, str(script), *arguments, "--num_threads", str(num_threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rounds", type=int, default=3, help="beside one that warms up")
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    torch.set_num_threads(options.num_threads)
    results: dict[str, Any] = {"clock": options.clock, "num_threads": options.num_threads}
    if options.only != "memory":
        results["time"] = []
        for case in CASES:
            timed = time_case(case, options.rounds, CLOCKS[options.clock])
            results["time"].append(timed)
            print(
                f"{timed['case']:24} {format_shape(case.shape)}: {timed['median_ratio']:.2f} of MONAI's time "
                f"(rounds {timed['ratios']}), {timed['same_labels']:.4%} of the voxels alike"
            )
    if options.only != "time":
        results["memory"] = []
        for arguments in MEMORY_RUNS:
            measured = measure_memory(arguments, options.num_threads)
            results["memory"].append(measured)
            print(
                f"{measured['network']:8} {measured['extra_bytes'] / GIB:.2f} GiB beyond network, image and label "
                f"(planned {measured['planned_bytes'] / GIB:.2f}); {measured['planned']}"
            )
    name = f"inference-{options.only}" if options.only else "inference"
    print(write_results(options.out, name, results))


if __name__ == "__main__":
    main()
