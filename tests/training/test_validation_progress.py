"""A validation that is left goes on case by case, to the same scores bit by bit, however short the starts are."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import stop_signals
from pipeline.config import OptimConfig, TrainConfig
from pipeline.datasets.splits import make_splits
from pipeline.errors import InputError, StoppedError
from pipeline.networks.unet import UNet
from pipeline.store import CaseStore
from pipeline.training.checkpoints import CheckpointWriter
from pipeline.training.run_folder import RunFolder
from pipeline.training.trainer import fit_fold
from pipeline.training.validation import Validator
from pipeline.training.validation_progress import ScoredCases, ValidationProgress, validation_key

NUM_CASES = 3
OPTIONS = {"max_epochs": 2, "validate_every_n_epochs": 2, "optim": OptimConfig(name="adamw", ema_decay=0.9)}


@pytest.fixture(scope="module")
def halves(store):
    """Two folds of three cases."""
    return make_splits({case_id: case_id for case_id in CaseStore(store).case_ids}, num_folds=2, seed=0)


class Network(UNet):
    """The plan's U-Net, whose passes in training may take their time."""

    def __init__(self, plan, *, seconds: float = 0.0) -> None:
        torch.manual_seed(5)
        super().__init__(plan.num_channels, plan.num_classes, plan.network, fused_head=True)
        self.seconds = seconds

    def forward(self, x):
        sleep(self.seconds if self.training else 0)
        return super().forward(x)


@pytest.fixture
def train(plan, store, halves, make_config):
    def start(config: TrainConfig | None = None, *, seconds: float = 0.0):
        config = config or make_config(**OPTIONS)
        return fit_fold(plan, store, halves, config, network=Network(plan, seconds=seconds))

    return start


@pytest.fixture(scope="module")
def whole(plan, store, halves, config_in, tmp_path_factory) -> Path:
    config = config_in(tmp_path_factory.mktemp("whole"), **OPTIONS)
    return fit_fold(plan, store, halves, config, network=Network(plan)).run_dir


@pytest.fixture
def segmented(monkeypatch):
    """Counts the cases that are segmented; before the one of number `stop_at` it does `what`, each takes `seconds`."""

    class Watch:
        count, stop_at, seconds = 0, 0, 0.0

        def what(self) -> None:
            raise KeyboardInterrupt

    watch, real = Watch(), Validator._segment

    def segment(self, network, image, device):
        watch.count += 1
        if watch.count == watch.stop_at:
            watch.what()
        for _ in range(round(watch.seconds / 0.05)):
            sleep(0.05)
            self.request.check()
        return real(self, network, image, device)

    monkeypatch.setattr(Validator, "_segment", segment)
    return watch


def progress_of(run_dir: str | Path, name: str = "validation_progress.json") -> dict:
    return json.loads((Path(run_dir) / name).read_text())


def results_of(run_dir: str | Path) -> dict:
    return json.loads(RunFolder(Path(run_dir)).record.read_text())["validation"]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_only_the_cases_that_an_interrupted_validation_lacks_are_segmented(
    train, make_config, whole, assert_same_run, segmented, stop_at
):
    segmented.stop_at = stop_at
    with pytest.raises(StoppedError):
        train()
    run_dir = make_config().run_dir
    if stop_at > 1:
        assert len(progress_of(run_dir)["by_case"]) == stop_at - 1
    segmented.count, segmented.stop_at = 0, 0
    result = train()
    assert segmented.count == NUM_CASES - (stop_at - 1)
    assert_same_run(result.run_dir, whole)
    assert results_of(result.run_dir) == results_of(whole)
    assert not RunFolder(result.run_dir).validation_progress.exists()


def test_a_training_killed_after_its_validation_validates_no_case_again(
    train, make_config, whole, assert_same_run, segmented, monkeypatch
):
    class PowerCutError(Exception):
        """The machine went down."""

    def cut(self, *_):
        raise PowerCutError

    config = make_config(**{**OPTIONS, "validate_every_n_epochs": 1, "max_epochs": 1})
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "on_train_epoch_end", cut)
        with pytest.raises(PowerCutError):
            train(config)
    assert segmented.count == NUM_CASES
    train(config)
    assert segmented.count == NUM_CASES


def test_a_killed_process_goes_on_with_the_cases_it_lacks(trainings, undisturbed, assert_same_run, tmp_path, segmented):
    segmented.stop_at, segmented.what = 2, lambda: os.kill(os.getpid(), 9)
    process = trainings.start(tmp_path / "run")
    process.join()
    assert process.exitcode == -9
    assert len(progress_of(tmp_path / "run")["by_case"]) == 1
    segmented.stop_at = 0
    trainings.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_validation_that_takes_longer_than_max_time_is_done_over_several_starts(
    train, make_config, whole, assert_same_run, segmented
):
    """A case takes 1.5 s, so that three do not fit into 4 s, and one or two do."""
    segmented.seconds, starts = 1.5, 0
    config = make_config(**OPTIONS, max_time="4s")
    while starts < 12:
        starts += 1
        try:
            result = train(config)
            break
        except StoppedError as stop:
            assert "max_time 4s is up" in str(stop)  # noqa: PT017
    assert 2 <= starts < 12
    assert_same_run(result.run_dir, whole)
    assert results_of(result.run_dir) == results_of(whole)
    # A case that the time ran out in was begun twice.
    assert NUM_CASES <= segmented.count <= NUM_CASES + starts - 1


