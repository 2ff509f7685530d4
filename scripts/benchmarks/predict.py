"""`voxfit predict` against `nnUNetv2_predict_from_modelfolder`: whole processes in turn, from image to label files.

    bash scripts/benchmarks/nnunet_environment.sh PEERS
    python scripts/benchmarks/predict.py --peers PEERS --images Task04_Hippocampus/imagesTr --count 40
    python scripts/benchmarks/predict.py --peers PEERS --shape 160 160 160 --window 64 64 64 --count 2

The same number of stages, features, convolutions, classes, the same window, half a window of overlap, no mirroring,
untrained weights, 1 mm on both sides, so that nothing is resampled. Each side runs in the precision and with the
numbers of threads and processes that it chooses by itself, on the CPU. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from run_facts import write_results

from pipeline.artifacts import write_artifact
from pipeline.io.nifti import is_nifti_name
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan

PROJECT = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).parent / "peers" / "nnunet_model.py"
NUM_CLASSES = 3
ENDING = ".nii.gz"


def make_images(options: argparse.Namespace, folder: Path) -> None:
    """Images with nnU-Net's names: links to real ones, or noise."""
    folder.mkdir()
    if options.images is not None:
        for path in sorted(item for item in options.images.iterdir() if is_nifti_name(item.name))[: options.count]:
            (folder / f"{path.name.removesuffix(ENDING)}_0000{ENDING}").symlink_to(path.resolve())
        return
    generator = np.random.default_rng(0)
    for number in range(options.count):
        voxels = generator.normal(100, 30, options.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"case_{number}_0000{ENDING}")


def make_our_run(options: argparse.Namespace, folder: Path) -> int:
    """An untrained run; gives its number of weights."""
    stages = len(options.features)
    network = NetworkPlan(
        features_per_stage=tuple(options.features),
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        kernel_sizes=((3, 3, 3),) * stages,
        num_blocks_per_stage=(2,) * stages,
    )
    plan = Plan(
        dataset_name="benchmark",
        fingerprint_hash="0",
        channels=(ChannelPlan(name="T1", scheme="zscore"),),
        labels={"background": 0, **{f"class_{index}": index for index in range(1, NUM_CLASSES)}},
        target_spacing=(1.0, 1.0, 1.0),
        median_shape=tuple(options.window),
        patch_size=tuple(options.window),
        network=network,
        memory=MemoryPlan(budget_bytes=1, peak_bytes=1, overhead_bytes=0, parts={}),
    )
    torch.manual_seed(0)
    unet = UNet(1, NUM_CLASSES, network)
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"network.{key}": value for key, value in unet.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "best.ckpt")
    write_artifact(folder / "plan.json", plan)
    return sum(each.numel() for each in unet.parameters())


def make_their_model(options: argparse.Namespace, folder: Path) -> int:
    """An untrained model folder of nnU-Net; gives its number of weights."""
    request = {
        "patch_size": options.window,
        "spacing": [1.0, 1.0, 1.0],
        "features": options.features,
        "num_classes": NUM_CLASSES,
        "file_ending": ENDING,
    }
    command = [options.peers / "bin" / "python", MODEL, folder]
    made = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    return int(made.stdout.split()[-1])


def run_timed(command: list[str | Path], out: Path, count: int) -> dict[str, float]:
    """Wall and CPU seconds of a whole process and its children."""
    shutil.rmtree(out, ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "nnUNet_raw": "/nonexistent", "nnUNet_results": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or len(list(out.glob(f"*{ENDING}"))) != count:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="made by nnunet_environment.sh")
    parser.add_argument("--images", type=Path, help="folder of real images; by default noise")
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 160, 160], help="of the noise")
    parser.add_argument("--count", type=int, default=2, help="cases")
    parser.add_argument("--window", type=int, nargs=3, default=[40, 56, 40])
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", nargs="*", default=[], help="more options of voxfit predict, without their dashes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_images(options, work / "in")
        weights = {"voxfit": make_our_run(options, work / "run"), "nnunet": make_their_model(options, work / "model")}
        count = len(list((work / "in").iterdir()))
        ours = [sys.executable, "-m", "pipeline", "predict", "--run_dir", work / "run", "--accelerator", "cpu"]
        ours += [f"--{word}" for word in options.ours]
        theirs = [options.peers / "bin" / "nnUNetv2_predict_from_modelfolder", "-m", work / "model", "-f", "0"]
        theirs += ["-step_size", "0.5", "--disable_tta", "-device", "cpu"]
        commands = {
            "voxfit": [*ours, "--input", work / "in", "--output", work / "voxfit"],
            "nnunet": [*theirs, "-i", work / "in", "-o", work / "nnunet"],
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(options.rounds):
            names = sorted(commands, reverse=bool(number % 2))
            rounds.append({name: run_timed(commands[name], work / name, count) for name in names})
            print({name: {key: round(value, 1) for key, value in each.items()} for name, each in rounds[-1].items()})
    results: dict[str, Any] = {"cases": count, "weights": weights, "rounds": rounds}
    for clock in ("wall", "cpu"):
        ratios = [each["voxfit"][clock] / each["nnunet"][clock] for each in rounds]
        results[f"{clock}_ratio"] = statistics.median(ratios)
        print(f"{clock}: {results[f'{clock}_ratio']:.2f} of nnU-Net's (rounds {[round(each, 2) for each in ratios]})")
    print(write_results(options.out, "predict", results))


if __name__ == "__main__":
    main()
