"""What a training says of itself while it runs."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from pipeline.artifacts import read_artifact
from pipeline.config import StatusConfig
from pipeline.status import Heartbeat, read_status
from pipeline.training import heartbeat
from pipeline.training.trainer import fit_fold


class PowerCutError(Exception):
    """The machine went down."""


def cut_power() -> None:
    raise PowerCutError


@pytest.fixture
def beats(monkeypatch) -> list[Heartbeat]:
    """All that were written."""
    written, real = [], heartbeat.write_artifact

    def keep(path, artifact) -> None:
        written.append(artifact)
        real(path, artifact)

    monkeypatch.setattr(heartbeat, "write_artifact", keep)
    return written


def test_a_training_speaks_when_it_begins_before_and_after_an_epoch_is_validated_and_when_it_is_done(
    plan, store, splits, make_config, beats
):
    result = fit_fold(plan, store, splits, make_config())
    last = read_artifact(result.run_dir / "heartbeat.json", Heartbeat)
    assert last == beats[-1]
    assert [(each.epoch, each.optimizer_step) for each in beats] == [
        (0, 0),
        *((0, 4), (1, 4), (1, 8), (2, 8), (2, 12), (3, 12)),
        (3, 12),
    ]
    assert (last.phase, last.total_steps, last.eta_seconds) == ("finished", 12, 0.0)
    assert (last.host, last.pid) == (socket.gethostname(), os.getpid())
    assert last.peak_ram_bytes > 0
    # Two epochs remain after the first, with a validation each.
    assert 0 < beats[1].seconds_per_step * 8 <= beats[1].eta_seconds
    (status,) = read_status(StatusConfig(path=str(result.run_dir))).runs
    assert status.state == "finished"


def test_between_epochs_it_speaks_now_and_then_also_in_a_validation(
    plan, store, splits, make_config, beats, monkeypatch, one_layer
):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.0)
    fit_fold(plan, store, splits, make_config(max_epochs=1), network=one_layer())
    assert {"data", "validation", "report", "finished"} <= {each.phase for each in beats}


def test_a_failure_is_its_last_word(plan, store, splits, make_config, tmp_path, one_layer):
    with pytest.raises(PowerCutError):
        fit_fold(plan, store, splits, make_config(), network=one_layer(at=6, do=cut_power))
    assert read_artifact(tmp_path / "run" / "heartbeat.json", Heartbeat).phase == "failed"


def test_a_heartbeat_that_cannot_be_written_ends_nothing(plan, store, splits, make_config, tmp_path):
    (tmp_path / "run" / "heartbeat.json").mkdir(parents=True)
    result = fit_fold(plan, store, splits, make_config(max_epochs=1))
    assert torch.load(result.last_checkpoint, weights_only=True)["counts"]["epoch"] == 1
