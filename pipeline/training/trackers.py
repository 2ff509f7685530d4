"""MLflow and Weights & Biases behind one small interface, each through Lightning's own logger.

Neither sends figures of its use to its maker from here, and W&B is told to leave out host, hardware and code: what goes
to a tracker is what `pipeline.training.tracking` gives it. MLflow adds the name of the user, as it always does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.config import TrackingConfig
from pipeline.errors import InputError

Outcome = Literal["finished", "failed", "stopped", "interrupted"]
SECONDS_TO_ANSWER = 30


class TrackerRun(Protocol):
    """A run at a tracker; everything raises whatever the tracker does.

    Attributes:
        run_id: Of the run there.
        place: Where it is, for people.
    """

    run_id: str
    place: str

    def describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Say what is trained; once in the life of a run."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add the figures of optimiser step `step`."""

    def close(self, outcome: Outcome) -> None:
        """Say how the training ended; one that was interrupted is opened again at once."""


def check_tracker(config: TrackingConfig) -> None:
    """Find out whether the tracker's package is there, without importing it.

    Raises:
        InputError: It is not.
    """
    spec = find_spec(config.name) if config.name != "none" else None
    # A folder of that name that happens to lie where modules are looked for has no origin.
    if config.name != "none" and (spec is None or spec.origin is None):
        raise InputError(
            f"the package {config.name} is not installed",
            where=f"tracking.name {config.name}",
            fix=f"pip install 'voxfit[{config.name}]'",
        )


def open_tracker(config: TrackingConfig, run_dir: Path, run_id: str) -> TrackerRun:
    """Begin a run at the tracker, or go on with one.

    Args:
        config: Which tracker, and where.
        run_dir: The run folder, after which the run is named.
        run_id: Of the run to go on with; "" begins one.
    """
    kind = MLflowRun if config.name == "mlflow" else WandbRun
    return kind(config, run_dir.resolve(), run_id)


def _name_of(run_dir: Path) -> str:
    return "/".join(run_dir.parts[-2:])


class MLflowRun:
    """A run of MLflow's, by default in a local store of files.

    Args:
        config: As in `open_tracker`.
        run_dir: As in `open_tracker`.
        run_id: As in `open_tracker`.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_id: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Of the stores without a server the only one that needs no database, whose locks shared file systems lack.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # A server that is gone is not to hold up a training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(SECONDS_TO_ANSWER))
        from pytorch_lightning.loggers import MLFlowLogger

        self.place = config.uri or (run_dir.parent / "mlruns").as_uri()
        # Neither the path of a script nor its revision says anything here.
        tags = {"mlflow.source.name": "voxfit train"}
        where: dict[str, Any] = {"experiment_name": config.experiment, "tracking_uri": self.place}
        self._logger = MLFlowLogger(**where, run_name=_name_of(run_dir), run_id=run_id or None, tags=tags)
        self._make_experiment(config.experiment)
        self._client = self._logger.experiment
        self.run_id = str(self._logger.run_id)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")

    def _make_experiment(self, name: str) -> None:
        """Before Lightning does, which warns of it, and stumbles over another fold that begins at the same moment."""
        from mlflow.exceptions import MlflowException

        client = self._logger._mlflow_client
        if client.get_experiment_by_name(name) is None:
            try:
                client.create_experiment(name)
            except MlflowException:
                if client.get_experiment_by_name(name) is None:
                    raise

    def describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Parameters and tags."""
        self._logger.log_hyperparams(dict(parameters))
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Metrics, with the optimiser step as their step."""
        self._logger.log_metrics(figures, step)

    def close(self, outcome: Outcome) -> None:
        """Set the status."""
        status = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}.get(outcome)
        if status is not None:
            self._client.set_terminated(self.run_id, status)


class WandbRun:
    """A run of Weights & Biases', offline in the run folder unless a server is given.

    Offline every start of a training makes a folder of its own with the same run id; `wandb sync` puts them together.

    Args:
        config: As in `open_tracker`.
        run_dir: As in `open_tracker`.
        run_id: As in `open_tracker`.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_id: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        self.run_id = run_id or secrets.token_hex(4)
        self.place = config.uri or str(run_dir / "wandb")
        server = {"base_url": config.uri, "mode": "online"} if config.uri else {"mode": "offline"}
        run = wandb.init(
            project=config.experiment,
            name=_name_of(run_dir),
            id=self.run_id,
            dir=str(run_dir),
            resume="allow" if config.uri else None,
            reinit="create_new",
            settings=wandb.Settings(**server, **_wandb_settings()),
        )
        self._logger = WandbLogger(experiment=run)

    def describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Both as configuration: tags are words without values there."""
        self._logger.log_hyperparams({**parameters, **{f"tag.{key}": value for key, value in tags.items()}})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Metrics at W&B's own step, which Lightning counts by calls: those of two starts would be the same."""
        self._logger.experiment.log(dict(figures), step=step)

    def close(self, outcome: Outcome) -> None:
        """Write out what is left."""
        self._logger.experiment.finish(exit_code=0 if outcome == "finished" else 1)


def _wandb_settings() -> dict[str, Any]:
    """Silence, no waiting for a network or an answer, and nothing sent that was not asked for."""
    left_out = ("disable_git", "disable_code", "disable_job_creation", "x_disable_meta", "x_disable_stats")
    return {
        **dict.fromkeys((*left_out, "x_disable_machine_info"), True),
        "x_save_requirements": False,
        "host": "unnamed",
        "console": "off",
        "silent": True,
        "init_timeout": SECONDS_TO_ANSWER,
        "login_timeout": 1,
        "finish_timeout": SECONDS_TO_ANSWER,
        "x_graphql_retry_max": 2,
    }
