"""One training step at equal network and patch, at voxfit's batch and at the one that nnU-Net plans."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from places import BENCHMARKS, RESULTS
from run_facts import dated

STEP = BENCHMARKS / "step.py"
OURS, NNUNET = "voxfit, plain", "nnU-Net"
VARIANTS = (OURS, NNUNET, "nnU-Net, bf16", "MONAI DynUNet float32", "MONAI DynUNet bf16")


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("step", help=__doc__, description=f"{__doc__} Calls step.py for each batch size.")
    parser.add_argument("--peers", type=Path, required=True, help="environment made by nnunet_environment.sh")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[2, 7])
    parser.add_argument("--patch_size", type=int, nargs=3, default=[40, 56, 40])
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for peers-step-batchN-DATE.json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Call step.py once for each batch size."""
    for batch_size in options.batch_sizes:
        out = dated(options.out, f"peers-step-batch{batch_size}")
        subprocess.run([str(word) for word in make_command(options, batch_size, out)], check=True)


def make_command(options: argparse.Namespace, batch_size: int, out: Path) -> list[Any]:
    """The call of step.py."""
    command: list[Any] = [sys.executable, STEP, "--groups", "rungs", "peers", "--peers", options.peers]
    command += ["--only", *VARIANTS, "--reference", NNUNET, "--batch_size", batch_size, "--out", out]
    for name in ("patch_size", "features", "classes", "rounds", "num_threads", "clock", "device"):
        value = getattr(options, name)
        command += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return command
