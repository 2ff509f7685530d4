"""What lies where in a run folder, and in a work folder with several: names by which stages find each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A run folder in a work folder is called so, with the number of its fold behind it.
FOLD = "fold_"


@dataclass(frozen=True)
class _Files:
    path: Path

    @property
    def config(self) -> Path:
        """The options."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The plan: in a work folder that of all folds, in a run folder as it was when the run began."""
        return self.path / "plan.json"

    @property
    def log(self) -> Path:
        """The lines of the log, of every start."""
        return self.path / "log.txt"


class RunFiles(_Files):
    """Names of everything in a run folder, whether it is there or not.

    Attributes:
        path: The folder.
    """

    @property
    def splits(self) -> Path:
        """The folds."""
        return self.path / "splits.json"

    @property
    def record(self) -> Path:
        """What ran and what came of it."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One row an epoch."""
        return self.path / "metrics.csv"

    @property
    def heartbeat(self) -> Path:
        """How far the training is; written while it runs."""
        return self.path / "heartbeat.json"

    @property
    def tracking(self) -> Path:
        """What a tracker has been sent."""
        return self.path / "tracking.json"

    @property
    def validation_progress(self) -> Path:
        """Which cases of the newest validation are scored, until a run is finished."""
        return self.path / "validation_progress.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the weights."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """Everything that is needed to go on, as of the newest finished epoch, or of a later optimiser step."""
        return self.checkpoints / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The `last` before the newest one, in case that is torn, until a run is finished; only where links are."""
        return self.checkpoints / "previous.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The same after the epoch with the best validation."""
        return self.checkpoints / "best.ckpt"

    @property
    def held_out_predictions(self) -> Path:
        """The folder in which `voxfit run` segments the cases that the run was not trained on."""
        return self.path / "validation"

    @property
    def held_out_scores(self) -> Path:
        """The scores of these."""
        return self.held_out_predictions / "metrics.json"

    @property
    def report(self) -> Path:
        """The page that shows them."""
        return self.path / "report.html"

    @property
    def postprocessing(self) -> Path:
        """What `voxfit postprocess` chose."""
        return self.path / "postprocessing.json"


class WorkFiles(_Files):
    """Names of everything in the work folder of `voxfit run`, or of the jobs of `voxfit slurm`.

    Attributes:
        path: The folder.
    """

    @property
    def store(self) -> Path:
        """The preprocessed cases."""
        return self.path / "store"

    def run(self, fold: int) -> RunFiles:
        """The run folder of a fold."""
        return RunFiles(self.path / f"{FOLD}{fold}")

    @property
    def cross_validation(self) -> Path:
        """Predictions, scores and report of all folds together, of `voxfit run`."""
        return self.path / "cross_validation"

    @property
    def predictions(self) -> Path:
        """The folder in which jobs segment the cases that any fold held out."""
        return self.path / "predictions"

    @property
    def scores(self) -> Path:
        """The scores of these."""
        return self.path / "metrics.json"
