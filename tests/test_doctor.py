"""`voxfit doctor`: real commands on this machine, with things wrong on purpose, and real steps of a small training."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import pytest

from pipeline import __version__
from pipeline.cli import main, parse
from pipeline.config import DoctorConfig
from pipeline.doctor import folders, gpu, machine, slurm_job
from pipeline.doctor.apart import ApartError, run_apart
from pipeline.doctor.examination import conclude
from pipeline.doctor.facts import Fact, Section, find
from pipeline.doctor.parts import PARTS, Part, WholeJob
from pipeline.doctor.real_step import RealStep, typical_case
from pipeline.store import CaseStore

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_samples" / "msd_blobs"
ONE_EACH = ["--hardware.num_workers", "1", "--hardware.num_threads", "1"]
SMALL = ["--iterations_per_epoch", "6", "--num_folds", "2", *ONE_EACH]


def environment(**more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = os.pathsep.join(filter(None, [more.pop("first_in_path", ""), str(ROOT)]))
    return {**known, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def doctor(*arguments: str, cwd: Path, before: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """The command, after a line of shell."""
    command = [sys.executable, "-m", "pipeline", "doctor", *arguments]
    return subprocess.run(
        ["sh", "-c", f'{before or ":"}; exec "$@"', "sh", *command],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def found(*arguments: str, cwd: Path, code: int = 0, before: str = "", **more: str) -> dict[str, Any]:
    done = doctor(*arguments, "--json", cwd=cwd, before=before, **more)
    assert done.returncode == code, done.stderr
    return {**json.loads(done.stdout), "said": done.stderr}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, a store, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("planned")
    small = ["--vram", "1GiB", "--base_features", "4", "--max_features", "8", "--patch_size", "16", "24", "16"]
    data, plan = ["--dataset", str(SAMPLE), "--num_workers", "1"], str(folder / "plan.json")
    assert main(["plan", *data, "--out", plan, *small]) == 0
    assert main(["preprocess", *data, "--plan", plan, "--store", str(folder / "store")]) == 0
    (folder / "work").mkdir()
    return folder


STEP = ["--plan", "plan.json", "--store", "store", "--work_dir", "work", *SMALL]


def contents(folder: Path) -> dict[str, str]:
    """Every file by its name and what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# ---- what is there


