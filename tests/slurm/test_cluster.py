"""On a real SLURM of this one machine: scripts that it takes, jobs that stop and go on, and a cross-validation.

All tests that need it are in this file, because the test processes share out files.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "scripts" / "slurm" / "start_local_cluster.sh"
PAGE = ROOT / "docs" / "slurm.md"
MARK = "<!-- run by tests/slurm/test_cluster.py -->\n"
CANNOT_RUN_HERE = 69
SAMPLES = ROOT / "data_samples" / "msd_blobs"
NUM_CASES = len(list((SAMPLES / "imagesTr").glob("*.nii.gz")))


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and how to talk to it."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, folder: Path, *, code: int = 0, **variables: str) -> str:
        """What a bash command prints; it has to end with `code`."""
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def wait(self, folder: Path, seconds: float = 150.0) -> None:
        """Until no job waits or runs."""
        end = time.monotonic() + seconds
        while self.run("squeue --noheader", folder):
            assert time.monotonic() < end, self.run("squeue --format='%i %j %T %r'; tail -n 5 work/logs/*", folder)
            time.sleep(0.3)

    def states(self, folder: Path, jobs: dict[str, str]) -> dict[str, set[str]]:
        """The states of each job's tasks, by its name."""
        return {
            name: set(re.findall(r"JobState=(\w+)", self.run(f"scontrol show job --oneliner {number}", folder)))
            for name, number in jobs.items()
        }


