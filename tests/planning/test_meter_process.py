"""What a real step takes of a process, against what the meter says of it.

Run as a script, this file measures, in a process of its own with one thread.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.geometry import Shape3
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.networks.convolution_workspace import estimate_cpu_workspace
from pipeline.networks.precision import cpu_has_bfloat16
from pipeline.networks.unet import UNet
from pipeline.plan import NetworkPlan
from pipeline.planning.meter import count_step, meter_step
from pipeline.sizes import GIB

aten = torch.ops.aten
CLEAR_REFS = Path("/proc/self/clear_refs")
PLAN = NetworkPlan(
    features_per_stage=(16, 32, 64),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 3,
    num_blocks_per_stage=(1, 1, 1),
)
# oneDNN takes the algorithms that were measured.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
# The C library gives every larger block back to the system, so that operators are seen apart from what it keeps.
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
needs_proc = pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason="the peak is read from Linux's /proc")
PRECISIONS = [
    "32-true",
    pytest.param(
        "bf16-mixed",
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 convolutions"
        ),
    ),
]


def run_measurement(*, environment: dict[str, str] | None = None, **task: Any) -> Any:
    """Run this file as a script in a process of its own."""
    command = [sys.executable, __file__, json.dumps(task)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**inherited, **ENVIRONMENT, **(environment or {})}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@needs_proc
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_step_above_one_gibibyte_takes_the_metered_bytes_of_its_process(precision: Any) -> None:
    size = (128, 112, 112) if precision == "32-true" else (144, 144, 128)
    compare_with_process(precision, size)


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("options", "float32_size", "half_size"),
    [
        ({"recompute_stages": 2}, (144, 128, 112), (160, 160, 128)),
        ({"slab_stages": 2}, (160, 160, 128), (192, 192, 176)),
    ],
    ids=["recomputed", "in slabs"],
)
def test_a_leaner_step_above_one_gibibyte_takes_the_metered_bytes_of_its_process(
    precision: Any, options: dict[str, int], float32_size: Shape3, half_size: Shape3
) -> None:
    compare_with_process(precision, float32_size if precision == "32-true" else half_size, **options)


def skip_bf16_without_hardware(precision: str) -> None:
    if precision == "bf16-mixed" and not cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16, which takes other algorithms that no training is run in")


def compare_with_process(precision: Any, size: Shape3, **options: int) -> None:
    """Sizes should be such that the process takes a little over 1 GiB."""
    skip_bf16_without_hardware(precision)
    loss = DeepSupervisionLoss(DiceCELoss())
    memory = meter_step(
        UNet(1, 3, PLAN, **options), loss, patch_size=size, in_channels=1, precision=precision, device_type="cpu"
    )
    measured = run_measurement(what="step", precision=precision, size=size, options=options)
    assert measured["peak_bytes"] == memory.peak_bytes
    assert measured["process_bytes"] > GIB
    assert memory.process_bytes == pytest.approx(measured["process_bytes"], rel=0.1)


# Channels in and out, kernel, stride, and whether it is transposed.
CONVOLUTIONS = [
    (32, 32, 3, 1, False),
    (32, 64, 3, 2, False),
    (64, 32, 3, 1, False),
    (20, 40, 3, 1, False),
    (1, 32, 3, 1, False),
    (32, 64, 1, 1, False),
    (32, 3, 1, 1, False),
    (64, 32, 2, 2, True),
]


@needs_proc
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_convolutions_allocate_inside_is_what_a_process_takes_for_them(precision: str) -> None:
    skip_bf16_without_hardware(precision)
    # torch's own algorithms, which float32 takes for few channels and kernels of one voxel, copy channels last.
    last = [case for case in CONVOLUTIONS if case[2] > 1 and case[0] > 1]
    convolutions = [
        *((case, "contiguous_format") for case in CONVOLUTIONS),
        *((case, "channels_last_3d") for case in last),
    ]
    rows = run_measurement(what="convolutions", environment=GIVING_BACK, precision=precision, convolutions=convolutions)
    assert len(rows) == 2 * len(convolutions)
    for row in rows:
        assert row["estimated"] == pytest.approx(row["measured"], rel=0.15, abs=0.1 * row["tensors"]), row


def measure_peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which the process grows at most while `run` runs, and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = read_status("VmRSS")
    result = run()
    return read_status("VmHWM") - before, result


def read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure_step(precision: Any, size: Shape3, options: dict[str, int]) -> dict[str, int]:
    def run(shape: Shape3) -> Any:
        batch = torch.randn(1, 1, *shape), torch.zeros(1, *shape, dtype=torch.int64)
        return count_step(UNet(1, 3, PLAN, **options), DeepSupervisionLoss(DiceCELoss()), *batch, precision=precision)

    # Kernels and compiled code are loaded before.
    run((16, 16, 16))
    process_bytes, memory = measure_peak(lambda: run(size))
    return {"process_bytes": process_bytes, "peak_bytes": memory.peak_bytes}


def measure_convolutions(precision: str, convolutions: list[Any]) -> list[dict[str, Any]]:
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    rows = []
    for case, memory_format in convolutions:
        channels_in, channels_out, kernel, stride, transposed = case
        layout = getattr(torch, memory_format)
        size = (24, 20, 16) if transposed else (48, 40, 32)
        x = torch.randn(1, channels_in, *size).to(dtype, memory_format=layout)
        channels = (channels_in, channels_out) if transposed else (channels_out, channels_in)
        weight = torch.randn(*channels, *(kernel,) * 3).to(dtype)
        padding = 0 if transposed else kernel // 2
        geometry = ([stride] * 3, [padding] * 3, [1] * 3, transposed, [0] * 3, 1)
        y = aten.convolution(x, weight, None, *geometry)
        gradient = torch.randn_like(y)
        calls = {
            aten.convolution.default: (x, weight, None, *geometry),
            aten.convolution_backward.default: (gradient, x, weight, None, *geometry, [True, True, False]),
        }
        rows += [measure_operator(case, operator, arguments) for operator, arguments in calls.items()]
    return rows


def measure_operator(case: Any, operator: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    operator(*arguments)
    grown, result = measure_peak(lambda: operator(*arguments))
    results = [result] if isinstance(result, Tensor) else [part for part in result if part is not None]
    returned = sum(part.untyped_storage().nbytes() for part in results)
    tensors = sum(part.untyped_storage().nbytes() for part in arguments if isinstance(part, Tensor))
    estimated = estimate_cpu_workspace(operator, arguments, result)
    measured = grown - returned
    return {"case": case, "operator": str(operator), "estimated": estimated, "measured": measured, "tensors": tensors}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    measure = {"step": measure_step, "convolutions": measure_convolutions}[task.pop("what")]
    print(json.dumps(measure(**task)))


if __name__ == "__main__":
    main()
