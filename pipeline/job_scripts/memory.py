"""The host memory that a job asks for, and the sentence that says where the figure comes from.

SLURM kills what takes more than it asked for, so parts are upper bounds, and a quarter is added: worker counts that are
left to "auto" use four fifths of what a job was allotted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from pipeline.datasets.dataset import Dataset
from pipeline.plan import Plan
from pipeline.preprocessing.workers import PROCESS_BYTES, estimate_case_bytes, largest_case_voxels
from pipeline.sizes import GIB

USABLE_SHARE = 0.8
# Resident sizes of a training process beside what is counted: torch and Lightning (0.5 GiB measured on a CPU), and with
# a GPU what CUDA's libraries map (an estimate, not yet measured).
CPU_PROCESS_BYTES = 1 * GIB
GPU_PROCESS_BYTES = 4 * GIB
# Measured on labels that are rugged everywhere, where surfaces are most of the volume; smooth ones take a tenth.
BYTES_PER_EVALUATED_VOXEL = 64
# Most that a prediction is given for scores: it divides volumes so that it stays within what its job was allotted, and
# windows of 192 voxels gather 32 features of a CT of 512 x 512 voxels across in half of it.
MOST_FOR_SCORES = 16 * GIB
# A CPU computes in float32 what the meter counted in 16 bits.
CPU_STEP_FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class CaseSizes:
    """What memory depends on, of the largest cases of a dataset.

    Attributes:
        num_cases: All of them.
        native_voxels: Of the largest image as it is in its file.
        stored_voxels: Of the largest at the plan's spacing.
        preparing_bytes: What one process takes to preprocess the largest.
    """

    num_cases: int
    native_voxels: int
    stored_voxels: int
    preparing_bytes: int

    @classmethod
    def of(cls, dataset: Dataset, plan: Plan) -> CaseSizes:
        """Read from the headers of the dataset's largest files."""
        native, stored = largest_case_voxels(dataset.cases, plan)
        return cls(
            num_cases=len(dataset.cases),
            native_voxels=native,
            stored_voxels=stored,
            preparing_bytes=estimate_case_bytes(dataset.cases, plan),
        )


class Memory(NamedTuple):
    """What a job asks for, as SLURM takes it, and why."""

    amount: str
    reason: str


def _sum(parts: dict[str, float]) -> Memory:
    """The parts that count, added up, with a quarter more, in whole GiB."""
    shown = [f"{size / GIB:.1f} GiB {name}" for name, size in parts.items() if size >= 0.05 * GIB]
    total = ceil(sum(parts.values()) / USABLE_SHARE / GIB)
    return Memory(f"{max(1, total)}G", f"{' + '.join(shown)}, and a quarter more")


def preprocess_memory(sizes: CaseSizes, *, num_workers: int) -> Memory:
    """Of a preprocessing job: every worker may have the largest case."""
    name = f"for {num_workers} worker(s) x {sizes.preparing_bytes / GIB:.1f} for the largest case"
    return _sum({name: num_workers * sizes.preparing_bytes, "for the process itself": PROCESS_BYTES})


def train_memory(plan: Plan, sizes: CaseSizes, *, cpus: int, on_gpu: bool, per_node: int = 1) -> Memory:
    """Of a training job on a node: its processes, their data workers, pinned memory, the largest validation cases."""
    workers, worker_bytes = _data_workers(plan, cpus, on_gpu=on_gpu)
    pinned = max([plan.memory.host_bytes, *(rung.host_bytes for rung in plan.fallbacks)])
    step = 0 if on_gpu else CPU_STEP_FACTOR * plan.memory.peak_bytes
    parts = {
        "for the process": GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES,
        "for the step's tensors": step,
        f"for {workers} data worker(s)": workers * worker_bytes,
        "pinned for offloading (plan.json)": pinned,
        "for the largest validation case and its scores": min(_scored_bytes(plan, sizes), MOST_FOR_SCORES),
    }
    each = f", in each of {per_node} processes" if per_node > 1 else ""
    return _sum({f"{name}{each}": per_node * size for name, size in parts.items()})


