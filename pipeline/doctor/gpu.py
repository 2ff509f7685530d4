"""GPUs as the driver and as torch see them; run as a module, it answers with a fact a line.

It is a process of its own: loading torch can end one, and a GPU that is set to one process at a time would be taken.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from pipeline.doctor.apart import ApartError, answering, run_apart
from pipeline.doctor.facts import Fact, find
from pipeline.sizes import format_bytes

DRIVER = Path("/proc/driver/nvidia/version")
# Loading torch from a slow file system and starting a GPU that sleeps both take their time.
TIMEOUT_SECONDS = 300.0
CUDA_TORCH = "install torch's CUDA build into this environment (see its web page)"


def find_gpu() -> Iterator[Fact]:
    """Driver, torch and devices."""
    driver = _driver_version()
    yield Fact(name="NVIDIA driver", text=driver or "none", value=driver or None)
    try:
        for line in run_apart("pipeline.doctor.gpu", timeout_seconds=TIMEOUT_SECONDS):
            yield TypeAdapter(Fact).validate_json(line)
    except ApartError as error:
        yield Fact(name="torch", text=f"cannot be used: {error}", advice="torch does not load; install it anew")


def _driver_version() -> str:
    """By the kernel, or where that is hidden by `nvidia-smi`; "" where there is no GPU of NVIDIA's."""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER.read_text()) if DRIVER.is_file() else None
    if found:
        return found[1]
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def find_torch() -> Iterator[Fact]:
    """What torch was built for, and what it computes well in."""
    import torch

    from pipeline.networks.precision import choose_precision

    cuda, there = torch.version.cuda, torch.cuda.is_available()
    advice = ""
    if _driver_version() and not cuda:
        advice = f"there is an NVIDIA GPU, and torch {torch.__version__} was built without CUDA; {CUDA_TORCH}"
    elif _driver_version() and not there:
        advice = f"torch cannot use the GPU{_why_not()}"
    yield Fact(name="CUDA of torch", text=cuda or "built without", value=cuda, advice=advice)
    if there:
        version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        yield Fact(name="cuDNN", text=str(version), value=version)
    precision, reason = choose_precision("auto", device_type="cuda" if there else "cpu")
    yield Fact(name="precision", text=f"{precision} ({reason})", value=precision)


def _why_not() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f': CUDA_VISIBLE_DEVICES is "{visible}"; ask for a GPU (SLURM: --gres=gpu:1), or unset it'
    return "; its driver may be older than this torch needs, or the container has no access (docker --gpus all)"


def find_devices() -> Iterator[Fact]:
    """Each GPU that torch can use, after a small computation on it."""
    import torch

    if not torch.cuda.is_available():
        yield Fact(name="GPU", text="none: networks run on CPUs", value=None)
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{device.major}.{device.minor}"
        advice = ""
        if free < 0.8 * total:
            sizes = f"{format_bytes(free)} free of {format_bytes(total)}"
            advice = f"GPU {number} has {sizes}: others use it; plan for what is free"
        torch.ones(8, device=f"cuda:{number}").sum().item()
        facts = {"name": device.name, "total_bytes": total, "free_bytes": free, "compute_capability": capability}
        text = f"{device.name}, {format_bytes(free)} free of {format_bytes(total)}, compute capability {capability}"
        yield Fact(name=f"GPU {number}", text=text, value=facts, advice=advice)
    yield find_triton()


def find_triton() -> Fact:
    """Whether the first GPU runs the kernels of this project."""
    import torch

    from pipeline.kernels.availability import reason_against

    reason = reason_against(torch.device("cuda", 0))
    fix = "it comes with torch's CUDA build on Linux and needs a C compiler (gcc) and a home folder to write to"
    advice = f"training and prediction are slower: {reason}; {fix}" if reason else ""
    return Fact(name="Triton", text="does not work" if reason else "works", value=not reason, advice=advice)


def answer_facts(answers: TextIO) -> None:
    """The facts that need torch."""
    for fact in find("GPU", {"torch": find_torch, "devices": find_devices}).facts:
        answers.write(TypeAdapter(Fact).dump_json(fact).decode() + "\n")


if __name__ == "__main__":
    sys.exit(answering(answer_facts))
