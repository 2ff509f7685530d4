"""`voxfit predict` against `nnUNetv2_predict_from_modelfolder`: whole processes in turn, from image to label files.

    bash scripts/benchmarks/nnunet_environment.sh PEERS
    python scripts/benchmarks/predict.py --peers PEERS --images Task04_Hippocampus/imagesTr --count 40
    python scripts/benchmarks/predict.py --peers PEERS --shape 160 160 160 --window 64 64 64 --count 2

The same number of stages, features, convolutions, classes, the same window, half a window of overlap, without and with
mirroring about all axes, untrained weights, 1 mm on both sides, so that nothing is resampled. Each side runs in the
precision and with the numbers of threads and processes that it chooses by itself, on the CPU. Ratios are taken within
a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from peers.processes import Runner
from peers.ratios import describe_ratios, peer_versions, ratios_of
from run_facts import write_results

from pipeline.artifacts import write_artifact
from pipeline.io.nifti import is_nifti_name
from pipeline.networks.unet import UNet
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan

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


def run_round(commands: dict[str, list[str | Path]], runner: Runner, work: Path, number: int) -> dict[str, Any]:
    """Every side once, in turns; what each took."""
    taken = {}
    for name in sorted(commands, reverse=bool(number % 2)):
        out = work / name
        shutil.rmtree(out, ignore_errors=True)
        places = {f"nnUNet_{place}": "/nonexistent" for place in ("raw", "preprocessed", "results")}
        taken[name] = runner.run(name, [*commands[name], out], variables=places).rounded()
        if len(list(out.glob(f"*{ENDING}"))) != len(list((work / "in").iterdir())):
            raise SystemExit(f"error: {name} has not predicted every case")
    return taken


def make_commands(options: argparse.Namespace, work: Path, mirroring: str) -> dict[str, list[str | Path]]:
    """What each side is started with; the folder for its predictions is still to come."""
    ours = [sys.executable, "-m", "pipeline", "predict", "--run_dir", work / "run", "--accelerator", "cpu"]
    ours += ["--tta", mirroring, *(["--tta_axes", "0", "1", "2"] if mirroring == "mirror" else [])]
    ours += [f"--{word}" for word in options.ours]
    theirs = [options.peers / "bin" / "nnUNetv2_predict_from_modelfolder", "-m", work / "model", "-f", "0"]
    theirs += ["-step_size", "0.5", "-device", "cpu", *([] if mirroring == "mirror" else ["--disable_tta"])]
    return {
        "voxfit": [*ours, "--input", work / "in", "--output"],
        "nnunet": [*theirs, "-i", work / "in", "-o"],
    }


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
    parser.add_argument("--mirrorings", choices=("none", "mirror"), nargs="+", default=["none", "mirror"])
    parser.add_argument("--num_cpus", type=int, default=len(os.sched_getaffinity(0)), help="that a process may use")
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
        runner = Runner(num_cpus=options.num_cpus, logs=work / "logs")
        found: dict[str, Any] = {}
        for mirroring in options.mirrorings:
            commands = make_commands(options, work, mirroring)
            rounds = []
            for number in range(options.rounds):
                rounds.append(run_round(commands, runner, work, number))
                print(mirroring, rounds[-1], flush=True)
            found[mirroring] = {"ratios": ratios_of(rounds), "rounds": rounds}
            print(f"mirroring {mirroring}, {describe_ratios(found[mirroring]['ratios'])}")
        count = len(list((work / "in").iterdir()))
    results = {"peer_versions": peer_versions(options.peers), "cases": count, "num_cpus": options.num_cpus}
    print(write_results(options.out, "predict", {**results, "weights": weights, "mirrorings": found}))


if __name__ == "__main__":
    main()
