from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.data import MetaTensor, load_net_with_metadata
from monai.transforms import LoadImaged, MapTransform, SaveImaged
from numpy.typing import NDArray

from pipeline.config import PredictOptions
from pipeline.datasets.dataset import Case, read_case_image
from pipeline.errors import InputError
from pipeline.inference.case_files import predict_files
from pipeline.inference.exportable import load_exportable
from pipeline.inference.inputs import find_inputs
from pipeline.inference.monai_bundle import write_bundle
from pipeline.inference.predictor import Predictor
from pipeline.plan import ChannelPlan, Plan
from pipeline.preprocessing.preprocess import prepare_image
from pipeline.synthetic import make_synthetic_case

MakePlan = Callable[..., Plan]
MakeRun = Callable[..., Path]

CT = ChannelPlan(name="CT", scheme="ct", lower=-50.0, upper=180.0, mean=40.0, std=55.0)
MR = ChannelPlan(name="T1", scheme="zscore")
STRIPPED = ChannelPlan(name="T2", scheme="zscore", use_body_mask=True)
RAW = ChannelPlan(name="map", scheme="none")
SHAPE, SPACING = (23, 30, 14), (1.0, 1.2, 2.3)
ON_CPU = PredictOptions(accelerator="cpu", num_threads=1)
needs_ignite = pytest.mark.skipif(importlib.util.find_spec("ignite") is None, reason="pytorch-ignite is not installed")


def intensities(label: NDArray[Any], channel: ChannelPlan, seed: int) -> NDArray[np.float32]:
    """Air of exactly 0 around a body with a hole of zeros, and inside it another value for each class."""
    rng = np.random.default_rng(seed)
    body = np.zeros(label.shape, bool)
    body[3:-2, 4:-3, 1:-1] = True
    body[:9, :10] = False
    image = np.where(body, 30.0 + 60.0 * label + 12.0 * rng.standard_normal(label.shape), 0.0)
    image[8:11, 12:15, 5:8] = 0.0
    return image.astype(np.float32) * (1.0 if channel.scheme == "ct" else 0.1)


def write_inputs(folder: Path, channels: tuple[ChannelPlan, ...]) -> tuple[Case, ...]:
    """Two cases with oblique affines, each in an axis order of its own, written with nibabel alone."""
    folder.mkdir(parents=True)
    for seed, codes in enumerate(("LPS", "SRA")):
        case = make_synthetic_case(
            seed, shape=SHAPE, spacing=SPACING, num_classes=3, oblique_degrees=17.0, axis_codes=codes
        )
        source = case.label.source
        assert source is not None
        for index, channel in enumerate(channels):
            voxels = source.order.from_ras(intensities(case.label.array[0], channel, index))
            suffix = f"_{index:04d}" if len(channels) > 1 else ""
            nib.save(nib.Nifti1Image(voxels, source.grid.affine), folder / f"case{seed}{suffix}.nii.gz")
    return find_inputs(folder)


def paths_of(case: Case) -> str | list[str]:
    paths = [str(path) for path in case.images]
    return paths if len(paths) > 1 else paths[0]


