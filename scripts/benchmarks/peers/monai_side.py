"""MONAI's side: what its DynUNet tutorial does, on the network that voxfit's plan describes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import BENCHMARKS

from peers.processes import TRAINING_SAMPLE_SECONDS, Usage
from peers.raw_dataset import ENDING
from peers.schedule import Pace, Schedule
from peers.sides import KeyedSide, Training, write_request
from peers.voxfit_side import VoxfitSide

WORKER = Path(__file__).with_name("monai_worker.py")


@dataclass(frozen=True)
class MonaiRecipe:
    """What a person decides who writes a training with MONAI; as in its tutorial for this task.

    Attributes:
        optimizer, lr, batch_size: Of the training.
        mirrors: Patches are flipped along all axes.
    """

    optimizer: str = "sgd"
    lr: float = 0.01
    batch_size: int = 9
    mirrors: bool = True


@dataclass(frozen=True, kw_only=True)
class MonaiSide(KeyedSide):
    """MONAI in the peers' environment.

    Patch, spacing, stages and features come from voxfit's plan, as a tutorial has them as constants.
    """

    environment: Path
    voxfit: VoxfitSide
    recipe: MonaiRecipe

    name = "monai"
    rehearsal = Schedule(epochs=2, iterations_per_epoch=4, validate_every=1)
    min_iterations = 1
    validations = 4
    mirrorings = ("none",)

    @property
    def choices(self) -> tuple[object, ...]:
        """Its recipe and its network."""
        return vars(self.recipe), self.network()

    def prepare(self) -> dict[str, dict[str, float]]:
        """Nothing: cases are prepared when a training begins."""
        return {}

    def train(self, schedule: Schedule, *, seed: int, folder: Path) -> Training:
        """Its training script."""
        folder.mkdir(parents=True)
        fold = self.cases.fold
        request = {
            **self.network(),
            **{"seed": seed, "optimizer": self.recipe.optimizer, "lr": self.recipe.lr, "mirrors": self.recipe.mirrors},
            "batch_size": self.recipe.batch_size,
            "train": [self.files(case_id) for case_id in fold.train],
            "validation": [self.files(case_id) for case_id in fold.validation],
            "epochs": schedule.epochs,
            "iterations_per_epoch": schedule.iterations_per_epoch,
            "validate_every": schedule.validate_every,
            "weights": str(folder / "weights.pt"),
            "out": str(folder / "taken.json"),
        }
        usage = self._work("train", request, folder, sample_seconds=TRAINING_SAMPLE_SECONDS)
        taken = json.loads((folder / "taken.json").read_text())
        told = ("preparation_seconds", "num_parameters")
        return Training(
            seconds=taken["training_seconds"],
            pace=Pace(iteration=taken["iteration_seconds"], validation=taken["validation_seconds"]),
            iterations=taken["iterations"],
            batch_size=min(self.recipe.batch_size, len(fold.train)),
            patch_size=tuple(request["patch_size"]),
            usage=usage,
            settings={name: taken[name] for name in told} | vars(self.recipe) | self.network(),
        )

    def predict(self, folder: Path, images: Path, out: Path, mirroring: str) -> Usage:
        """Sliding windows, and back to the grid of the image."""
        out.mkdir(parents=True, exist_ok=True)
        names = sorted({path.name.rsplit("_", 1)[0] for path in images.glob(f"*{ENDING}")})
        cases = [
            {"case_id": name, "image": [str(path.resolve()) for path in sorted(images.glob(f"{name}_????{ENDING}"))]}
            for name in names
        ]
        request = {**self.network(), "seed": 0, "cases": cases, "predictions": str(out)}
        request |= {"weights": str(folder / "weights.pt"), "out": str(folder / "predicted.json")}
        return self._work("predict", request, folder)

    def _work(self, do: str, request: dict[str, Any], folder: Path, **options: float) -> Usage:
        return self.runner.run(
            f"monai-{do}-{folder.name}",
            [self.environment / "bin" / "python", WORKER, do],
            variables={"PYTHONPATH": str(BENCHMARKS)},
            stdin=write_request(folder / f"{do}.json", request | {"num_threads": self.runner.num_cpus}),
            **options,
        )

    def files(self, case_id: str) -> dict[str, Any]:
        """Image and label files of a case, as MONAI's transforms take them."""
        images, label = self.cases.files_of(case_id)
        return {"image": images, "label": label}

    def network(self) -> dict[str, Any]:
        """Constants of the training script."""
        plan = self.voxfit.plan()
        network = plan["network"]
        return {
            "patch_size": plan["patch_size"],
            "spacing": plan["target_spacing"],
            "in_channels": len(plan["channels"]),
            "num_classes": self.cases.num_classes,
            "features": network["features_per_stage"],
            "strides": network["strides"],
            "kernel_sizes": network["kernel_sizes"],
            "ct": _ct_figures(plan["channels"]),
        }


def _ct_figures(channels: list[dict[str, Any]]) -> list[float] | None:
    """Bounds, mean and spread of the data set's foreground where the only channel is a CT."""
    if [channel["scheme"] for channel in channels] != ["ct"]:
        return None
    return [channels[0][name] for name in ("lower", "upper", "mean", "std")]
