"""Trackers, for real: MLflow's store of files, and W&B offline. Nothing here talks to another machine."""

from __future__ import annotations

import getpass
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest
import torch
from torch import Tensor

from pipeline.config import TrackingConfig
from pipeline.errors import InputError, StoppedError
from pipeline.networks.unet import UNet
from pipeline.training import trackers
from pipeline.training.metrics_table import MetricsTable
from pipeline.training.ranks import Ranks
from pipeline.training.rehearsal import rehearse
from pipeline.training.run_folder import RunFolder
from pipeline.training.tracking import Tracking
from pipeline.training.trainer import fit_fold

mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")
MLFLOW, WANDB = TrackingConfig(name="mlflow", experiment="ellipsoids"), TrackingConfig(name="wandb")
EPOCHS = {"max_epochs": 4, "iterations_per_epoch": 2, "validate_every_n_epochs": 2}


class PowerCutError(Exception):
    """The machine went down."""


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere else fails the test."""
    plain = socket.socket.connect

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            pytest.fail(f"talks to {address[0]}")
        return plain(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    rows = MetricsTable(run_dir / "metrics.csv", class_names=(), keep_epochs=10**6).rows
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def client_of(run_dir: Path):
    return mlflow.MlflowClient((run_dir.parent / "mlruns").as_uri())


def mlflow_runs(run_dir: Path) -> list:
    client = client_of(run_dir)
    return client.search_runs([client.get_experiment_by_name("ellipsoids").experiment_id])


def mlflow_rows(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of the only run there is, by step."""
    (run,) = mlflow_runs(run_dir)
    rows: dict[int, dict[str, float]] = {}
    for key in run.data.metrics:
        for point in client_of(run_dir).get_metric_history(run.info.run_id, key):
            row = rows.setdefault(point.step, {})
            assert key not in row, f"{key} is there twice at step {point.step}"
            row[key] = point.value
    assert all(step == row["optimizer_step"] for step, row in rows.items())
    return [rows[step] for step in sorted(rows)]