def parse(folder: Path, **overrides: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.config.update({"bundle_root": str(folder), **overrides})
    return parser


def segment(bundle: Path, folder: Path) -> None:
    """Let the bundle segment what is in `in`, into `theirs`."""
    parser = parse(bundle, dataset_dir=str(folder / "in"), output_dir=str(folder / "theirs"))
    parser.get_parsed_content("evaluator").run()


VARIANTS: dict[str, dict[str, Any]] = {
    "zscore": {"channels": (MR,), "target_spacing": (1.1, 1.0, 1.9)},
    "ct, thick slices": {"channels": (CT,), "target_spacing": (1.4, 1.3, 3.1), "anisotropic_axis": 2},
    "thick along i": {"channels": (MR,), "target_spacing": (1.7, 1.0, 2.0), "anisotropic_axis": 0},
    "every slice twice": {"channels": (MR,), "target_spacing": (1.0, 1.2, 1.15), "anisotropic_axis": 2},
    "all schemes": {"channels": (CT, STRIPPED, RAW, MR), "target_spacing": (1.0, 1.2, 2.0)},
    "as it is": {"channels": (RAW,), "target_spacing": SPACING},
}


@pytest.fixture(params=VARIANTS, ids=str)
def plan(request: pytest.FixtureRequest, make_plan: MakePlan) -> Plan:
    return make_plan(**VARIANTS[request.param])


def test_monai_prepares_images_as_voxfit_does(plan: Plan, tmp_path: Path, make_run: MakeRun) -> None:
    cases = write_inputs(tmp_path / "in", plan.channels)
    bundle = write_bundle(load_exportable(make_run(plan), "best"), tmp_path / "bundle", overlap=0.5)
    prepare = parse(bundle).get_parsed_content("preprocessing")
    for case in cases:
        ours = prepare_image(read_case_image(case), plan)
        theirs = prepare({"image": paths_of(case)})["image"]
        scale = np.abs(ours.array).max()
        np.testing.assert_allclose(theirs.numpy(), ours.array, atol=2e-5 * scale)
        np.testing.assert_allclose(theirs.affine.numpy(), ours.grid.affine, atol=1e-3)


@needs_ignite
@pytest.mark.parametrize("num_windows", ["one", "several"])
def test_the_bundle_segments_as_voxfit_does_on_the_grid_of_the_input(
    num_windows: str, plan: Plan, tmp_path: Path, make_run: MakeRun
) -> None:
    if num_windows == "one":
        plan = replace(plan, patch_size=(32, 32, 32))
    cases = write_inputs(tmp_path / "in", plan.channels)
    run_dir = make_run(plan)
    predict_files(Predictor.from_runs([run_dir], ON_CPU), cases, tmp_path / "ours")
    bundle = write_bundle(load_exportable(run_dir, "best"), tmp_path / "bundle", overlap=0.5)
    segment(bundle, tmp_path)
    written = sorted((tmp_path / "theirs").iterdir())
    assert len(written) == len(cases)
    for case, theirs in zip(cases, map(nib.load, written), strict=True):
        ours = nib.load(tmp_path / "ours" / f"{case.case_id}.nii.gz")
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs.affine, ours.affine, atol=1e-5)
        agreement = np.mean(np.asanyarray(theirs.dataobj) == np.asanyarray(ours.dataobj))
        # An untrained network hardly prefers a class, and its group statistics are those of each window.
        assert agreement > (0.9995 if num_windows == "one" else 0.8), agreement


@needs_ignite
def test_windows_that_lie_alike_are_weighted_alike(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    # Steps of half a window fit this size exactly, so both spread their windows in the same way.
    plan = make_plan(channels=(RAW,), target_spacing=SPACING, patch_size=(12, 16, 8))
    voxels = 1.0 + np.random.default_rng(0).random((24, 32, 12), np.float32)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING, 1.0])), tmp_path / "in" / "case.nii.gz")
    run_dir = make_run(plan)
    predict_files(Predictor.from_runs([run_dir], ON_CPU), find_inputs(tmp_path / "in"), tmp_path / "ours")
    segment(write_bundle(load_exportable(run_dir, "best"), tmp_path / "bundle", overlap=0.5), tmp_path)
    ours, theirs = (
        np.asanyarray(nib.load(path).dataobj)
        for path in (tmp_path / "ours" / "case.nii.gz", tmp_path / "theirs" / "case_seg.nii.gz")
    )
    assert len(np.unique(ours)) > 1
    assert np.mean(ours == theirs) > 0.9995