def predict_memory(
    plan: Plan, sizes: CaseSizes, *, cpus: int, on_gpu: bool, seams: bool = False, mirrors: bool = False
) -> Memory:
    """Of a prediction job: the process, one case from its files, its scores, and on a CPU the window's activations.

    Scores are those of the whole volume where there is room for them, which is fastest; see `MOST_FOR_SCORES`.

    Args:
        plan: The plan.
        sizes: Of the largest cases.
        cpus: Of the job.
        on_gpu: Whether the network runs on a GPU.
        seams: Whether seams are counted.
        mirrors: Whether windows are mirrored.
    """
    scores = 2 * _scored_bytes(plan, sizes)
    if seams:
        scores += _seam_bytes(plan, sizes, cpus=cpus, on_gpu=on_gpu, mirrors=mirrors)
    return _sum(
        {
            "for the process": GPU_PROCESS_BYTES if on_gpu else CPU_PROCESS_BYTES,
            "for a window's tensors": 0 if on_gpu else CPU_STEP_FACTOR * plan.memory.peak_bytes,
            "to prepare the largest case": sizes.preparing_bytes,
            "for its scores" + (" and their seams" if seams else ""): min(scores, MOST_FOR_SCORES),
        }
    )


def evaluate_memory(sizes: CaseSizes, *, num_workers: int) -> Memory:
    """Of the evaluation job: every worker may have the largest case."""
    case = PROCESS_BYTES + BYTES_PER_EVALUATED_VOXEL * sizes.native_voxels
    name = f"for {num_workers} worker(s) x {case / GIB:.1f} for the largest case"
    return _sum({name: num_workers * case, "for the process itself": PROCESS_BYTES})


def _data_workers(plan: Plan, cpus: int, *, on_gpu: bool) -> tuple[int, int]:
    """How many data workers training will start, and what each takes."""
    from pipeline.training.processes import (
        COPIES_PER_PATCH,
        CPUS_PER_WORKER,
        MAX_WORKERS,
        PREFETCH_FACTOR,
        WORKER_BYTES,
    )

    i, j, k = plan.patch_size
    batch_bytes = plan.batch_size * i * j * k * (4 * plan.num_channels + 2)
    wanted = cpus - 1 if on_gpu else cpus // CPUS_PER_WORKER
    return max(1, min(wanted, MAX_WORKERS)), WORKER_BYTES + (PREFETCH_FACTOR + COPIES_PER_PATCH) * batch_bytes


def _seam_bytes(plan: Plan, sizes: CaseSizes, *, cpus: int, on_gpu: bool, mirrors: bool) -> int:
    """What `voxfit predict` reckons with at the most: all of the largest case, as many windows as it takes at once."""
    from pipeline.inference.prediction_bytes import seam_bytes
    from pipeline.inference.window_batch import MOST_WINDOWS_ON_GPU
    from pipeline.inference.windows import SlidingWindow

    sliding = SlidingWindow(
        window=plan.patch_size,
        num_classes=plan.num_classes,
        # Which axes the training mirrors is not known yet; the sums of passes are the same for any.
        tta_axes=(0, 1, 2) if mirrors else (),
        window_batch=MOST_WINDOWS_ON_GPU if on_gpu else cpus,
        count_seams=True,
    )
    gathered = min(plan.num_classes, plan.network.features_per_stage[0])
    return seam_bytes(sliding, gathered=gathered, held_voxels=sizes.stored_voxels)


def _scored_bytes(plan: Plan, sizes: CaseSizes) -> int:
    """A stored case in memory with float32 scores of all classes, their weights, and the 64-bit classes of them."""
    voxels = max(sizes.stored_voxels, plan.patch_size[0] * plan.patch_size[1] * plan.patch_size[2])
    return voxels * (4 * (2 * plan.num_channels + plan.num_classes + 1) + 8 + 2)
