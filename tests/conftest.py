"""Fixtures for every test: the shared real data where it lies, and quiet threads."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.geometry import Grid
from pipeline.io.volume import Volume
from pipeline.plan import ChannelPlan, MemoryPlan, NetworkPlan, Plan
from pipeline.run_record import RunRecord
from pipeline.synthetic import make_synthetic_case
from pipeline.synthetic_dicom import (
    PlantedIdentity,
    SeriesOptions,
    WrittenSeries,
    label_polygons,
    write_series,
    write_structures,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels of GPUs are interpreted where there is none, which Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts what it runs in the background with Ctrl-C ignored; trainings of these tests are sent it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = PROJECT_ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the soak test: `pytest tests/training/test_kills.py --kills 50 --kill_seed 1 --timeout 0`."""
    parser.addoption("--kills", type=int, default=0, help="kills in tests/training/test_kills.py, in place of its own")
    parser.addoption("--kill_seed", type=int, default=0, help="other moments for them")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which trainings that run out of memory make themselves.

    With PyTorch, MONAI, Lightning and the tests imported one takes a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system itself refuses to let any file grow beyond `num_bytes`, as a full disk or quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def project_root() -> Path:
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real volumes beside the project; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real volumes are not beside the project (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def two_stages() -> Callable[..., NetworkPlan]:
    """Makes the plan of a network of two small stages; options as in `NetworkPlan`."""

    def make(**options: Any) -> NetworkPlan:
        network = NetworkPlan(
            features_per_stage=(4, 8),
            strides=((1, 1, 1), (2, 2, 2)),
            kernel_sizes=((3, 3, 3), (3, 3, 3)),
            num_blocks_per_stage=(1, 1),
            num_groups=2,
        )
        return replace(network, **options)

    return make


@pytest.fixture(scope="session")
def plan_of(two_stages: Callable[..., NetworkPlan]) -> Callable[..., Plan]:
    """Makes a plan of one channel, one organ and such a network; options as in `Plan`."""

    def make(**options: Any) -> Plan:
        plan = Plan(
            dataset_name="synthetic",
            fingerprint_hash="0",
            channels=(ChannelPlan(name="T1", scheme="none"),),
            labels={"background": 0, "organ": 1},
            target_spacing=(1.0, 1.0, 1.0),
            median_shape=(20, 20, 20),
            patch_size=(16, 16, 16),
            network=two_stages(),
            memory=MemoryPlan(budget_bytes=1, peak_bytes=1, overhead_bytes=0, parts={}),
        )
        return replace(plan, **options)

    return make


@pytest.fixture(scope="session")
def record_of() -> Callable[..., RunRecord]:
    """Makes the record of a small run on a CPU; options as in `RunRecord`."""

    def make(**options: Any) -> RunRecord:
        record = RunRecord(
            fold=0,
            versions={},
            device="cpu",
            precision="32-true",
            precision_reason="asked for",
            num_threads=1,
            num_workers=0,
            batch_size=1,
            accumulate_grad_batches=2,
            num_parameters=10,
        )
        return replace(record, **options)

    return make


@dataclass(frozen=True, eq=False)
class DicomStudy:
    """A synthetic series with the structures drawn on it, and what a label should be.

    Attributes:
        series: The images.
        structures: The RTSTRUCT; None where none was asked for.
        label: (I, J, K) class values in RAS order, 1 for the first name.
        image: As it was before it was written.
    """

    series: WrittenSeries
    structures: Path | None
    label: NDArray[Any]
    image: Volume


def centre_of(grid: Grid) -> NDArray[np.float64]:
    """The middle of a grid in mm."""
    return grid.affine[:3, :3] @ ((np.array(grid.shape) - 1) / 2) + grid.affine[:3, 3]


def _write_study(
    folder: Path,
    *,
    seed: int = 0,
    names: Sequence[str] = ("GTV", "Liver"),
    patient: str = "",
    shape: tuple[int, int, int] = (16, 14, 10),
    shear: float = 0.0,
    num_channels: int = 1,
    observer: str = "observer",
    identity: PlantedIdentity | None = None,
    **options: Any,
) -> DicomStudy:
    """Write `folder/image` and, where there are names, `folder/structures/<observer>.dcm`.

    Args:
        folder: Of the study.
        seed: Of image, study and series.
        names: Of the structures; none writes no structures.
        patient: PatientID; by default one for each study.
        shape: Voxels.
        shear: Forward shift per mm of slice, as of a tilted gantry.
        num_channels: Phases.
        observer: Name of the file of structures.
        identity: Instead of one with `patient` alone.
        options: As in `SeriesOptions`.
    """
    case = make_synthetic_case(seed, shape=shape, spacing=(1.5, 1.25, 3.0), num_classes=max(2, len(names) + 1))
    affine = case.image.grid.affine.copy()
    if "study_seed" in options:
        # Series of one study show the same part of the patient.
        home = make_synthetic_case(options["study_seed"], shape=(16, 14, 10), spacing=(1.5, 1.25, 3.0)).image.grid
        affine[:3, 3] += centre_of(home) - centre_of(case.image.grid)
    affine[:3, 2] += affine[:3, 1] / 1.25 * shear * 3.0
    array = np.concatenate([case.image.array + 100 * n for n in range(num_channels)])
    image = Volume(array, Grid(shape, affine))
    who = identity or PlantedIdentity(patient_id=patient or f"FAKE-{options.get('study_seed', seed):04d}")
    settings = {"seed": seed, "study_seed": seed, "identity": who, "series_description": "thorax", **options}
    series = write_series(folder / "image", image, SeriesOptions(**settings))
    structures = None
    if names:
        polygons = label_polygons(series, case.label.array[0], dict(enumerate(names, start=1)))
        structures = write_structures(folder / "structures" / f"{observer}.dcm", series, polygons, label=observer)
    return DicomStudy(series, structures, case.label.array[0], image)


@pytest.fixture(scope="session")
def write_study() -> Callable[..., DicomStudy]:
    """Write a synthetic DICOM study: (folder, *, seed, names, patient, shape, ...) -> DicomStudy."""
    return _write_study