def test_alone_it_says_what_this_machine_offers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = doctor(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("CPUs", "memory", "/dev/shm", "GPU", "SLURM", "work folder", "file locks", "torch", "HTJ2K"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_as_json_every_figure_is_one_a_program_can_use(tmp_path: Path) -> None:
    import pydicom
    import torch

    facts = found("--work_dir", str(tmp_path), cwd=tmp_path)["facts"]
    machine_facts, software = facts["CPUs and memory"], facts["software"]
    assert 1 <= machine_facts["CPUs"] <= len(os.sched_getaffinity(0))
    assert 0 < machine_facts["memory"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine_facts["open files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert machine_facts["terminal"] is False
    assert (software["packages"]["torch"], software["packages"]["pydicom"]) == (torch.__version__, pydicom.__version__)
    assert software["DICOM decoders"]["JPEG lossless"]
    assert facts["folders"]["file locks"] is True
    assert facts["folders"]["work folder writing"] > 0
    assert (facts["GPU"]["CUDA of torch"], facts["SLURM"]["job"]) == (torch.version.cuda, None)


def test_in_a_checkout_that_is_not_installed_commands_work_and_the_doctor_says_so(tmp_path: Path) -> None:
    for path in (path for folder in site.getsitepackages() for path in Path(folder).iterdir()):
        if "voxfit" not in path.name and not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    # The checkout itself may hold what an editable installation leaves behind.
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    script += "from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> str:
        command = [sys.executable, "-S", "-c", script, *arguments]
        known = {**environment(), "PYTHONPATH": ""}
        return subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True).stdout

    assert run("--version") == f"voxfit {__version__}\n"
    said = run("doctor")
    assert f"voxfit {__version__}" in said
    assert "voxfit is not installed" in said


@pytest.mark.parametrize(
    ("before", "variables", "advice"),
    [
        ("", {"OMP_NUM_THREADS": "640"}, "OMP_NUM_THREADS asks for 640 threads on "),
        ("ulimit -n 300", {}, "only 300 files may be open"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(
    tmp_path: Path, before: str, variables: dict[str, str], advice: str
) -> None:
    said = found(cwd=tmp_path, before=before, **variables)["advice"]
    assert any(line.startswith(advice) for line in said), said


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise OSError('libcudnn.so.9: cannot open shared object file')", "could not be found out (OSError: libcudnn"),
        ("import os; os.kill(os.getpid(), 11)", "cannot be used: the process was ended by SIGSEGV"),
    ],
)
def test_a_torch_that_does_not_load_ends_nothing(tmp_path: Path, torch: str, said: str) -> None:
    (tmp_path / "torch.py").write_text(torch)
    done = doctor(cwd=tmp_path, first_in_path=str(tmp_path))
    assert done.returncode == 0
    assert said in " ".join(done.stdout.split())
    assert "DICOM decoders" in done.stdout


def test_packages_that_are_missing_or_too_old_are_named(tmp_path: Path) -> None:
    old = tmp_path / "jinja2-0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: jinja2\nVersion: 0.1\n")
    assert [line for line in found(cwd=tmp_path, first_in_path=str(tmp_path))["advice"] if "jinja2" in line] == [
        'jinja2 0.1 is installed, and jinja2>=3.1 is required; pip install "jinja2>=3.1"'
    ]


def test_a_gpu_that_torch_cannot_use_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use a GPU here")
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12\n"
    )
    monkeypatch.setattr(gpu, "DRIVER", driver)
    assert next(gpu.find_gpu()).text == "550.54.15"
    facts = {fact.name: fact for fact in gpu.find_torch()}
    assert "there is an NVIDIA GPU, and torch" in facts["CUDA of torch"].advice
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = {fact.name: fact for fact in gpu.find_torch()}
    assert 'CUDA_VISIBLE_DEVICES is ""' in facts["CUDA of torch"].advice


def test_little_shared_memory_is_said_where_data_workers_would_end_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20))
    (fact,) = machine.find_shared_memory()
    assert fact.value == 64 * 2**20
    assert "docker --shm-size 8g" in fact.advice


def test_a_folder_that_cannot_be_written_is_a_fact(tmp_path: Path) -> None:
    """As on a full disk: this file system takes no file at all."""
    facts = {fact.name: fact for fact in folders.find_in_folder(Path("/proc"), timed=True)}
    assert "cannot be written" in facts["work folder writing"].advice


def test_one_thing_that_cannot_be_found_out_does_not_end_the_others() -> None:
    def broken() -> Iterator[Fact]:
        yield Fact(name="first", text="there")
        raise PermissionError("/proc is hidden\nfrom you")

    section = find("x", {"fan speed": broken, "other": lambda: iter([Fact(name="other", text="fine")])})
    assert [(fact.name, fact.text) for fact in section.facts] == [
        ("first", "there"),
        ("fan speed", "could not be found out (PermissionError: /proc is hidden)"),
        ("other", "fine"),
    ]


SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show job") echo "JobId=7 JobState=RUNNING Requeue={requeue} TimeLimit=12:00:00 EndTime=Unknown BatchFlag=1 {more}";;
  "write batch_script") printf '#!/bin/sh\\n#SBATCH --mem=1G\\n{signal}\\nexec voxfit train\\n';;
