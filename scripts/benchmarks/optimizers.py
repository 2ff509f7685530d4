"""Seconds of an optimiser's step alone, one parameter at a time, all at once (foreach), and fused into one kernel.

    python scripts/benchmarks/optimizers.py
    python scripts/benchmarks/optimizers.py --device cuda --out scripts/benchmarks/results

The parameters are those of a six-stage U-Net with 32 to 320 features, their gradients random; kinds take turns in every
round and ratios, to the first kind of the same optimiser, are taken within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from run_facts import write_results
from rungs import StepKind, make_network, make_plan
from step import make_rows, measure
from torch import nn

KINDS: dict[str, dict[str, bool]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, **kind: torch.optim.SGD(parameters, lr=1e-3, momentum=0.99, nesterov=True, **kind),
    "AdamW": lambda parameters, **kind: torch.optim.AdamW(parameters, lr=1e-3, **kind),
}


def make_step(optimizer: str, kind: str, network: nn.Module) -> Callable[[], None]:
    """A function that takes the optimiser's step on gradients that stay."""
    made = OPTIMIZERS[optimizer](network.parameters(), **KINDS[kind])
    is_on_gpu = next(network.parameters()).is_cuda

    def step() -> None:
        made.step()
        if is_on_gpu:
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for optimizers-DATE.json, or a file that ends in .json")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    network = make_network(StepKind(), 3, make_plan()).to(options.device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    num_parameters, rows = sum(parameter.numel() for parameter in network.parameters()), []
    for optimizer in OPTIMIZERS:
        steps = {f"{optimizer}, {kind}": make_step(optimizer, kind, network) for kind in KINDS}
        _, seconds = measure(steps, options.rounds)
        rows += make_rows(seconds, num_parameters)
    print(f"{num_parameters / 1e6:.1f} million parameters, {options.num_threads} threads, {options.device}")
    for row in rows:
        row["parameters_per_second"] = row.pop("voxels_per_second")
        print(f"{row['variant']:20}{row['seconds']:9.4f} s{row['ratio']:8.3f}")
    if options.out:
        settings = {"device": options.device, "num_threads": options.num_threads, "num_parameters": num_parameters}
        print(f"Written to {write_results(options.out, 'optimizers', settings | {'steps': rows})}")


if __name__ == "__main__":
    main()
