"""Job scripts as text: what follows from plan and options, and that only options that exist stand in them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipeline.artifacts import write_artifact
from pipeline.cli import main, parse
from pipeline.errors import InputError
from pipeline.inference.prediction_memory import SEAM_BYTES
from pipeline.inference.predictor import Predictor
from pipeline.inference.window_batch import LARGEST_BATCH
from pipeline.job_scripts.jobs import MAX_SHARDS
from pipeline.job_scripts.memory import (
    _data_workers,
    _seam_bytes,
    evaluate_memory,
    predict_memory,
    preprocess_memory,
    train_memory,
)
from pipeline.job_scripts.writing import read_num_folds, read_patient_pattern, render_scripts, slurm
from pipeline.networks.unet import UNet
from pipeline.plan import GIB
from pipeline.preprocessing.score_resampling import ScoreResampling
from pipeline.slurm_config import SlurmConfig
from pipeline.synthetic import make_synthetic_case, write_msd_dataset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts" / "slurm"
JOBS = ("preprocess", "verify", "train", "predict", "evaluate")


def load_examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_examples", EXAMPLES / "make_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = load_examples()
PLAN, SIZES = MAKER.example_plan(), MAKER.SIZES


def scripts(**options: object) -> dict[str, str]:
    config = SlurmConfig(**{"dataset": "data", "plan": "work/plan.json", "work_dir": "work", **options})  # type: ignore[arg-type]
    return render_scripts(config, PLAN, SIZES, num_folds=5 if config.num_folds == "auto" else config.num_folds)


def directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def command(script: str, task: str = "1") -> list[str]:
    """The words of the command that a script ends with, as the shell makes them for an array task."""
    last = script.split("\nexec ", 1)[1]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {last}"],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": task},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip("\0").split("\0")


def gib(memory: str) -> int:
    return int(memory.removesuffix("G"))


# ---- the scripts


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


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("$TMPDIR", "/local/my job"),
        ("${TMPDIR}", "/local/my job"),
        ("/fast disk/$USER/voxfit", "/fast disk/it's me/voxfit"),
        ("$TMPDIR/it's; reboot", "/local/my job/it's; reboot"),
        ("/fast/voxfit", "/fast/voxfit"),
    ],
)
def test_the_folder_on_the_node_s_disk_is_filled_in_where_the_job_runs(
    given: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/local/my job")
    monkeypatch.setenv("USER", "it's me")
    words = command(scripts(stage_to=given)["train.sbatch"])
    assert parse(words[1:])[1].stage_to == folder
    assert all("stage_to" not in text for name, text in scripts(stage_to=given).items() if name != "train.sbatch")
    assert "stage_to" not in scripts()["train.sbatch"]


def test_a_folder_whose_variable_is_not_set_ends_the_script_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "voxfit").write_text("#!/bin/bash\necho started\n")
    (tmp_path / "voxfit").chmod(0o755)
    script = scripts(stage_to="$NODE_DISK/voxfit")["train.sbatch"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "0"}
    for extra, code, output in (({}, 1, ""), ({"NODE_DISK": "/x"}, 0, "started\n")):
        done = subprocess.run(
            ["bash", "-c", script], env={**environment, **extra}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, output)
        assert ("NODE_DISK" in done.stderr) == bool(code)


@pytest.mark.parametrize(("predict_input", "ensemble_after"), [("", []), ("new", ["afterok:3"])])
def test_submitting_chains_the_jobs_from_where_the_paths_start(
    tmp_path: Path, predict_input: str, ensemble_after: list[str]
) -> None:
    made = scripts(out="jobs/mine", predict_input=predict_input)
    (tmp_path / "jobs" / "mine").mkdir(parents=True)
    (tmp_path / "jobs" / "mine" / "submit.sh").write_text(made["submit.sh"])
    stub = tmp_path / "bin" / "sbatch"
    stub.parent.mkdir()
    # Answers as with several clusters, and fails at the job whose number stands in FAIL_AT.
    stub.write_text(
        '#!/bin/bash\necho "$PWD $*" >> "$CALLS"\nn=$(wc -l < "$CALLS")\n'
        '[ "$n" != "${FAIL_AT:-}" ] || exit 1\necho "$n;cluster"\n'
    )
    (stub.parent / "scancel").write_text('#!/bin/bash\necho "scancel $*" >> "$CALLS"\n')
    for program in stub.parent.iterdir():
        program.chmod(0o755)
    variables = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    script = tmp_path / "jobs" / "mine" / "submit.sh"
    subprocess.run(["bash", script, "--nice=5"], cwd="/", env=variables, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == f"{tmp_path} --parsable --nice=5 jobs/mine/preprocess.sbatch"
    after = ["afterany:1", "afterok:2", "afterok:3", "afterok:4", *ensemble_after]
    assert len(calls) == 1 + len(after)
    assert [re.findall(r"--dependency=(\S+) --kill-on-invalid-dep=yes", call) for call in calls[1:]] == [
        [dependency] for dependency in after
    ]
    assert (tmp_path / "work" / "logs").is_dir()
    (tmp_path / "calls").unlink()
    failed = subprocess.run(["bash", script], cwd="/", env={**variables, "FAIL_AT": "3"}, check=False)
    assert failed.returncode != 0
    assert (tmp_path / "calls").read_text().splitlines()[3:] == ["scancel 1 2"]


# ---- memory


def test_every_figure_says_where_it_comes_from() -> None:
    for name in JOBS:
        text = scripts()[f"{name}.sbatch"]
        (amount,) = re.findall(r"^#SBATCH --mem=(\d+G)$", text, re.MULTILINE)
        assert f"# {amount}: " in text
    assert "# 48G: as given." in scripts(memory="48G")["train.sbatch"]


def test_training_memory_counts_workers_pinned_memory_and_the_largest_case() -> None:
    base = gib(train_memory(PLAN, SIZES, cpus=8, on_gpu=True).amount)
    offloading = replace(PLAN, memory=replace(PLAN.memory, host_bytes=40 * GIB))
    assert gib(train_memory(offloading, SIZES, cpus=8, on_gpu=True).amount) == pytest.approx(base + 50, abs=1)
    assert "40.0 GiB pinned for offloading" in train_memory(offloading, SIZES, cpus=8, on_gpu=True).reason
    assert gib(train_memory(PLAN, SIZES, cpus=16, on_gpu=True).amount) > base
    classes = replace(PLAN, labels={f"class_{value}": value for value in range(118)})
    largest = gib(train_memory(classes, SIZES, cpus=8, on_gpu=True).amount)
    assert largest - base > 4 * 115 * SIZES.stored_voxels / GIB
    assert gib(train_memory(PLAN, SIZES, cpus=8, on_gpu=False).amount) > PLAN.memory.peak_bytes / GIB


def test_the_data_workers_are_those_that_training_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import allocation
    from pipeline.training import processes
    from pipeline.training.settings import _patch_bytes

    for cpus in (1, 2, 8, 64):
        monkeypatch.setattr(processes, "allotted_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr(allocation, "allotted_cpus", lambda cpus=cpus: cpus)
        for on_gpu in (True, False):
            memory = gib(train_memory(PLAN, SIZES, cpus=cpus, on_gpu=on_gpu).amount) * GIB
            monkeypatch.setattr(allocation, "allotted_memory_bytes", lambda memory=memory: memory)
            started = processes.share_cpus(
                num_threads="auto", num_workers="auto", on_gpu=on_gpu, batch_bytes=_patch_bytes(PLAN)
            )
            assert _data_workers(PLAN, cpus, on_gpu=on_gpu)[0] == started.num_workers


def test_the_other_jobs_follow_the_cases_and_the_workers() -> None:
    larger = replace(SIZES, native_voxels=2 * SIZES.native_voxels, preparing_bytes=2 * SIZES.preparing_bytes)
    for few, many in (
        (preprocess_memory(SIZES, num_workers=2), preprocess_memory(SIZES, num_workers=4)),
        (preprocess_memory(SIZES, num_workers=4), preprocess_memory(larger, num_workers=4)),
        (evaluate_memory(SIZES, num_workers=2), evaluate_memory(larger, num_workers=2)),
        (predict_memory(PLAN, SIZES, cpus=8, on_gpu=True), predict_memory(PLAN, larger, cpus=8, on_gpu=True)),
    ):
        assert gib(few.amount) < gib(many.amount)
    # What preprocessing itself would allow in such an allotment.
    allotted = gib(preprocess_memory(SIZES, num_workers=4).amount) * GIB
    assert int(0.8 * allotted) // SIZES.preparing_bytes >= 4


@pytest.mark.parametrize("shape", [(48, 20, 24), (31, 64, 17), (16, 12, 20)])
@pytest.mark.parametrize("tta_axes", [(), (1, 2)])
@pytest.mark.parametrize("num_classes", [3, 7])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_counting_seams_is_given_what_voxfit_predict_reckons_with(
    shape: tuple[int, int, int], tta_axes: tuple[int, ...], num_classes: int, on_gpu: bool, two_stages: Any
) -> None:
    classes = {f"class_{value}": value for value in range(num_classes)}
    plan = replace(PLAN, network=two_stages(), labels=classes, patch_size=(16, 12, 20))
    sizes, cpus = replace(SIZES, stored_voxels=prod(shape)), 6
    network, at_once = UNet(plan.num_channels, num_classes, plan.network), LARGEST_BATCH if on_gpu else cpus
    predictor = Predictor(network, plan, tta_axes=tta_axes, window_batch=at_once)
    predictor.count_seams = True
    reckoned = predictor.plan_memory(ScoreResampling(shape, shape)).parts["seams"]
    given = _seam_bytes(plan, sizes, cpus=cpus, on_gpu=on_gpu, mirrors=bool(tta_axes))
    if max(shape) == max(plan.patch_size):
        assert given == reckoned > 0
    assert reckoned <= given <= reckoned + SEAM_BYTES * prod(shape)


def test_a_job_asks_for_what_counting_seams_takes_and_more_where_windows_are_mirrored() -> None:
    plain = predict_memory(PLAN, SIZES, cpus=8, on_gpu=True, seams=True)
    mirrored = predict_memory(PLAN, SIZES, cpus=8, on_gpu=True, seams=True, mirrors=True)
    assert "0.2 GiB to count seams" in plain.reason
    # Float32 scores of three classes of 8 windows.
    sums = 4 * 3 * 8 * prod(PLAN.patch_size) / GIB
    assert f"{0.22 + sums:.1f} GiB to count seams" in mirrored.reason
    assert gib(mirrored.amount) - gib(plain.amount) == pytest.approx(sums / 0.8, abs=1)
    for tta in ("none", "mirror"):
        made = scripts(tta=tta, predict_input="new")
        wanted = {"none": plain, "mirror": mirrored}[tta]
        assert f"--mem={wanted.amount}" in directives(made["predict.sbatch"])
        assert f"# {wanted.amount}: " in made["predict.sbatch"]
        # It counts none.
        assert "seams" not in made["ensemble.sbatch"]
        assert f"--mem={predict_memory(PLAN, SIZES, cpus=8, on_gpu=True).amount}" in directives(made["ensemble.sbatch"])


# ---- options


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
