"""The documents are true: what they tell to run runs as written, and the layout has a line for every file.

`python tests/test_readme.py` prints the tree as it should stand there.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARK = "<!-- run by tests/test_readme.py -->\n"
WIDTH = 34


def marked_blocks(document: Path = README) -> list[tuple[str, str]]:
    """Language and text of the code blocks that are to be run, in order."""
    return re.findall(re.escape(MARK) + r"```(\w+)\n(.*?)```", document.read_text(), re.DOTALL)


def tree() -> str:
    """A line per file of the package: its name and the first sentence of its docstring."""
    lines = []
    paths = sorted((ROOT / "pipeline").rglob("*.py"), key=lambda path: (path.parent != ROOT / "pipeline", path))
    for path in paths:
        name = str(path.relative_to(ROOT / "pipeline"))
        folder = path.name == "__init__.py"
        shown = name.replace("__init__.py", "") if folder else ("  " if "/" in name else "") + path.name
        docstring = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0].rstrip(".")
        lines.append(f"{shown or 'pipeline/':{WIDTH}} {docstring}".rstrip())
    return "\n".join(lines)


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_readme_run_as_written_one_after_the_other(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data_samples", tmp_path / "data_samples")
    blocks = marked_blocks()
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, text in blocks:
        if language == "python":
            run([sys.executable, "-c", text], tmp_path)
            continue
        for line in text.strip().splitlines():
            run(["bash", "-c", line], tmp_path)
    for name in (
        "plan.json",
        "metrics.json",
        "report.html",
        "predictions/blobs_009.nii.gz",
        "both/blobs_009.nii.gz",
        "both/probabilities/blobs_009.b2nd",
        "segresnet/run.json",
    ):
        assert (tmp_path / "work" / name).is_file(), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_run_ends_with_the_table_and_the_report(tmp_path: Path) -> None:
    command = ["voxfit", "run", "--config", str(ROOT / "configs/quickstart.yaml")]
    command += ["--dataset", str(ROOT / "data_samples/msd_blobs"), "--work_dir", str(tmp_path)]
    assert " ".join(command[1:4]).replace(f"{ROOT}/", "") in (ROOT / "scripts/quickstart.sh").read_text()
    # Half of its 12 epochs, which are enough to have learnt something.
    run([*command, "--max_epochs", "6"], tmp_path)
    assert (tmp_path / "fold_0" / "report.html").read_text().startswith("<!DOCTYPE html>")
    scores = json.loads((tmp_path / "fold_0" / "validation" / "metrics.json").read_text())
    assert min(case["classes"][name]["dice"] for case in scores["cases"] for name in case["classes"]) > 0.8


@pytest.mark.slow
def test_the_example_of_a_network_of_one_s_own_runs_as_written(tmp_path: Path) -> None:
    ((language, text),) = marked_blocks(ROOT / "docs" / "memory.md")
    assert language == "python"
    run([sys.executable, "-c", text], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_fine_tuning_run_as_written(tmp_path: Path) -> None:
    for name in ("data_samples", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    ((language, text),) = marked_blocks(ROOT / "docs" / "finetune_and_track.md")
    assert language == "bash"
    for line in text.strip().splitlines():
        run(["bash", "-c", line], tmp_path)
    record = json.loads((tmp_path / "work" / "second" / "fold_0" / "run.json").read_text())
    assert record["initial_weights"]["new"] == []


def test_the_layout_has_a_line_for_every_file() -> None:
    assert tree() in (ROOT / "docs" / "layout.md").read_text(), "print it with `python tests/test_readme.py`"


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{path.name}: {target}"


if __name__ == "__main__":
    print(tree())