esac
"""


def slurm_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requeue: int, signal_line: str, more: str = ""
) -> dict[str, Fact]:
    script = tmp_path / "scontrol"
    script.write_text(SCONTROL.format(requeue=requeue, signal=signal_line, more=more))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time()) + 3600))
    return {fact.name: fact for fact in slurm_job.find_job()}


def test_a_slurm_job_is_described_with_its_time_its_signal_and_its_requeue(tmp_path, monkeypatch) -> None:
    facts = slurm_facts(tmp_path, monkeypatch, 1, "#SBATCH --signal=B:USR1@180")
    assert "7 in partition gpu" in facts["job"].text
    assert (facts["time limit"].value, facts["requeue"].value, facts["signal"].value) == (43200, True, 180)
    assert 3590 <= facts["time left"].value <= 3600
    assert not any(fact.advice for fact in facts.values())
    facts = slurm_facts(tmp_path, monkeypatch, 0, "")
    assert "submit with --requeue" in facts["requeue"].advice
    assert "--signal=B:USR1@180" in facts["signal"].advice


@pytest.mark.parametrize(("mem", "nodes", "mib"), [("300M", 1, 300), ("1.5G", 1, 1536), ("600M", 2, 300)])
def test_memory_that_slurm_granted_and_nothing_else_tells_of_is_said(tmp_path, monkeypatch, mem, nodes, mib) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    more = f"NumNodes={nodes} TRES=cpu=1,mem={mem},node={nodes},billing=1"
    facts = slurm_facts(tmp_path, monkeypatch, 1, "#SBATCH --signal=USR1", more)
    assert facts["signal"].value == 60
    assert facts["memory granted"].value == mib * 2**20
    assert f"export SLURM_MEM_PER_NODE={mib}" in facts["memory granted"].advice
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(mib))
    facts = slurm_facts(tmp_path, monkeypatch, 1, "", more)
    assert not facts["memory granted"].advice


def test_a_job_without_slurm_s_tools_is_described_as_far_as_its_variables_go(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    facts = {fact.name: fact for fact in slurm_job.find_job()}
    assert {facts[name].text for name in ("time limit", "time left", "requeue")} == {"not known"}


# ---- one real step


@pytest.fixture(scope="module")
def step(planned: Path) -> dict[str, Any]:
    """The answer to a step, with a run folder that holds something, and what the folders held before."""
    (planned / "run").mkdir()
    (planned / "run" / "log.txt").write_text("an older run\n")
    before = contents(planned)
    options = ["--run_dir", "run", "--max_epochs", "40", "--validate_every_n_epochs", "3"]
    answer = found(*STEP, *options, cwd=planned)
    return {**answer, "before": before, "after": contents(planned)}


def test_every_part_is_measured_and_nothing_of_it_is_kept(step: dict[str, Any]) -> None:
    parts = {part["name"]: part for part in step["parts"]}
    assert list(parts) == list(PARTS)
    for part in parts.values():
        assert not part["problem"]
        assert part["seconds"] > 0
    assert parts["sample"]["figures"]["patches_per_second"] == pytest.approx(1 / parts["sample"]["seconds"])
    # A process with torch in it takes more than one that only reads.
    assert 50 * 2**20 < parts["read"]["peak_ram_bytes"] < parts["train"]["peak_ram_bytes"] < 8 * 2**30
    assert step["after"] == step["before"]


def test_the_whole_job_is_the_sum_of_what_was_measured(step: dict[str, Any]) -> None:
    parts, job = {part["name"]: part["seconds"] for part in step["parts"]}, step["whole_job"]
    assert job["training_seconds"] == pytest.approx(40 * 6 * parts["train"])
    # After epochs 3, 6 ... 39 and after the last.
    num_held_out = len(list((SAMPLE / "labelsTr").glob("*.nii.gz"))) / 2
    assert job["validation_seconds"] == pytest.approx(14 * num_held_out * parts["validate"])
    assert job["saving_seconds"] == pytest.approx(40 * parts["save"])
    hours = (job["training_seconds"] + job["validation_seconds"] + job["saving_seconds"]) / 3600
    assert f"would take {hours:.2f} hours" in step["prospects"][0]


@pytest.mark.slow
def test_the_figures_are_those_of_a_training(step: dict[str, Any], planned: Path, tmp_path: Path) -> None:
    options = [
        "--plan",
        "plan.json",
        "--store",
        "store",
        "--run_dir",
        str(tmp_path / "run"),
        "--max_epochs",
        "1",
        *SMALL,
    ]
    subprocess.run([sys.executable, "-m", "pipeline", "train", *options], cwd=planned, env=environment(), check=True)
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    parts = {part["name"]: part for part in step["parts"]}
    assert parts["save"]["figures"]["checkpoint_bytes"] == pytest.approx(size, rel=0.1)
    row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    peak = int(dict(zip(row[0].split(","), row[1].split(","), strict=True))["peak_ram_bytes"])
    # What data workers hold is looked at in one moment only.
    assert parts["train"]["peak_ram_bytes"] == pytest.approx(peak, rel=0.5)


@pytest.mark.slow
def test_epochs_that_follow_from_the_time_fit_into_it(planned: Path) -> None:
    done = found(*STEP, "--fold", "all", "--max_epochs", "auto", "--max_time", "1h", cwd=planned)
    assert 0.8 * 3600 < done["whole_job"]["seconds"] < 3600
    assert {part["name"]: part["what"] for part in done["parts"]}["validate"] == "no cases are held out"
    assert "1 start(s) of 1h each (max_time 1h)" in done["prospects"][1]


def test_the_training_s_own_yaml_is_taken_as_it_is(planned: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / "train_default.yaml"
    _, options = parse(["doctor", "--config", str(config), "--plan", "p", "--store", "s", "--run_dir", "r"])
    _, train = parse(["train", "--config", str(config), "--plan", "p", "--store", "s", "--run_dir", "r"])
    assert options.training() == train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "p"], "plan: goes with store"),
        (["--work_dir", "no/such"], "work_dir no/such: is no folder"),
        (["--max_epochs", "auto"], "max_epochs: auto needs a max_time"),
        (["--fold", "9"], "fold: must be 0 to 4"),
        (["--plan", "no.json", "--store", "."], "is no store"),
    ],
)
def test_wrong_options_end_with_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options]) == 2
    assert message in capsys.readouterr().err


# ---- what goes wrong in a step


@pytest.fixture
def broken(planned: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in ("plan.json", "store", "work"):
        source = planned / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    return tmp_path


def problems(answer: dict[str, Any]) -> dict[str, str]:
    return {part["name"]: part["problem"] for part in answer["parts"] if part["problem"]}


def test_damaged_cases_are_named_and_the_machine_is_described_all_the_same(broken: Path) -> None:
    for path in (broken / "store" / "cases").glob("*.image.b2nd"):
        path.write_bytes(path.read_bytes()[:-10])
    answer = found(*STEP, cwd=broken, code=3)
    assert set(problems(answer)) == {"read", "sample", "train", "save", "validate"}
    assert "is damaged" in problems(answer)["read"]
    assert "is damaged" in problems(answer)["sample"]
    assert problems(answer)["train"] == "not reached"
    assert answer["facts"]["CPUs and memory"]["CPUs"] >= 1
    assert "the machine was examined without 2 part(s) of the step:\n  read: " in answer["said"]
    assert answer["whole_job"] is None
    assert list((broken / "work").iterdir()) == []


def test_a_disk_that_takes_no_checkpoint_fails_the_save(broken: Path) -> None:
    # Blocks of 512 or 1024 bytes: room for the small files of a run, and not for weights.
    answer = found(*STEP, cwd=broken, code=3, before="ulimit -f 60")
    assert list(problems(answer)) == ["train", "save", "validate"]
    assert "cannot write (File too large)" in problems(answer)["save"]
    assert problems(answer)["train"] == problems(answer)["validate"] == "not reached"
    assert any("cannot be written (File too large)" in line for line in answer["advice"])
    assert list((broken / "work").iterdir()) == []


def test_a_validation_that_fails_is_told_from_the_training_before_it(broken: Path) -> None:
    hook = "import pipeline.training.validation as v, os\n"
    hook += "def _segment(*_): os.kill(os.getpid(), 9)\nv.Validator._segment = _segment\n"
    answer = found(*STEP, cwd=broken, code=3, first_in_path=str(hooked(broken, "training", hook)))
    assert problems(answer)["validate"].startswith("the process was ended by SIGKILL (as the kernel and SLURM do")
    assert "save" in problems(answer)
    assert list((broken / "work").iterdir()) == []


def hooked(folder: Path, module: str, code: str) -> Path:
    """A folder whose `sitecustomize` changes something in the process that runs one module of the doctor."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import sys\nif 'pipeline.doctor.{module}' in sys.orig_argv:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
    )
    return hook


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_step_that_is_stopped_ends_with_75_and_leaves_nothing(broken: Path, number: int) -> None:
    command = [sys.executable, "-m", "pipeline", "doctor", *STEP]
    process = subprocess.Popen(
        command, cwd=broken, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    end = monotonic() + 90
    while not list((broken / "work").glob(".doctor.*/run/heartbeat.json")):
        assert monotonic() < end
        assert process.poll() is None
        sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert list((broken / "work").iterdir()) == []


def test_a_process_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent.py").write_text("import time\nprint('one', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = run_apart("silent", timeout_seconds=2)
    assert next(lines) == "one\n"
    with pytest.raises(ApartError, match="no answer within 2 seconds"):
        list(lines)


# ---- what it means for the whole job


JOB = WholeJob(
    epochs=10,
    training_seconds=9 * 3600.0,
    validation_seconds=3000.0,
    saving_seconds=600.0,
    ends_within_seconds=100.0,
    device="cpu",
    precision="32-true",
)


def concluded(facts: dict[str, Any], *parts: Part, job: WholeJob | None = JOB, **options: Any):
    known = {part.name: part for part in parts}
    step = RealStep(tuple(known.get(name, Part(name=name)) for name in PARTS), job)
    section = Section("x", tuple(Fact(name=name, text="", value=value) for name, value in facts.items()))
    return conclude(DoctorConfig(**options), (section,), step)


@pytest.mark.parametrize(("limit", "starts"), [("12h", 1), ("10h", 2), ("90m", 7), ("3h", 4)])
def test_starts_are_counted_with_what_each_leaves_for_its_save(limit: str, starts: int) -> None:
    said = concluded({}, max_time=limit).prospects
    assert "10.00 hours (training 9h, validations 50m, saves 10m)" in said[0]
    assert said[1].startswith(f"that is {starts} start(s) of {limit.replace('90m', '1h30m')} each")


def test_under_slurm_the_job_s_own_limit_and_what_is_left_of_it_count() -> None:
    said = concluded({"time limit": 6 * 3600, "time left": 5 * 3600, "signal": 60})
    assert said.prospects[1:] == (
        f"that is {math.ceil(36000 / (6 * 3600 - 100))} start(s) of 6h each (the job's time limit)",
        "it does not fit into the 5h that are left of this job",
    )
    assert "the signal comes 60 s before the time limit, and a step and a save take 1m40s" in said.advice[0]
    fits = concluded({"time limit": 86400, "time left": 80000, "signal": 180})
    assert fits.prospects[-1] == "it fits into the 22h13m that are left of this job"
    assert fits.advice == ()


def test_peaks_near_what_was_allotted_are_said() -> None:
    gib = 2**30
    train = Part(name="train", peak_ram_bytes=15 * gib, figures={"measured_bytes": 23.0 * gib})
    sample = Part(name="sample", figures={"shared_bytes": 2.0 * gib})
    facts = {"memory": 16 * gib, "GPU 0": {"total_bytes": 24 * gib}, "/dev/shm": gib}
    ram, vram, shared = concluded(facts, train, sample).advice
    assert ram == "the step took 15.0 GiB of memory, 16.0 GiB are allotted; ask for more (SLURM: --mem)"
    assert vram.startswith("the step took 23.0 GiB of the GPU's 24.0 GiB")
    assert shared.startswith("patches of the data workers may take 2.0 GiB of /dev/shm, which has 1.0 GiB free")
    less = replace(train, peak_ram_bytes=8 * gib, figures={"measured_bytes": 12.0 * gib})
    assert concluded({**facts, "/dev/shm": 8 * gib}, less, sample).advice == ()


def test_the_case_that_stands_for_the_others_is_of_the_mean_size(planned: Path) -> None:
    store = CaseStore(planned / "store")
    voxels = {case_id: math.prod(store.record(case_id).shape) for case_id in store.case_ids}
    assert len(set(voxels.values())) > 1
    mean = sum(voxels.values()) / len(voxels)
    chosen = typical_case(store, store.case_ids)
    assert all(abs(voxels[chosen] - mean) <= abs(count - mean) for count in voxels.values())
