"""nnU-Net's side: its own planner, preprocessing, trainer and prediction, in its own environment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.processes import TRAINING_SAMPLE_SECONDS, Usage
from peers.raw_dataset import DATASET_NAME, FOLD
from peers.schedule import Pace, Schedule
from peers.sides import KeyedSide, Training, write_request
from pipeline.artifacts import write_text
from pipeline.datasets.splits import Fold

WORKER = Path(__file__).with_name("nnunet_train.py")
CONFIGURATION = "3d_fullres"
MODEL = Path("results", DATASET_NAME, f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}")


@dataclass(frozen=True, kw_only=True)
class NnunetSide(KeyedSide):
    """nnU-Net of an environment that nnunet_environment.sh made.

    Attributes:
        environment: Its folder.
        mirrors: It trains on patches mirrored along all axes, which it does by itself.
    """

    environment: Path
    mirrors: bool = True

    name = "nnunet"
    rehearsal = Schedule(epochs=2, iterations_per_epoch=3, validate_every=1)
    # A validation batch takes a third of an iteration, and every epoch has one.
    min_iterations = 5
    validations = 0

    @property
    def mirrorings(self) -> tuple[str, ...]:
        """What was never mirrored in training is not mirrored for a prediction."""
        return ("none", "mirror") if self.mirrors else ("none",)

    @property
    def choices(self) -> tuple[object, ...]:
        """Whether it mirrors."""
        return (self.mirrors,)

    def prepare(self) -> dict[str, dict[str, float]]:
        """`nnUNetv2_plan_and_preprocess`, with its check of the dataset, as ours has one; then the split file."""
        processes = str(self.runner.num_cpus)
        command = [self._program("nnUNetv2_plan_and_preprocess"), "-d", "1", "-c", CONFIGURATION]
        command += ["--verify_dataset_integrity", "-npfp", processes, "-np", processes]
        used = self.runner.run("nnunet-plan-preprocess", command, variables=self.variables())
        self.write_folds()
        return {"plan and preprocess": used.rounded()}

    def write_folds(self, others: Iterable[Fold] = ()) -> None:
        """The file that its trainer reads its folds from: the one that all sides train, and others behind it."""
        folds = [{"train": list(fold.train), "val": list(fold.validation)} for fold in (self.cases.fold, *others)]
        write_text(self.preprocessed_dataset / "splits_final.json", json.dumps(folds))

    def plan(self) -> dict[str, Any]:
        """Its plans, as they are written."""
        return json.loads((self.preprocessed_dataset / "nnUNetPlans.json").read_text())

    def train(self, schedule: Schedule, *, seed: int, folder: Path) -> Training:
        """Its trainer, which takes no seed."""
        folder.mkdir(parents=True)
        request = {
            "epochs": schedule.epochs,
            "iterations_per_epoch": schedule.iterations_per_epoch,
            "num_threads": self.runner.num_cpus,
            "mirrors": self.mirrors,
            "out": str(folder / "taken.json"),
        }
        usage = self.runner.run(
            f"nnunet-train-{folder.name}",
            [self.environment / "bin" / "python", WORKER],
            variables=self.variables(folder),
            stdin=write_request(folder / "request.json", request),
            sample_seconds=TRAINING_SAMPLE_SECONDS,
        )
        taken = json.loads((folder / "taken.json").read_text())
        return Training(
            seconds=taken["training_seconds"],
            pace=Pace(iteration=taken["iteration_seconds"], epoch=taken["epoch_seconds"]),
            iterations=taken["iterations"],
            batch_size=taken["settings"]["batch_size"],
            patch_size=tuple(taken["settings"]["patch_size"]),
            usage=usage,
            settings=taken["settings"],
        )

    def predict(self, folder: Path, images: Path, out: Path, mirroring: str) -> Usage:
        """`nnUNetv2_predict_from_modelfolder`."""
        command = [self._program("nnUNetv2_predict_from_modelfolder"), "-m", folder / MODEL, "-f", str(FOLD)]
        command += ["-i", images, "-o", out, "-chk", "checkpoint_final.pth", "-device", "cpu"]
        command += [] if mirroring == "mirror" else ["--disable_tta"]
        name = f"nnunet-predict-{folder.name}-{mirroring}"
        return self.runner.run(name, command, variables=self.variables(folder))

    @property
    def preprocessed_dataset(self) -> Path:
        """Where its plans, its split file and its cases lie."""
        return self.folder / "preprocessed" / DATASET_NAME

    def _program(self, name: str) -> Path:
        return self.environment / "bin" / name

    def variables(self, folder: Path | None = None) -> dict[str, str]:
        """Where nnU-Net finds things, and as many augmentation processes as it would start itself on such a machine."""
        places = {
            "raw": self.cases.raw.parent,
            "preprocessed": self.folder / "preprocessed",
            "results": (folder or self.folder) / "results",
        }
        names = {f"nnUNet_{name}": str(path) for name, path in places.items()}
        return {**names, "nnUNet_n_proc_DA": str(self.runner.num_cpus)}
