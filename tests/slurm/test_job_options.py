"""Options of job scripts: what is taken from the training's own file, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import write_artifact
from pipeline.cli import main, parse
from pipeline.config import SlurmConfig
from pipeline.errors import InputError
from pipeline.job_scripts.writing import read_num_folds, read_patient_pattern, render_scripts, slurm
from pipeline.synthetic import make_synthetic_case, write_msd_dataset
from tests.slurm.conftest import PLAN, ROOT, SIZES, command, scripts


def test_folds_come_from_the_options_or_the_training_s_file(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("num_folds: 3\n")
    assert read_num_folds(SlurmConfig(dataset="d")) == 5
    assert read_num_folds(SlurmConfig(dataset="d", train_config=str(path))) == 3
    assert read_num_folds(SlurmConfig(dataset="d", train_config=str(path), num_folds=4)) == 4
    for text in ("[1, 2", "num_folds: many", "- a list"):
        path.write_text(text)
        with pytest.raises(InputError, match="holds no options of a training"):
            read_num_folds(SlurmConfig(dataset="d", train_config=str(path)))


def test_the_evaluation_tells_patients_as_the_training_does(tmp_path: Path) -> None:
    path, pattern = tmp_path / "train.yaml", r"^(it's p\d+)_$x"
    path.write_text(yaml.safe_dump({"patient_pattern": pattern, "num_folds": None}))
    config = SlurmConfig(dataset="d", train_config=str(path))
    assert read_patient_pattern(config) == pattern
    assert read_num_folds(config) == 5
    made = render_scripts(config, PLAN, SIZES, num_folds=5, patient_pattern=pattern)
    name, evaluation = parse(command(made["evaluate.sbatch"])[1:])
    assert (name, evaluation.patient_pattern) == ("evaluate", pattern)
    for other in (SlurmConfig(dataset="d"), replace(config, train_config=str(tmp_path / "none.yaml"))):
        if other.train_config:
            Path(other.train_config).write_text("patient_pattern:\n")
        assert read_patient_pattern(other) == ""
    assert "--patient_pattern" not in scripts()["evaluate.sbatch"]


def test_the_pattern_in_the_training_s_file_reaches_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_msd_dataset(tmp_path / "data", {"a": make_synthetic_case(0, shape=(24, 20, 18), spacing=(1, 1, 1))})
    write_artifact(tmp_path / "plan.json", PLAN)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"patient_pattern": r"(\w+)_\d"}))
    monkeypatch.chdir(tmp_path)
    slurm(SlurmConfig(dataset="data", train_config="train.yaml"))
    words = command((tmp_path / "jobs" / "evaluate.sbatch").read_text())
    assert words[words.index("--patient_pattern") + 1] == r"(\w+)_\d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "a day"}, "time: must be as in 90, 04:00:00"),
        ({"memory": "lots"}, "memory: must be as in 48G"),
        ({"gpus": -1, "nodes": 0}, "nodes: must be at least 1, got 0; gpus: must be at least 0, got -1"),
        ({"partition": "gpu; reboot"}, "partition: must be a name"),
        ({"stage_to": "$(reboot)"}, "stage_to: may hold variables such as $TMPDIR and no other $ or `, got $(reboot)"),
        ({"stage_to": "`reboot`"}, "stage_to: may hold variables"),
        ({"extra": "-C gpu;x"}, "extra: must be as in constraint=a100 mail-type=FAIL, got -C gpu;x"),
        ({"shards": 0, "cpus": 0}, "cpus: must be at least 1, got 0; shards: must be at least 1"),
    ],
)
def test_options_that_would_break_a_script_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        SlurmConfig(dataset="d", **options)  # type: ignore[arg-type]


def test_a_missing_plan_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset, out = str(ROOT / "data_samples" / "msd_blobs"), str(tmp_path / "o")
    assert main(["slurm", "--dataset", dataset, "--plan", str(tmp_path / "p.json"), "--out", out]) == 2
    assert "p.json: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
