"""Options of `voxfit doctor`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from pipeline.config.checks import Auto
from pipeline.config.train import TrainConfig, TrainOptions
from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainOptions):
    """Say what this machine or job offers; with plan and store, run one real step of everything, and keep nothing."""

    plan: str = ""
    """plan.json; with it and a store, a training with the options below is tried for a few steps."""
    store: str = ""
    """Folder of the store that `voxfit preprocess` filled; its disk is timed as well."""
    work_dir: str = ""
    """Folder whose disk is timed, and in which the steps are made and removed again; the current one by default."""
    run_dir: str = ""
    """Run folder of the training, whose folds are taken where it exists already; nothing in it is changed."""
    fold: int | Literal["all"] = 0
    """Fold held out for validation; "all" trains on every case and validates on none."""
    max_epochs: int | Auto = 100
    """Epochs of the whole training; auto takes as many as fit into max_time."""
    json: bool = False
    """Print JSON instead of tables."""

    def problems(self) -> list[str]:
        """What is wrong with these values, each as `key: problem`."""
        if bool(self.plan) != bool(self.store):
            return ["plan: goes with store; give both for a real step, or neither"]
        try:
            self.training()
        except InputError as error:
            return [error.what]
        return []

    def training(self) -> TrainConfig:
        """The options of the training that is tried."""
        names = {item.name for item in fields(TrainConfig)}
        return TrainConfig(**{item.name: getattr(self, item.name) for item in fields(self) if item.name in names})
