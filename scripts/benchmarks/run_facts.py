"""What a figure needs beside it to be worth something later: day, machine, versions, command, commit."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from places import PROJECT

from pipeline.sizes import GIB

# Options that take a folder, and what stands for it in the command that is kept.
PATH_OPTIONS = {"--peers": "PEERS", "--out": "RESULTS", "--store": "STORE", "--images": "IMAGES"}
PATH_OPTIONS |= {"--dataset": "DATASET", "--work_dir": "WORK"}


def run_facts() -> dict[str, Any]:
    """Facts of this run; names of hosts and paths are left out."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": _command(),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "monai")}},
    }


def write_results(out: Path, name: str, results: dict[str, Any]) -> Path:
    """Write facts and results as NAME-DATE.json into the folder `out`, or into `out` itself if it ends in .json."""
    path = dated(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**run_facts(), **results}, indent=1) + "\n")
    return path


def dated(out: Path, name: str) -> Path:
    """Where results go that are written today."""
    return out if out.suffix == ".json" else out / f"{name}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def _command() -> str:
    """The command line, with names in place of the folders that lie elsewhere on every machine."""
    words = ["python", str(Path("scripts/benchmarks", Path(sys.argv[0]).name)), *sys.argv[1:]]
    for option, name in PATH_OPTIONS.items():
        words = [name if before == option else word for before, word in zip(["", *words], words, strict=False)]
        words = [f"{option}={name}" if word.startswith(f"{option}=") else word for word in words]
    return shlex.join(words)


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpus": [f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB" for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    """The commit, marked where code of it is changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return f"{commit} with changes" if git("status", "--porcelain", "--", "*.py") else commit