def records_in(path: Path) -> Iterator:
    """Records of a W&B file: LevelDB's log format behind seven bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part of several.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_starts(run_dir: Path) -> list[list]:
    return [list(records_in(path)) for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))]


def wandb_rows(run_dir: Path) -> list[dict[str, float]]:
    """All rows in the order in which they were logged, over all starts."""
    rows = []
    for start in wandb_starts(run_dir):
        for record in start:
            if record.WhichOneof("record_type") == "history":
                items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                assert items["_step"] == items["optimizer_step"]
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


ROWS = {"mlflow": mlflow_rows, "wandb": wandb_rows}


def failing_at(number: int, error: type[Exception] = PowerCutError):
    """A forward pass of the U-Net that fails at a given training pass."""
    plain, passes = UNet.forward, []

    def forward(network: UNet, x: Tensor):
        passes.extend([x.shape] * network.training)
        if network.training and len(passes) == number:
            raise error
        return plain(network, x)

    return forward


@pytest.mark.parametrize("tracking", [MLFLOW, WANDB], ids=lambda each: each.name)
def test_a_tracker_has_every_row_of_the_table_once(plan, store, splits, make_config, tracking):
    result = fit_fold(plan, store, splits, make_config(tracking=tracking, **EPOCHS))
    rows = rows_of(result.run_dir)
    assert len(rows) == 4
    assert ROWS[tracking.name](result.run_dir) == rows


@pytest.mark.parametrize("tracking", [MLFLOW, WANDB], ids=lambda each: each.name)
def test_a_run_that_goes_on_goes_on_in_the_same_run_of_the_tracker(
    plan, store, splits, make_config, tracking, monkeypatch
):
    config = make_config(tracking=tracking, save_every_minutes=1e-9, **EPOCHS)
    run_dir = Path(config.run_dir)
    # In the middle of the second epoch, right behind the third, and in the last.
    for number in (4, 4, 2):
        with monkeypatch.context() as patch:
            patch.setattr(UNet, "forward", failing_at(number))
            with pytest.raises(PowerCutError):
                fit_fold(plan, store, splits, config)
    ids = {json.loads((run_dir / "tracking.json").read_text())["run_id"]}
    if tracking.name == "mlflow":
        assert [each.info.status for each in mlflow_runs(run_dir)] == ["FAILED"]
    fit_fold(plan, store, splits, config)
    assert {json.loads((run_dir / "tracking.json").read_text())["run_id"]} == ids
    assert ROWS[tracking.name](run_dir) == rows_of(run_dir)
    if tracking.name == "mlflow":
        assert [each.info.status for each in mlflow_runs(run_dir)] == ["FINISHED"]
    else:
        starts = wandb_starts(run_dir)
        runs = [record.run for start in starts for record in start if record.WhichOneof("record_type") == "run"]
        assert {run.run_id for run in runs} == ids


def test_a_tracker_that_is_chosen_later_gets_what_was_trained_before(plan, store, splits, make_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "forward", failing_at(6))
        with pytest.raises(PowerCutError):
            fit_fold(plan, store, splits, make_config(**EPOCHS))
    result = fit_fold(plan, store, splits, make_config(tracking=MLFLOW, **EPOCHS))
    assert mlflow_rows(result.run_dir) == rows_of(result.run_dir)


@pytest.mark.parametrize("tracking", [MLFLOW, WANDB], ids=lambda each: each.name)
def test_a_tracker_that_is_chosen_for_a_finished_run_gets_all_of_it_once(plan, store, splits, make_config, tracking):
    run_dir = fit_fold(plan, store, splits, make_config(**EPOCHS)).run_dir
    for _ in range(2):
        fit_fold(plan, store, splits, make_config(tracking=tracking, **EPOCHS))
        assert ROWS[tracking.name](run_dir) == rows_of(run_dir)
    if tracking.name == "mlflow":
        (run,) = mlflow_runs(run_dir)
        assert run.info.status == "FINISHED"
        assert run.data.params["max_epochs"] == "4"
    else:
        assert len(wandb_starts(run_dir)) == 1


def test_a_tracker_that_failed_to_the_end_is_sent_the_rest_by_the_next_start(
    plan, store, splits, make_config, monkeypatch
):
    def full(self, figures, step):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trackers.MLflowRun, "log", full)
        run_dir = fit_fold(plan, store, splits, make_config(tracking=MLFLOW, **EPOCHS)).run_dir
    assert mlflow_rows(run_dir) == []
    fit_fold(plan, store, splits, make_config(tracking=MLFLOW, **EPOCHS))
    assert mlflow_rows(run_dir) == rows_of(run_dir)
    assert [each.info.status for each in mlflow_runs(run_dir)] == ["FINISHED"]


def test_a_run_is_described_without_cases_patients_or_paths(plan, store, splits, make_config):
    config = make_config(tracking=MLFLOW, patient_pattern=r"(case_\d)", **EPOCHS)
    result = fit_fold(plan, store, splits, config)
    (run,) = mlflow_runs(result.run_dir)
    assert run.info.run_name == "/".join(result.run_dir.parts[-2:])
    expected = {"voxfit", "fold", "training_cases", "validation_cases"}
    assert expected <= set(run.data.tags)
    assert (run.data.tags["training_cases"], run.data.tags["validation_cases"]) == ("4", "2")
    parameters = run.data.params
    assert parameters["optim.momentum"] == "0.99"
    assert parameters["plan.network.features_per_stage"] == "[4, 8]"
    assert parameters["run.device"] == "cpu"
    files = [path for path in (result.run_dir.parent / "mlruns").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert "case_" not in str(path), path
        # Where the store itself lies stands in there.
        text = "" if path.name == "meta.yaml" else path.read_text()
        assert "case_" not in text, path
        assert str(store.parent) not in text, path


def test_wandb_is_told_neither_the_machine_nor_the_command(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config(tracking=WANDB, **EPOCHS))
    (start,) = wandb_starts(result.run_dir)
    (run,) = [record.run for record in start if record.WhichOneof("record_type") == "run"]
    assert (run.host, run.display_name) == ("unnamed", "/".join(result.run_dir.parts[-2:]))
    content = b"".join(record.SerializeToString() for record in start)
    for hidden in ("case_", str(store), sys.argv[0], getpass.getuser() + "@"):
        assert hidden.encode() not in content, hidden
    names = [path.name for path in (result.run_dir / "wandb").rglob("files/*")]
    assert not {"wandb-metadata.json", "requirements.txt", "output.log"} & set(names)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_server_that_is_gone_costs_one_warning_and_no_training(
    plan, store, splits, make_config, caplog, monkeypatch, name
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    caplog.set_level(logging.WARNING, "voxfit")
    config = make_config(tracking=TrackingConfig(name=name, uri=uri), **EPOCHS)
    result = fit_fold(plan, store, splits, config)
    assert result.counts.epoch == 4
    said = [each.getMessage() for each in caplog.records if each.name.startswith("voxfit")]
    assert len(said) == 1
    assert said[0].startswith(f"{name} failed ({'MlflowException' if name == 'mlflow' else 'CommError'}: ")


def test_a_tracker_that_fails_in_between_is_sent_the_rest_by_the_next_start(
    plan, store, splits, make_config, caplog, monkeypatch
):
    config, plain = make_config(tracking=MLFLOW, **EPOCHS), trackers.MLflowRun.log

    def full(self, figures, step):
        if step >= 4:
            raise OSError(28, "No space left on device")
        plain(self, figures, step)

    caplog.set_level(logging.WARNING, "voxfit")
    with monkeypatch.context() as patch:
        patch.setattr(trackers.MLflowRun, "log", full)
        patch.setattr(UNet, "forward", failing_at(8))
        with pytest.raises(PowerCutError):
            fit_fold(plan, store, splits, config)
    run_dir = Path(config.run_dir)
    assert len([each for each in caplog.records if "mlflow failed" in each.getMessage()]) == 1
    assert len(mlflow_rows(run_dir)) == 1
    fit_fold(plan, store, splits, config)
    assert mlflow_rows(run_dir) == rows_of(run_dir)


def test_a_kill_while_a_row_is_sent_doubles_nothing(tmp_path):
    """The process is gone after the tracker has the row and before anything else happens."""
    table = MetricsTable(tmp_path / "metrics.csv", class_names=())
    table.append({"epoch": 1, "optimizer_step": 5, "train_loss": 1.0})
    first = Tracking(MLFLOW, tmp_path, table)
    plain = trackers.MLflowRun.log

    class KilledError(BaseException):
        pass

    def killed(self, figures, step):
        plain(self, figures, step)
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers.MLflowRun, "log", killed)
        with pytest.raises(KilledError):
            first.begin({}, {})
    table.append({"epoch": 2, "optimizer_step": 10, "train_loss": 0.5})
    Tracking(MLFLOW, tmp_path, table).begin({}, {})
    assert [row["optimizer_step"] for row in mlflow_rows(tmp_path)] == [5, 10]


def test_another_tracker_begins_another_run(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", class_names=())
    table.append({"epoch": 1, "optimizer_step": 5, "train_loss": 1.0})
    for experiment in ("one", "two"):
        tracking = Tracking(replace(MLFLOW, experiment=experiment), tmp_path, table)
        tracking.begin({}, {})
        tracking.end("stopped")
    client = client_of(tmp_path)
    for experiment in ("one", "two"):
        (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert (run.data.metrics["train_loss"], run.info.status) == (1.0, "KILLED")


def test_a_run_that_goes_on_is_running_again_until_it_ends(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", class_names=())
    found = []
    for outcome in ("stopped", "interrupted", "finished"):
        tracking = Tracking(MLFLOW, tmp_path, table)
        tracking.begin({}, {})
        found.append(mlflow_runs(tmp_path)[0].info.status)
        tracking.end(outcome)
        found.append(mlflow_runs(tmp_path)[0].info.status)
    assert found == ["RUNNING", "KILLED", "RUNNING", "RUNNING", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("tracking", [MLFLOW, WANDB], ids=lambda each: each.name)
def test_a_step_down_goes_on_in_the_same_run(plan, store, splits, make_config, tracking, monkeypatch):
    ladder = replace(plan, fallbacks=(replace(plan.rung, recompute_stages=2),))
    monkeypatch.setattr(UNet, "forward", failing_at(5, error=torch.OutOfMemoryError))
    result = fit_fold(ladder, store, splits, make_config(tracking=tracking, **EPOCHS))
    assert len(RunFolder(result.run_dir).read_record().step_downs) == 1
    assert ROWS[tracking.name](result.run_dir) == rows_of(result.run_dir)


@pytest.mark.parametrize("tracking", [MLFLOW, WANDB], ids=lambda each: each.name)
def test_a_signal_to_all_processes_of_a_job_stops_a_tracked_training_like_any_other(trainings, tmp_path, tracking):
    """As a scheduler sends it: W&B's own process gets it as well."""
    options = ["--tracking.name", tracking.name, "--tracking.experiment", "ellipsoids", "--max_epochs", "400"]
    tracked = type(trainings)([*trainings.arguments, *options])
    run_dir = tmp_path / "run"
    process = tracked.start(run_dir)
    while not (run_dir / "metrics.csv").exists() or len(rows_of(run_dir)) < 3:
        assert process.exitcode is None
        sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == StoppedError.exit_code
    log = (run_dir / "log.txt").read_text()
    if "wandb failed" not in log:
        assert ROWS[tracking.name](run_dir) == rows_of(run_dir)
    assert log.count("failed") <= 1


