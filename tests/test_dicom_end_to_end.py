"""From real DICOM to a trained run and back to DICOM, by the command line alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom

from pipeline.cli import main
from pipeline.datasets.dataset import read_dataset
from pipeline.io.dicom.reader import read_series
from pipeline.io.dicom.seg_reader import iter_segments

TINY = ["--patch_size", "16", "16", "16", "--base_features", "4", "--max_features", "8", "--vram", "2GiB"]
CPU = ["--hardware.accelerator", "cpu", "--hardware.num_workers", "0", "--hardware.num_threads", "1"]
ONE_STEP = ["--max_epochs", "1", "--iterations_per_epoch", "2", "--num_folds", "2"]


def command(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0, words


def train(dataset: Path, work: Path) -> Path:
    """The run folder of one optimiser step on a dataset."""
    plan, store, run_dir = work / "plan.json", work / "store", work / "run"
    command("plan", "--dataset", dataset, "--out", plan, *TINY, "--num_workers", 1)
    command("preprocess", "--dataset", dataset, "--plan", plan, "--store", store, "--num_workers", 1)
    command("train", "--plan", plan, "--store", store, "--run_dir", run_dir, *ONE_STEP, *CPU)
    return run_dir


def predict(run_dir: Path, tree: Path, output: Path, *options: str) -> list[Path]:
    words = ("--run_dir", run_dir, "--input", tree, "--output", output, "--accelerator", "cpu", "--num_threads", 1)
    command("predict", *words, *options)
    return sorted(output.glob("*.dcm"))


def check_against_nifti(seg: Path, tree: Path, values: dict[str, int]) -> None:
    """That a segmentation lies on its series, and holds the voxels of the NIfTI beside it."""
    header = pydicom.dcmread(seg, stop_before_pixels=True)
    uid = header.ReferencedSeriesSequence[0].SeriesInstanceUID
    files = [
        path
        for path in tree.rglob("*.dcm")
        if pydicom.dcmread(path, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID == uid
    ]
    source = read_series(files).source
    assert source is not None
    found = np.zeros(source.grid.shape, int)
    for segment in iter_segments(seg, source.grid, wanted=lambda name: True):
        found[segment.mask] = values[segment.name]
    nifti = nib.load(seg.with_name(f"{seg.stem}.nii.gz"))
    np.testing.assert_array_equal(np.asarray(nifti.dataobj), found)
    np.testing.assert_allclose(nifti.affine, source.grid.affine, atol=1e-4)


def test_real_studies_are_trained_on_segmented_and_scored_as_dicom(shared_data: Path, tmp_path: Path) -> None:
    tree, dataset = shared_data / "dicom" / "rtstruct_sts" / "dicom", tmp_path / "set" / "sarcoma.json"
    command("inspect", tree, "--write_dataset", dataset, "--classes", "tumour=GTV*", "--channels", "PT")
    assert read_dataset(dataset).labels == {"background": 0, "tumour": 1}
    run_dir = train(dataset, tmp_path)
    segs = predict(run_dir, tree, tmp_path / "out", "--format", "both")
    assert len(segs) == 2
    for seg in segs:
        check_against_nifti(seg, tree, {"tumour": 1})
    metrics = tmp_path / "metrics.json"
    command("evaluate", "--predictions", tmp_path / "out", "--labels", dataset, "--out", metrics, "--num_workers", 1)
    content = json.loads(metrics.read_text())
    assert len(content["cases"]) == 2
    assert list(content["by_class"]) == ["tumour"]


def test_the_hippocampus_model_segments_dicom_series_into_dicom(shared_data: Path, tmp_path: Path) -> None:
    folder, source = tmp_path / "hippocampus", shared_data / "hippocampus"
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((source / kind).glob("hippocampus_*.nii.gz"))[:3]:
            shutil.copy(path, folder / kind)
    content = json.loads((source / "dataset.json").read_text())
    names = [f"{path.name}" for path in sorted((folder / "imagesTr").iterdir())]
    content["training"] = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    (folder / "dataset.json").write_text(json.dumps({**content, "test": []}))
    run_dir = train(folder, tmp_path)
    tree = shared_data / "dicom" / "hippocampus_crops"
    segs = predict(run_dir, tree, tmp_path / "out", "--format", "both")
    assert len(segs) == 3
    values = {name: value for name, value in read_dataset(folder).labels.items() if value}
    for seg in segs:
        check_against_nifti(seg, tree, values)


def test_names_of_structures_are_safe_in_plan_tables_and_report(tmp_path: Path, write_study: Any) -> None:
    names = ('a,b;"c"', "<b>x</b>&amp;", "x/y z=1", "35", "Ünicode |")
    for seed in range(2):
        write_study(tmp_path / "tree" / str(seed), seed=seed, names=names, shape=(24, 20, 12))
    dataset, work = tmp_path / "set" / "odd.json", tmp_path / "work"
    command("inspect", tmp_path / "tree", "--write_dataset", dataset)
    options = [word.replace("--", "--plan.") if word != "--vram" else word for word in TINY]
    options += [word.replace("--hardware", "--train.hardware") for word in CPU]
    options += ["--max_epochs", "1", "--train.iterations_per_epoch", "2", "--train.num_folds", "2"]
    command("run", "--dataset", dataset, "--work_dir", work, "--num_workers", 1, *options)
    run_dir = work / "fold_0"
    assert set(json.loads((run_dir / "plan.json").read_text())["labels"]) == {"background", *names}
    with (run_dir / "metrics.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert all(len(row) == len(header) for row in rows)
    for name in names:
        assert any(name in column for column in header), (name, header)
    with (run_dir / "validation" / "metrics_cases.csv").open(newline="") as stream:
        assert {row["class"] for row in csv.DictReader(stream)} == set(names)
    report = (run_dir / "report.html").read_text()
    assert "<b>x</b>&amp;<" not in report
    assert "&lt;b&gt;x&lt;/b&gt;&amp;amp;" in report
    segs = predict(run_dir, tmp_path / "tree", tmp_path / "out", "--format", "both")
    for seg in segs:
        labels = {item.SegmentLabel for item in pydicom.dcmread(seg).SegmentSequence}
        assert len(labels) <= len(names)