def test_a_validation_of_all_cases_at_the_end_keeps_to_the_time_too(train, make_config, segmented):
    options = {**OPTIONS, "max_validation_cases": 1}
    expected = results_of(train(make_config("expected", **options)).run_dir)
    segmented.seconds, segmented.count, starts = 2.2, 0, 0
    while starts < 12:
        starts += 1
        try:
            result = train(make_config(**options, max_time="4s"))
            break
        except StoppedError as stop:
            assert "max_time 4s is up" in str(stop)  # noqa: PT017
    # One case a start.
    assert 4 <= starts < 12
    assert results_of(result.run_dir) == expected
    assert len(expected) == NUM_CASES


def test_a_case_that_takes_longer_than_max_time_is_an_error_and_no_stop_for_ever(train, make_config, segmented):
    segmented.seconds = 60.0
    with pytest.raises(StoppedError):
        train(make_config(**OPTIONS, max_time="3s"))
    message = r"max_time 3s is up: it ended; 1 of 2 epochs .* before one .* validation case was done\. Give more"
    with pytest.raises(InputError, match=message) as raised:
        train(make_config(**OPTIONS, max_time="3s"))
    assert raised.value.exit_code == 2
    segmented.seconds = 0.0
    assert train(make_config(**OPTIONS)).counts.epoch == 2


def test_an_optimiser_step_that_takes_longer_than_max_time_is_an_error_too(train, make_config, monkeypatch):
    monkeypatch.setattr(stop_signals, "PATIENCE_SECONDS", 0.1)
    config = make_config(**OPTIONS, max_time="2s", effective_batch=8)
    with pytest.raises(InputError, match=r"max_time 2s is up: it ended; 0 of 2 epochs .* before one optimiser step"):
        train(config, seconds=1.5)


@pytest.mark.parametrize("damage", ["other weights", "torn", "other scores of another version"])
def test_a_file_that_is_of_other_weights_or_damaged_counts_for_nothing(
    train, make_config, whole, assert_same_run, segmented, damage
):
    segmented.stop_at = 3
    with pytest.raises(StoppedError):
        train()
    path = RunFolder(Path(make_config().run_dir)).validation_progress
    values = json.loads(path.read_text())
    values["by_case"] = {case_id: [0.5, 0.5] for case_id in values["by_case"]}
    if damage == "other weights":
        values["key"] = "0" * 16
    elif damage == "other scores of another version":
        values["schema_version"] = 99
    path.write_text(json.dumps(values)[: 40 if damage == "torn" else None])
    segmented.count, segmented.stop_at = 0, 0
    result = train()
    assert segmented.count == NUM_CASES
    assert_same_run(result.run_dir, whole)


def test_scores_come_back_as_they_were_and_nothing_but_scores_of_the_key(tmp_path):
    rng, scores = np.random.default_rng(0), {}
    cases = ScoredCases(tmp_path / "progress.json", "a")
    for index in range(20):
        drawn = rng.random(3)
        scores[f"case_{index}"] = (float(drawn[0]), math.nan, float(np.nextafter(drawn[1], 1)))
        cases.add(f"case_{index}", scores[f"case_{index}"], seconds=0.5)
    found = ScoredCases(tmp_path / "progress.json", "a")
    assert found.seconds == 10.0
    assert list(found.by_case) == list(scores)
    for case_id, expected in scores.items():
        assert np.array_equal(found.by_case[case_id], expected, equal_nan=True)
    assert ScoredCases(tmp_path / "progress.json", "b").by_case == {}
    assert ScoredCases(None, "a").by_case == {}
    assert ValidationProgress(key="a").by_case == {}


def test_a_file_that_cannot_be_written_ends_no_validation(tmp_path):
    (tmp_path / "file").write_text("")
    cases = ScoredCases(tmp_path / "file" / "progress.json", "a")
    cases.add("case", (1.0,), seconds=1.0)
    assert cases.by_case == {"case": (1.0,)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_key_follows_every_bit_of_the_weights_and_every_fact(dtype):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(2, 3, (1, 3, 2)), nn.BatchNorm3d(3)).to(dtype)

    key = validation_key(network(), (8, 8, 8), {"a": "1"})
    assert key == validation_key(network(), (8, 8, 8), {"a": "1"})
    keys = {key, validation_key(network(), (8, 8, 4), {"a": "1"}), validation_key(network(), (8, 8, 8), {"a": "2"})}
    for name in ("0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"):
        changed = network()
        value = changed.state_dict()[name].reshape(-1).view(torch.uint8)
        value[0] ^= 1
        keys.add(validation_key(changed, (8, 8, 8), {"a": "1"}))
    assert len(keys) == 7


def test_a_validator_without_a_file_scores_as_one_with(plan, store, tmp_path):
    cases = {"store_folder": store, "case_ids": CaseStore(store).case_ids, "num_classes": plan.num_classes}
    plain = Validator(**cases, patch_size=plan.patch_size)
    keeping = Validator(**cases, patch_size=plan.patch_size, progress=tmp_path / "progress.json")
    network = Network(plan)
    how = {"device": torch.device("cpu"), "forward_context": nullcontext}
    expected = plain.score(network, **how)
    for _ in range(2):
        found = keeping.score(network, **how)
        assert list(found.by_case) == list(expected.by_case)
        assert np.array_equal([*found.by_case.values()], [*expected.by_case.values()], equal_nan=True)
    # Means are summed up in the order of the cases, whatever the order in which they became known.
    values = progress_of(tmp_path, name="progress.json")
    values["by_case"] = dict(reversed(values["by_case"].items()))
    (tmp_path / "progress.json").write_text(json.dumps(values))
    assert list(keeping.score(network, **how).by_case) == list(expected.by_case)
    # A subset is a validation of its own.
    assert list(keeping.limited_to(2).score(network, **how).by_case) == list(expected.by_case)[:2]
