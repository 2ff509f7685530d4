"""What the shell makes of job scripts where they are submitted and where they run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.cli import parse
from tests.slurm.conftest import command, scripts


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
