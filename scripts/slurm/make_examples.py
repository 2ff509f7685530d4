"""Write the example job scripts of this folder, as `voxfit slurm` writes them for a dataset of large CT volumes.

Example:
    python scripts/slurm/make_examples.py

A test holds them up to date. For a dataset of one's own, `voxfit slurm` fills in its figures instead.
"""

import sys
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.config import SlurmConfig
from pipeline.job_scripts.memory import CaseSizes
from pipeline.job_scripts.writing import render_scripts
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan
from pipeline.sizes import GIB

FOLDER = Path(__file__).resolve().parent
# 120 cases; the largest has 512 x 512 x 300 voxels, and 400 x 400 x 300 at the plan's spacing.
SIZES = CaseSizes(
    num_cases=120, native_voxels=512 * 512 * 300, stored_voxels=400 * 400 * 300, preparing_bytes=int(3.1 * GIB)
)
CONFIG = SlurmConfig(
    dataset="Dataset",
    plan="work/plan.json",
    work_dir="work",
    out="scripts/slurm",
    predict_input="NewImages",
    account="imaging",
    partition="gpu",
)


def example_plan() -> Plan:
    """A plan for 24 GiB; of it only sizes and memory matter here."""
    return Plan(
        dataset_name="example",
        fingerprint_hash="0" * 16,
        channels=(ChannelPlan(name="CT", scheme="ct"),),
        labels={"background": 0, "organ": 1, "tumour": 2},
        target_spacing=(1.0, 1.0, 1.0),
        median_shape=(380, 380, 280),
        patch_size=(320, 320, 256),
        network=NetworkPlan(
            features_per_stage=(32, 64),
            strides=((1, 1, 1), (2, 2, 2)),
            kernel_sizes=((3, 3, 3), (3, 3, 3)),
            num_blocks_per_stage=(2, 2),
        ),
        memory=MemoryPlan(budget_bytes=24 * GIB, peak_bytes=22 * GIB, overhead_bytes=GIB, parts={}),
    )


def examples() -> dict[str, str]:
    """The scripts by file name."""
    return render_scripts(CONFIG, example_plan(), SIZES, num_folds=5)


def main() -> int:
    """Write them."""
    for name, text in examples().items():
        write_text(FOLDER / name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