def test_the_torchscript_file_alone_holds_network_and_both_configurations(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = load_exportable(make_run(make_plan()), "best")
    bundle = write_bundle(run, tmp_path / "bundle", overlap=0.25)
    file = bundle / "models" / "model.ts"
    network, metadata, extra = load_net_with_metadata(str(file), more_extra_files=("inference.json",))
    assert metadata == json.loads((bundle / "configs" / "metadata.json").read_text())
    assert json.loads(extra["inference.json"]) == json.loads((bundle / "configs" / "inference.json").read_text())
    # MONAI Deploy looks under the name of the file.
    names = zipfile.ZipFile(file).namelist()
    assert {"model/extra/metadata.json", "model/extra/inference.json"} <= set(names)
    image = torch.randn(2, 1, 12, 16, 8)
    with torch.inference_mode():
        torch.testing.assert_close(network(image), run.reference(image), rtol=1e-4, atol=1e-5)


@needs_ignite
def test_monai_finds_what_it_requires_of_an_inference_bundle(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    plan = make_plan(channels=(CT,))
    bundle = write_bundle(load_exportable(make_run(plan), "best"), tmp_path / "bundle", overlap=0.5)
    write_inputs(bundle / "input", plan.channels)
    configs = {
        "config_file": str(bundle / "configs" / "inference.json"),
        "meta_file": str(bundle / "configs" / "metadata.json"),
    }
    workflow = ConfigWorkflow(workflow_type="infer", bundle_root=str(bundle), **configs)
    workflow.initialize()
    assert workflow.check_properties() == []
    verify_net_in_out(net_id="network_def", device="cpu", bundle_root=str(bundle), **configs)


def test_the_metadata_describe_input_and_output(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    bundle = write_bundle(load_exportable(make_run(make_plan(channels=(CT, MR))), "best"), tmp_path / "b", overlap=0.5)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    mandatory = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"}
    mandatory |= {"task", "description", "authors", "copyright", "network_data_format"}
    assert mandatory <= set(metadata)
    tensors = metadata["network_data_format"]
    described = {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"}
    for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
        assert set(tensor) == {*described, "channel_def"}
        assert tensor["spatial_shape"] == [12, 16, 8]
    assert tensors["inputs"]["image"]["channel_def"] == {"0": "CT", "1": "T1"}
    assert tensors["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "organ_1", "2": "organ_2"}


def test_the_readme_says_what_is_done_to_images(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    plan = make_plan(channels=(CT, STRIPPED), anisotropic_axis=2)
    bundle = write_bundle(load_exportable(make_run(plan), "best"), tmp_path / "liver", overlap=0.5)
    readme = (bundle / "docs" / "README.md").read_text()
    for said in ("# liver\n", "clip to [-50.0, 180.0]", "over the body", "along axis k", "| organ_2 | 7 |"):
        assert said in readme


def test_a_zip_unpacks_to_the_folder_of_its_name(tmp_path: Path, make_plan: MakePlan, make_run: MakeRun) -> None:
    path = write_bundle(load_exportable(make_run(make_plan()), "best"), tmp_path / "liver.zip", overlap=0.5)
    zipfile.ZipFile(path).extractall(tmp_path / "unpacked")
    files = {str(file.relative_to(tmp_path / "unpacked")) for file in (tmp_path / "unpacked").rglob("*.*")}
    assert files == {
        f"liver/{name}"
        for name in ("configs/metadata.json", "configs/inference.json", "models/model.ts", "docs/README.md")
    }


def test_a_bundle_that_fails_its_check_leaves_the_earlier_one(
    tmp_path: Path, make_plan: MakePlan, make_run: MakeRun
) -> None:
    run = load_exportable(make_run(make_plan()), "best")
    bundle = write_bundle(run, tmp_path / "bundle", overlap=0.5)
    before = {file: file.read_bytes() for file in bundle.rglob("*.*")}
    with torch.no_grad():
        run.reference.heads[0].weight *= 1.001
    with pytest.raises(InputError, match="differs by"):
        write_bundle(run, bundle, overlap=0.25)
    assert {file: file.read_bytes() for file in bundle.rglob("*.*")} == before
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_the_bundle_works_without_its_transforms_that_load_and_save(
    plan: Plan, tmp_path: Path, make_run: MakeRun
) -> None:
    # So MONAI Deploy runs a bundle: it hands over voxels of its own, as they lie in the series, and takes the result.
    if plan.num_channels > 1:
        pytest.skip("MONAI Deploy has one image without a channel axis")
    cases = write_inputs(tmp_path / "in", plan.channels)
    plan = replace(plan, patch_size=(32, 32, 32))
    run_dir = make_run(plan)
    predict_files(Predictor.from_runs([run_dir], ON_CPU), cases, tmp_path / "ours")
    parser = parse(write_bundle(load_exportable(run_dir, "best"), tmp_path / "bundle", overlap=0.5))
    before, after = (parser.get_parsed_content(name).transforms for name in ("preprocessing", "postprocessing"))
    assert isinstance(after[0], MapTransform)
    parser.get_parsed_content("preprocessing").transforms = [t for t in before if not isinstance(t, LoadImaged)]
    parser.get_parsed_content("postprocessing").transforms = [t for t in after if not isinstance(t, SaveImaged)]
    for case in cases:
        file = nib.load(case.images[0])
        meta = {"affine": file.affine, "original_affine": file.affine, "original_channel_dim": "no_channel"}
        voxels = torch.from_numpy(np.asarray(file.dataobj, np.float64))
        data = parser.get_parsed_content("preprocessing")({"image": MetaTensor(voxels, meta=meta)})
        with torch.no_grad():
            logits = parser.get_parsed_content("inferer")(data["image"][None], parser.get_parsed_content("network"))
        found = parser.get_parsed_content("postprocessing")({"pred": logits[0], **data})["pred"]
        ours = np.asarray(nib.load(tmp_path / "ours" / f"{case.case_id}.nii.gz").dataobj)
        assert (found[0].numpy() == ours).mean() > 0.9995
