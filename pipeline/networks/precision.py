"""Which device and which precision a network runs in, with the reason in words for the log."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch

from pipeline.errors import InputError
from pipeline.plan import Precision

DeviceType = Literal["cpu", "cuda"]

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class PrecisionChoice(NamedTuple):
    """A precision by Lightning's name, and why it was taken."""

    precision: Precision
    reason: str


def choose_device_type(accelerator: Literal["auto", "cpu", "gpu"]) -> DeviceType:
    """The kind of device behind an option; "auto" takes a GPU where there is one.

    Raises:
        InputError: A GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if accelerator == "gpu" and not available:
        raise InputError("no GPU can be used here", where="accelerator", fix="Choose cpu, or check driver and torch")
    return "cuda" if available and accelerator != "cpu" else "cpu"


def choose_precision(option: Literal["auto"] | Precision, *, device_type: DeviceType) -> PrecisionChoice:
    """The option itself where the device can compute in it, otherwise the nearest that it can.

    "auto" is bf16 where the device has it in hardware, fp16 on older GPUs, float32 on other CPUs. A plan made for a GPU
    thus serves on a CPU as well. "32-true" is always kept.
    """
    if option == "32-true":
        return PrecisionChoice("32-true", "as asked for")
    best = _best_on_gpu() if device_type == "cuda" else _best_on_cpu()
    if option in ("auto", best.precision):
        return best
    if option == "16-mixed" and device_type == "cuda":
        return PrecisionChoice("16-mixed", "as asked for")
    return PrecisionChoice(best.precision, f"{best.reason}, not {option}")


def autocast(precision: Precision, device_type: DeviceType) -> AbstractContextManager[Any]:
    """The context in which a network computes in `precision`; none for float32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device_type, dtype=dtype) if dtype is not None else nullcontext()


def free_vram_bytes(device: torch.device | None = None) -> int:
    """Bytes that a GPU still has for tensors: what the driver has free, and what torch keeps without using it.

    Args:
        device: The GPU; None is the current one.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); emulation is slower than float32."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def _best_on_gpu() -> PrecisionChoice:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return PrecisionChoice("bf16-mixed", "the GPU has bfloat16")
    return PrecisionChoice("16-mixed", "the GPU has no bfloat16")


def _best_on_cpu() -> PrecisionChoice:
    if cpu_has_bfloat16():
        return PrecisionChoice("bf16-mixed", "the CPU has bfloat16")
    return PrecisionChoice("32-true", "the CPU has no bfloat16")