def test_a_package_that_is_missing_is_said_before_anything_is_written(plan, store, splits, make_config, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = make_config(tracking=WANDB, **EPOCHS)
    with pytest.raises(InputError) as missing:
        fit_fold(plan, store, splits, config)
    assert "pip install 'voxfit[wandb]'" in str(missing.value.fix)
    assert not RunFolder(Path(config.run_dir)).config.exists()


def test_no_tracker_is_imported_before_it_is_asked_for():
    code = "import sys, pipeline.training.trainer; print({'mlflow', 'wandb'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_without_a_tracker_nothing_is_left(plan, store, splits, make_config):
    result = fit_fold(plan, store, splits, make_config(**EPOCHS))
    assert not {"tracking.json", "wandb"} & {path.name for path in result.run_dir.iterdir()}
    assert not (result.run_dir.parent / "mlruns").exists()


def test_a_rehearsal_is_not_tracked(splits, make_config):
    asked = []

    def train(config, fold):
        asked.append(config.tracking.name)
        raise PowerCutError

    config = make_config(tracking=MLFLOW)
    Path(config.run_dir).mkdir()
    with pytest.raises(PowerCutError):
        rehearse(train, config, splits.folds[0], iterations_per_step=1, ranks=Ranks())
    assert asked == ["none"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"experiment": " "}, "tracking.experiment"), ({"name": "wandb", "uri": "folder"}, "tracking.uri")],
)
def test_options_that_cannot_be_meant_are_refused(options, expected):
    with pytest.raises(InputError, match=expected):
        TrackingConfig(**options)


def test_only_the_first_of_several_processes_tracks(ranked_trainings, tmp_path):
    words = ("--tracking.name", "mlflow", "--tracking.experiment", "ellipsoids", "--max_epochs", "2")
    ranked_trainings.finish(tmp_path / "run", 2, *words, "--iterations_per_epoch", "4")
    assert mlflow_rows(tmp_path / "run") == rows_of(tmp_path / "run")