@contextmanager
def started(environment: dict[str, str], *options: str) -> Iterator[Cluster]:
    """A cluster while the context is open."""
    # Not in pytest's folder: the name of a socket has to be short.
    folder = Path(tempfile.mkdtemp(prefix="voxfit-"))
    variables = {**environment, "TMPDIR": str(folder)}
    done = subprocess.run(["bash", START, *options], env=variables, capture_output=True, text=True, check=False)
    try:
        if done.returncode == CANNOT_RUN_HERE:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        state = folder / "voxfit-slurm"
        yield Cluster(state, {**variables, "SLURM_CONF": str(state / "slurm.conf")})
    finally:
        subprocess.run(["bash", START, "--stop"], env=variables, check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    with started(environment, "--gpus", "1") as running:
        yield running


@pytest.fixture(scope="module")
def planned(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the samples and a plan for them, to be copied."""
    folder = tmp_path_factory.mktemp("planned")
    shutil.copytree(SAMPLES, folder / "data")
    options = "--vram 1GiB --base_features 8 --patch_size 16 16 16 --num_workers 1"
    cluster.run(f"voxfit plan --dataset data --out work/plan.json {options}", folder)
    return folder


def submitted(output: str) -> dict[str, str]:
    """Job numbers by name, as submit.sh prints them."""
    return dict(re.findall(r"^(\w+) (\d+)$", output, re.MULTILINE))


def write_scripts(cluster: Cluster, folder: Path, options: str = "--gpus 0 --cpus 1 --num_folds 2") -> None:
    cluster.run(f"voxfit slurm --dataset data --plan work/plan.json --work_dir work {options}", folder)


def test_starting_it_again_changes_nothing(cluster: Cluster) -> None:
    before = (cluster.folder / "slurmctld.pid").read_text()
    done = subprocess.run(["bash", START], env=cluster.environment, capture_output=True, text=True, check=True)
    assert "running already" in done.stdout
    assert (cluster.folder / "slurmctld.pid").read_text() == before


def test_it_says_why_it_cannot_run(cluster: Cluster, tmp_path: Path) -> None:
    without = {**cluster.environment, "PATH": str(tmp_path)}
    for program in ("bash", "nproc", "env", "realpath", "awk", "uname", "id"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    for name, options, code, message in (
        ("nothing installed", ["--folder", str(tmp_path / "x")], CANNOT_RUN_HERE, "munged is not installed: apt-get"),
        ("wrong option", ["--fodler", "x"], 2, "unknown option --fodler"),
    ):
        done = subprocess.run(
            [shutil.which("bash") or "bash", START, *options], env=without, capture_output=True, text=True, check=False
        )
        assert (done.returncode, message in done.stderr) == (code, True), (name, done.stderr)
    assert not (tmp_path / "x").exists()


def test_sbatch_takes_every_script_with_a_gpu_and_with_paths_that_need_quotes(
    cluster: Cluster, planned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "it's my folder"
    shutil.copytree(planned, folder)
    options = "--cpus 1 --account lab --partition batch --extra 'comment=a nice=3' --memory 3G --out 'my jobs'"
    write_scripts(cluster, folder, f"{options} --setup 'export A=1'")
    for script in sorted(folder.glob("my jobs/*.sbatch")):
        assert "to start at" in cluster.run(f'sbatch --test-only "my jobs/{script.name}"', folder)
    for script in sorted((ROOT / "scripts" / "slurm").glob("*.sbatch")):
        # The examples ask for more than this machine has.
        smaller = "--partition=batch --cpus-per-task=1 --mem=1G"
        assert "to start at" in cluster.run(f"sbatch --test-only {smaller} {script}", folder)


def start_training(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Submit the chain; returns its jobs once the training of fold 0 has made an optimiser step."""
    (folder / "train.yaml").write_text("iterations_per_epoch: 50\n")
    options = "--num_folds 2 --max_epochs 4 --train_config train.yaml --stage_to '$TMPDIR/a disk'"
    write_scripts(cluster, folder, f"--gpus 0 --cpus 1 {options}")
    jobs = submitted(cluster.run("bash jobs/submit.sh", folder))
    wait_for_steps(cluster, folder, folder / "work" / "fold_0")
    return jobs


def test_a_training_that_is_pre_empted_is_queued_again_and_ends_as_one_that_was_not(
    cluster: Cluster, planned: Path, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    jobs = start_training(cluster, tmp_path)
    cluster.run(f"scancel --signal=USR1 --batch {jobs['train']}_0", tmp_path)
    log = tmp_path / "work" / "logs" / f"voxfit-train-{jobs['train']}_0.out"
    end = time.monotonic() + 40
    while "queued again" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    assert cluster.states(tmp_path, {"predict": jobs["predict"]}) == {"predict": {"PENDING"}}
    cluster.wait(tmp_path)
    assert cluster.states(tmp_path, jobs) == {name: {"COMPLETED"} for name in jobs}
    assert "stopped on request" in log.read_text()
    # Both starts of both folds read one copy.
    logs = "".join(path.read_text() for path in log.parent.glob("voxfit-train-*"))
    copies = list(Path(cluster.environment["TMPDIR"], "a disk").glob("voxfit-store-*"))
    assert [logs.count(str(copy)) > 3 for copy in copies].count(True) == 1
    assert f" 0 case(s) copied, {NUM_CASES} were there already" in logs
    assert "going on from last.ckpt" in log.read_text()
    weights = last_weights(tmp_path / "work" / "fold_0")
    options = "--config train.yaml --max_epochs 4 --num_folds 2"
    whole = f"voxfit train --plan work/plan.json --store work/store --run_dir whole --fold 0 {options}"
    cluster.run(f"taskset --cpu-list 0 {whole}", tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in last_weights(tmp_path / "whole").items())


def test_a_training_in_several_tasks_is_queued_again_and_ends_as_one_that_was_not(
    cluster: Cluster, planned: Path, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.yaml").write_text("iterations_per_epoch: 50\nnum_folds: 2\n")
    store = "voxfit preprocess --dataset data --plan work/plan.json --store work/store --num_workers 1"
    cluster.run(store, tmp_path)
    write_scripts(cluster, tmp_path, "--gpus 2 --cpus 1 --max_epochs 3 --train_config train.yaml --memory 8G")
    # Without the GPUs that this machine does not have.
    cluster.run("sed -i -e '/--gres/d' -e 's/accelerator gpu/accelerator cpu/' jobs/train.sbatch", tmp_path)
    job = cluster.run("sbatch --parsable --array=0 jobs/train.sbatch", tmp_path).strip()
    wait_for_steps(cluster, tmp_path, tmp_path / "work" / "fold_0")
    cluster.run(f"scancel --signal=USR1 {job}_0", tmp_path)
    cluster.wait(tmp_path)
    assert cluster.states(tmp_path, {"train": job}) == {"train": {"COMPLETED"}}
    log = (tmp_path / "work" / "logs" / f"voxfit-train-{job}_0.out").read_text()
    for said in ("stopped: stopped on request", "queued again", "going on from last.ckpt"):
        assert log.count(said) == 1, log
    record = json.loads((tmp_path / "work" / "fold_0" / "run.json").read_text())
    assert (record["status"], record["num_ranks"]) == ("finished", 2)
    options = "--config train.yaml --max_epochs 3 --hardware.devices 2"
    whole = f"voxfit train --plan work/plan.json --store work/store --run_dir whole --fold 0 {options}"
    cluster.run(whole, tmp_path)
    weights = last_weights(tmp_path / "work" / "fold_0")
    assert all(torch.equal(weights[name], value) for name, value in last_weights(tmp_path / "whole").items())


def test_a_training_over_two_nodes_is_that_of_two_processes_and_ends_with_either(
    environment: dict[str, str], planned: Path, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    options = "--plan work/plan.json --store work/store --num_folds 2 --iterations_per_epoch 40"
    with started(environment, "--nodes", "2") as nodes:
        nodes.run("voxfit preprocess --dataset data --plan work/plan.json --store work/store --num_workers 1", tmp_path)
        # Nobody can look up the names of these nodes.
        srun = "MASTER_ADDR=127.0.0.1 srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
        nodes.run(f"{srun} voxfit train {options} --max_epochs 1 --run_dir two", tmp_path)
        long = f"{srun} voxfit train {options} --max_epochs 999 --run_dir long --hardware.num_workers 0"
        killer = "sleep 0.5; until [ -s long/metrics.csv ]; do sleep 0.2; done; pkill -9 -f -n 'train.*--run_dir long'"
        output = nodes.run(f"({killer}) & {long} || echo it ended", tmp_path)
        assert output.count("Killed") == 1
        assert "error: another process of this training is gone" in output
        assert "it ended" in output
    assert json.loads((tmp_path / "two" / "run.json").read_text())["num_ranks"] == 2
    command = f"voxfit train {options} --max_epochs 1 --run_dir one --hardware.devices 2"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    weights = last_weights(tmp_path / "two")
    assert all(torch.equal(weights[name], value) for name, value in last_weights(tmp_path / "one").items())


def wait_for_steps(cluster: Cluster, folder: Path, run_dir: Path) -> None:
    """Until a training has made an optimiser step."""
    end, heartbeat = time.monotonic() + 90, run_dir / "heartbeat.json"
    while not (heartbeat.is_file() and json.loads(heartbeat.read_text()).get("optimizer_step", 0) > 0):
        assert time.monotonic() < end, cluster.run("squeue; tail -n 20 work/logs/*", folder)
        time.sleep(0.1)


def last_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found = torch.load(run_dir / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    assert found
    return dict(found)


def test_a_training_that_is_cancelled_stays_ended(cluster: Cluster, planned: Path, tmp_path: Path) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    jobs = start_training(cluster, tmp_path)
    cluster.run(f"scancel {jobs['train']} {jobs['predict']} {jobs['evaluate']}", tmp_path)
    cluster.wait(tmp_path, seconds=60)
    assert cluster.states(tmp_path, {"train": jobs["train"]}) == {"train": {"CANCELLED"}}
    assert not (tmp_path / "work" / "logs").joinpath(f"voxfit-predict-{jobs['predict']}.out").exists()
    log = (tmp_path / "work" / "logs" / f"voxfit-train-{jobs['train']}_0.out").read_text()
    assert "is not queued again from here" in log


def test_a_case_that_cannot_be_made_stops_the_chain_which_goes_on_to_the_metrics_once_it_is_put_right(
    cluster: Cluster, planned: Path, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.yaml").write_text("num_folds: 2\niterations_per_epoch: 2\n")
    write_scripts(cluster, tmp_path, "--gpus 0 --cpus 1 --train_config train.yaml --max_epochs 1 --shards 2")
    broken = next((tmp_path / "data" / "imagesTr").glob("*003*"))
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    jobs = submitted(cluster.run("bash jobs/submit.sh", tmp_path))
    cluster.wait(tmp_path)
    assert cluster.states(tmp_path, jobs) == {
        "preprocess": {"COMPLETED", "FAILED"},
        "verify": {"FAILED"},
        **{name: {"CANCELLED"} for name in ("train", "predict", "evaluate")},
    }
    log = (tmp_path / "work" / "logs" / f"voxfit-verify-{jobs['verify']}.out").read_text()
    assert log.splitlines()[-2:] == ["error: work/store is filled without 1 case(s):", "  blobs_003: is missing"]
    verify = "voxfit preprocess --dataset data --plan work/plan.json --store work/store --verify"
    assert "blobs_003: is missing" in cluster.run(verify, tmp_path, code=3)
    broken.write_bytes(whole)
    jobs = submitted(cluster.run("bash jobs/submit.sh", tmp_path))
    cluster.wait(tmp_path)
    assert cluster.states(tmp_path, jobs) == {name: {"COMPLETED"} for name in jobs}
    assert len(json.loads((tmp_path / "work" / "metrics.json").read_text())["cases"]) == NUM_CASES
    log = (tmp_path / "work" / "logs" / f"voxfit-preprocess-{jobs['preprocess']}_1.out").read_text()
    assert "allotted 1 CPU(s) (by SLURM_CPUS_PER_TASK" in log
    assert "3 of 4 cases are up to date" in log


def test_what_a_job_was_allotted_is_found_in_every_kind_of_step(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "describe.py").write_text(
        "from pipeline.allocation import describe_allocation\nprint(describe_allocation())\n"
    )
    describe, per_node, per_cpu = "python describe.py", "(by SLURM_MEM_PER_NODE", "(by SLURM_MEM_PER_CPU"
    cases = [
        ("--mem=600", describe, "1 CPU(s) (by SLURM_CPUS_ON_NODE", f"0.6 GiB of memory {per_node}"),
        ("-c1 --mem-per-cpu=700", describe, "1 CPU(s) (by SLURM_CPUS_PER_TASK", f"0.7 GiB of memory {per_cpu}"),
    ]
    if int(cluster.run("sinfo --noheader --format=%c", tmp_path)) >= 2:
        two = "--ntasks=2 --mem=1024"
        # Two tasks share what the job has; alone in its batch step, a process has all of it.
        cases += [
            (two, f"srun {describe}", "1 CPU(s) (by SLURM_CPUS_ON_NODE", f"0.5 GiB of memory {per_node}"),
            (two, describe, "2 CPU(s) (by ", f"1.0 GiB of memory {per_node}"),
        ]
    for options, program, cpus, memory in cases:
        output = cluster.run(f"timeout 60 sbatch --wait --output=%j.out {options} --wrap '{program}'", tmp_path)
        found = (tmp_path / f"{re.findall('batch job ([0-9]+)', output)[0]}.out").read_text()
        assert f"allotted {cpus}" in found, options + found
        assert memory in found, options + found


def check_doctor(output: str) -> None:
    """What the page says of `voxfit doctor`, outside of a job and in one."""
    alone, in_job = output.split("one real step")[0].split("CPUs and memory")[1:]
    assert "none: started by hand" in alone
    for pattern in (r"CPUs +1 \(by (SLURM_CPUS_PER_TASK|affinity|cgroup)", r"memory granted +(! )?2.0 GiB"):
        assert re.search(pattern, in_job), in_job
    assert re.search(r"job +\d+ in partition batch", in_job)
    assert re.search(r"time limit +30m", in_job)
    assert re.search(r"time left +(30m|29m\d+s)", in_job)
    assert re.search(r"the whole training of 100 epochs .* would take \d+\.\d\d hours", output)
    assert re.search(r"it (fits|does not fit) into the .* left of this job", output)


@pytest.mark.slow
def test_a_five_fold_job_runs_as_the_page_says(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("scripts/slurm", "data_samples/msd_blobs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    blocks = re.findall(re.escape(MARK) + r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```bash")
    jobs: dict[str, str] = {}
    for block in blocks:
        output = cluster.run(block, tmp_path)
        if "doctor" in block:
            check_doctor(output)
        if "submit.sh" in block:
            jobs = submitted(output)
            cluster.wait(tmp_path)
            assert cluster.states(tmp_path, jobs) == {
                name: {"COMPLETED"} for name in ("preprocess", "verify", "train", "predict", "evaluate", "ensemble")
            }
    metrics = json.loads((tmp_path / "work" / "metrics.json").read_text())
    assert len(metrics["cases"]) == NUM_CASES
    logs = {path.name: path.read_text() for path in (tmp_path / "work" / "logs").iterdir()}
    assert len(logs) == 1 + 1 + 5 + 5 + 1 + 1
    assert all((tmp_path / "work" / f"fold_{fold}" / "postprocessing.json").is_file() for fold in range(5))
    for name, text in logs.items():
        if re.search("preprocess|train", name):
            assert "allotted 1 CPU(s) (by SLURM_CPUS_PER_TASK" in text
            assert "GiB of memory (by SLURM_MEM_PER_NODE" in text
    # The page's last command has stopped the cluster.
    assert not (cluster.folder / "slurmctld.pid").exists()
