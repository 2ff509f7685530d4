"""Job scripts as text: what follows from plan and options, and that only options that exist stand in them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import write_artifact
from pipeline.cli import main, parse
from pipeline.config import SlurmConfig
from pipeline.job_scripts.jobs import MAX_SHARDS
from pipeline.job_scripts.writing import render_scripts
from tests.slurm.conftest import EXAMPLES, JOBS, MAKER, PLAN, ROOT, SIZES, command, directives, scripts


def test_the_examples_are_what_voxfit_slurm_writes_now() -> None:
    for name, text in MAKER.examples().items():
        assert (EXAMPLES / name).read_text() == text, f"python scripts/slurm/make_examples.py: {name}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataset": "my data/it's", "work_dir": "a b/work $x", "plan": "a b/plan;.json", "out": "jobs of 'mine'"},
        {"gpus": 0, "train_config": "configs/train $1.yaml", "num_folds": 3, "max_epochs": 7, "shards": 3},
        {"out": "/absolute/jobs", "setup": "module load python\nsource .venv/bin/activate"},
    ],
)
def test_every_script_is_sound_and_its_command_is_one_that_voxfit_takes(
    options: dict[str, object], tmp_path: Path
) -> None:
    made = scripts(**options)
    assert list(made) == [*(f"{name}.sbatch" for name in JOBS), "submit.sh"]
    for name, text in made.items():
        (tmp_path / name).write_text(text)
        subprocess.run(["bash", "-n", tmp_path / name], check=True)
        assert text.startswith("#!/usr/bin/env bash\n")
        assert text.endswith("\n")
    for name in JOBS:
        program, *arguments = command(made[f"{name}.sbatch"])
        arguments = [word for word in arguments if "config" not in word and "configs/" not in word]
        assert program == "voxfit"
        parsed, config = parse(arguments)
        assert parsed == {"verify": "preprocess"}.get(name, name)
        work = str(options.get("work_dir", "work"))
        folders = {"train": "run_dir", "predict": "run_dir", "evaluate": "predictions"}
        assert getattr(config, folders.get(name, "store")).startswith(f"{work}/")


def test_seams_are_counted_for_the_report_as_in_a_run_and_not_where_there_is_none() -> None:
    made = scripts(predict_input="new/images")
    assert parse(command(made["predict.sbatch"])[1:])[1].seams
    assert not parse(command(made["ensemble.sbatch"])[1:])[1].seams


@pytest.mark.parametrize("tta", ["none", "mirror"])
def test_held_out_cases_and_new_images_are_mirrored_alike_and_only_on_request(tta: str) -> None:
    made = scripts(predict_input="new/images", tta=tta)
    for name in ("predict", "ensemble"):
        assert parse(command(made[f"{name}.sbatch"])[1:])[1].tta == tta
    assert all("tta" not in text for name, text in made.items() if name not in ("predict.sbatch", "ensemble.sbatch"))
    assert scripts()["predict.sbatch"] == scripts(tta="none")["predict.sbatch"]


def test_new_images_are_segmented_with_all_folds_as_one() -> None:
    made = scripts(num_folds=3, predict_input="it's new/images", work_dir="a b/work", gpus=0)
    assert list(made) == [*(f"{name}.sbatch" for name in (*JOBS, "ensemble")), "submit.sh"]
    name, config = parse(command(made["ensemble.sbatch"])[1:])
    assert (name, config.run_dirs) == ("predict", ("a b/work/fold_0", "a b/work/fold_1", "a b/work/fold_2"))
    assert (config.input, config.output, config.accelerator) == ("it's new/images", "a b/work/ensemble", "cpu")
    assert (config.cases, config.postprocess) == ("all", "auto")
    lines = directives(made["ensemble.sbatch"])
    assert "--nodes=1 --ntasks=1" in lines
    assert not any(line.startswith("--array") for line in lines)
    assert "--gres=gpu:1" in directives(scripts(predict_input="new")["ensemble.sbatch"])
    assert "ensemble" not in "".join(scripts().values())


def test_images_that_are_not_there_are_found_out_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_artifact(tmp_path / "plan.json", PLAN)
    dataset, out = str(ROOT / "data_samples" / "msd_blobs"), str(tmp_path / "o")
    words = ["slurm", "--dataset", dataset, "--plan", str(tmp_path / "plan.json"), "--out", out]
    assert main([*words, "--predict_input", str(tmp_path / "none")]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_array_tasks_are_shares_and_folds() -> None:
    made = scripts(num_folds=3, shards=4)
    assert "--array=1-4" in directives(made["preprocess.sbatch"])
    assert parse(command(made["preprocess.sbatch"], "4")[1:])[1].share == (4, 4)
    for name in ("train", "predict"):
        assert "--array=0-2" in directives(made[f"{name}.sbatch"])
    config = parse(command(made["train.sbatch"], "2")[1:])[1]
    assert (config.fold, config.run_dir) == (2, "work/fold_2")
    config = parse(command(made["predict.sbatch"], "2")[1:])[1]
    assert (config.run_dir, config.cases) == ("work/fold_2", "held_out")
    assert parse(command(made["verify.sbatch"])[1:])[1].verify


@pytest.mark.parametrize(("cases", "shards"), [(1, 1), (8, 1), (9, 2), (120, 15), (5000, MAX_SHARDS)])
def test_shares_follow_the_number_of_cases(cases: int, shards: int) -> None:
    config = SlurmConfig(dataset="data")
    made = render_scripts(config, PLAN, replace(SIZES, num_cases=cases), num_folds=5)
    assert f"--array=1-{shards}" in directives(made["preprocess.sbatch"])


def test_what_is_given_stands_in_every_script() -> None:
    made = scripts(account="lab", partition="gpu,long", qos="high", extra="mail-type=FAIL --constraint=a100 exclusive")
    for name in JOBS:
        wanted = {
            "--account=lab",
            "--partition=gpu,long",
            "--qos=high",
            "--mail-type=FAIL",
            "--constraint=a100",
            "--exclusive",
        }
        assert {*wanted, "--requeue", "--open-mode=append"} <= set(directives(made[f"{name}.sbatch"]))
    plain = scripts()
    assert not re.search("account|partition|qos", " ".join(directives(plain["train.sbatch"])))


def test_a_gpu_is_asked_for_where_the_network_runs_and_only_there() -> None:
    made = scripts(gpu_type="a100", cpus=12)
    for name in JOBS:
        lines = directives(made[f"{name}.sbatch"])
        assert ("--gres=gpu:a100:1" in lines) == (name in ("train", "predict")), name
    assert "--cpus-per-task=12" in directives(made["train.sbatch"])
    assert parse(command(made["train.sbatch"])[1:])[1].hardware.accelerator == "gpu"
    on_cpu = scripts(gpus=0)
    assert "gres" not in "".join(on_cpu.values())
    assert parse(command(on_cpu["train.sbatch"])[1:])[1].hardware.accelerator == "cpu"


def test_several_gpus_are_a_process_each_that_srun_starts_and_signals() -> None:
    made = scripts(gpus=4, nodes=2, cpus=6, gpu_type="a100")
    lines = directives(made["train.sbatch"])
    assert {"--nodes=2 --ntasks-per-node=4", "--cpus-per-task=6", "--gres=gpu:a100:4", "--signal=USR1@180"} <= set(
        lines
    )
    assert "exec srun --kill-on-bad-exit=0 --wait=120 --cpus-per-task=6 voxfit train" in made["train.sbatch"]
    one = directives(scripts(gpus=1, cpus=6)["train.sbatch"])
    memory = [int(next(line for line in each if line.startswith("--mem="))[6:-1]) for each in (lines, one)]
    assert 3 * memory[1] < memory[0] <= 4 * memory[1]
    for name in ("preprocess", "verify", "predict", "evaluate"):
        assert "--nodes=1 --ntasks=1" in directives(made[f"{name}.sbatch"])
        assert "srun" not in made[f"{name}.sbatch"]
    assert "--gres=gpu:a100:1" in directives(made["predict.sbatch"])


def test_the_signal_goes_to_the_process_that_takes_the_shell_s_place() -> None:
    made = scripts(signal_seconds=240, time="08:00:00", short_time="30")
    assert {"--signal=B:USR1@240", "--time=08:00:00"} <= set(directives(made["train.sbatch"]))
    assert "--time=30" in directives(made["verify.sbatch"])
    for name in JOBS:
        last = [line for line in made[f"{name}.sbatch"].splitlines() if not line.startswith((" ", "#"))][-1]
        assert last.startswith("exec voxfit ")


def test_options_of_the_training_are_handed_on_only_where_they_were_given() -> None:
    text = scripts()["train.sbatch"]
    assert not re.search("max_epochs|num_folds|config", text.split("exec", 1)[1])
    words = command(scripts(train_config="t.yaml", max_epochs=9, num_folds=3)["train.sbatch"])
    assert words[words.index("--config") + 1] == "t.yaml"
    assert words[words.index("--max_epochs") + 1] == "9"
    assert words[words.index("--num_folds") + 1] == "3"
