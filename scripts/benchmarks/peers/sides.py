"""What a training of any side comes to, and what the sides have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from peers.processes import Runner, Usage
from peers.raw_dataset import Cases
from peers.schedule import Pace, Schedule

# Who is compared, as people call them.
NAMES = {"voxfit": "voxfit", "nnunet": "nnU-Net", "monai": "MONAI"}
# What the name of a peer ends with when it was trained without mirroring.
UNMIRRORED = "-unmirrored"
# voxfit trained by its recipe for long trainings.
LONGER = "voxfit-long"


@dataclass(frozen=True)
class Training:
    """One finished training.

    Attributes:
        seconds: From the first iteration to the end of the last epoch.
        pace: What its parts took.
        iterations: That it did.
        batch_size: Patches in each.
        patch_size: Their size in voxels.
        usage: Of the whole process.
        settings: What the side chose by itself.
    """

    seconds: float
    pace: Pace
    iterations: int
    batch_size: int
    patch_size: tuple[int, ...]
    usage: Usage
    settings: dict[str, Any]


class Side(Protocol):
    """One of those that are compared; all of its files lie in a folder of its own.

    Attributes:
        name: In results.
        key: In names of files; another one where the side does something else.
        runner: Starts its processes.
        rehearsal: A training just long enough to be timed.
        min_iterations: Least iterations of an epoch.
        validations: Validations of a training at most; 0 where every epoch has one of its own.
        mirrorings: Ways to predict: without and, where the side has it, with mirroring.
    """

    name: str
    key: str
    runner: Runner
    rehearsal: Schedule
    min_iterations: int
    validations: int
    mirrorings: tuple[str, ...]

    def prepare(self) -> dict[str, dict[str, float]]:
        """Plan and preprocess, once; what each took."""

    def train(self, schedule: Schedule, *, seed: int, folder: Path) -> Training:
        """Train from scratch into an empty folder, in a process of its own."""

    def predict(self, folder: Path, images: Path, out: Path, mirroring: str) -> Usage:
        """Predict a folder of images with the last weights of a training, in a process of its own."""


@dataclass(frozen=True, kw_only=True)
class KeyedSide:
    """What sides do alike: a name for their files that tells what they do, and a folder for what they prepare.

    Attributes:
        cases: That all sides are given.
        runner: Starts its processes.
        work: Folder of the comparison.
    """

    cases: Cases
    runner: Runner
    work: Path

    name: ClassVar[str]

    @property
    def choices(self) -> tuple[object, ...]:
        """What there was to choose, as JSON takes it; nothing unless a side says so."""
        return ()

    @property
    def key(self) -> str:
        """By the cases, the CPUs and its choices."""
        return make_key(self.name, self.cases, self.runner.num_cpus, *self.choices)

    @property
    def folder(self) -> Path:
        """Where its plan and prepared cases lie."""
        return self.work / self.key


def make_key(name: str, cases: Cases, num_cpus: int, *choices: object) -> str:
    """A name that is another one where anything differs that results depend on, so that none is taken for another."""
    told = json.dumps([cases.source.name, list(cases.fold.train), list(cases.fold.validation), num_cpus, *choices])
    return f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def write_request(path: Path, request: dict[str, Any]) -> Path:
    """The standard input of a worker, kept as a file."""
    path.write_text(json.dumps(request, indent=1))
    return path
