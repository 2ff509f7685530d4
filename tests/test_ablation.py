"""`scripts/ablation.py`: variations of one recipe, seed by seed, that goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "ablation.py"
DATASET = ROOT / "data_samples" / "msd_blobs"
STUDY = """
samples: 9
epochs: 2
seams: true
plan: {vram: 2GiB, base_features: 4, batch_size: 2, patch_size: "[16,16,16]", num_workers: 1}
train: {num_folds: 4, hardware.accelerator: cpu, hardware.num_threads: 1, hardware.num_workers: 0}
variations:
  as it is: {}
  instance norm: {plan: {norm: instance}}
  four at once: {plan: {batch_size: 4}, train: {optim.lr: 0.02}}
"""


def run(study: Path, out_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(SCRIPT), "--study", str(study), "--dataset", str(DATASET), "--out_dir", str(out_dir)]
    return subprocess.run([*words, *options], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_variations_see_the_same_samples_and_what_is_trained_is_kept(tmp_path):
    study, out_dir = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    first = run(study, out_dir, "--seeds", "3", "--only", "as it is")
    assert first.returncode == 0, first.stderr[-3000:]
    before = (out_dir / "runs" / "as_it_is-3" / "metrics.csv").read_bytes()
    done = run(study, out_dir, "--seeds", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    trained = json.loads((out_dir / "results.json").read_text())["trained"]
    assert [(each["name"], each["optimizer_steps"]) for each in trained] == [
        ("as it is", 4),
        ("instance norm", 4),
        ("four at once", 2),
    ]
    assert all(0 <= each["seam_share"] <= 1 for each in trained)
    assert (out_dir / "runs" / "as_it_is-3" / "metrics.csv").read_bytes() == before
    assert (out_dir / "runs" / "as_it_is-3" / "plan.json").read_text().count('"group"') == 1
    assert (out_dir / "runs" / "instance_norm-3" / "plan.json").read_text().count('"instance"') == 1
    lines = (out_dir / "results.md").read_text().splitlines()
    assert len({line.count("|") for line in lines if line}) == 1, "Markdown drops a table whose rows differ"
    rows = lines[2:]
    difference = trained[1]["dice"] - trained[0]["dice"]
    assert f"| {difference:+.3f} | {trained[1]['seam_share']:.1%} | 4 |" in rows[1]


def test_a_study_that_cannot_be_read_and_results_of_another_one_are_refused(tmp_path):
    study, out_dir = tmp_path / "study.yaml", tmp_path / "out"
    for text, said in (
        (": -", "mapping"),
        ("samples: 2\nvariations: {a: {data: {}}}", "'a'"),
        ("samples: many", "int"),
    ):
        study.write_text(text)
        done = run(study, out_dir)
        assert done.returncode == 1
        assert str(study) in done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    out_dir.mkdir()
    study.write_text(STUDY)
    other = {"samples": 1, "epochs": 1, "variations": {"a": {}}, "plan": {}, "train": {}, "seams": False}
    (out_dir / "results.json").write_text(json.dumps({"study": other, "trained": []}))
    done = run(study, out_dir)
    assert done.returncode == 1
    assert "another study" in done.stderr
