"""A trained run as a MONAI bundle, which MONAI, MONAI Label and MONAI Deploy run without voxfit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import torch

from pipeline import __version__
from pipeline.artifacts import atomic_folder, atomic_path
from pipeline.errors import InputError, first_line
from pipeline.inference.export_target import BUNDLE_KEY
from pipeline.inference.exportable import ExportableRun, check_same_outputs
from pipeline.inference.monai_config import DIFFERENCES, inference_config
from pipeline.log import get_logger
from pipeline.plan import Plan

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
BUNDLE_VERSION = "1.0.0"
# What runs a bundle besides MONAI and torch; distribution by name of the import package would be a second list.
PACKAGES = {"nibabel": "5.2", "scipy": "1.11", "pytorch-ignite": "0.5", "fire": "0.6"}
TEMPLATE = "bundle_readme.md.j2"


def write_bundle(run: ExportableRun, path: Path, *, overlap: float) -> Path:
    """Write the bundle: `configs/{metadata,inference}.json`, `models/model.ts`, `docs/README.md`.

    The TorchScript file holds both configurations as well, as MONAI Deploy reads them. It is loaded and compared with
    the run's own network before the bundle takes its place.

    Args:
        run: The run.
        path: A folder, or NAME.zip that unpacks to the folder NAME; an earlier bundle there is replaced.
        overlap: Share of the window that neighbouring windows have in common.

    Raises:
        InputError: The network cannot be traced, its outputs are not the same, or the bundle cannot be written.
    """
    if path.suffix == ".zip":
        with TemporaryDirectory() as scratch, atomic_path(path) as temporary:
            folder = Path(scratch) / path.stem
            difference = _fill(folder, run, overlap=overlap, where=path)
            _pack(folder, temporary)
    else:
        with atomic_folder(path) as temporary:
            difference = _fill(temporary, run, overlap=overlap, where=path)
    get_logger("export").info(
        "%s: MONAI bundle; TorchScript differs by %.1e of the outputs' scale on %s",
        *(path, difference, " and ".join(str(list(shape)) for shape in run.checked_shapes())),
    )
    return path


def _fill(folder: Path, run: ExportableRun, *, overlap: float, where: Path) -> float:
    """Write the files of a bundle; returns the difference that the check of its network found."""
    configs = {"metadata.json": bundle_metadata(run), "inference.json": inference_config(run, overlap=overlap)}
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        (folder / "configs" / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "docs" / "README.md").write_text(_readme(run, name=where.stem), encoding="utf-8")
    return _write_torchscript(folder / "models" / "model.ts", run, configs, where=where)


def _write_torchscript(path: Path, run: ExportableRun, configs: Mapping[str, Any], *, where: Path) -> float:
    from monai.data import save_net_with_metadata

    example = torch.zeros(run.checked_shapes()[-1])
    with warnings.catch_warnings(), torch.inference_mode():
        # The tracer warns of every comparison of sizes; the check below tries other sizes than it saw.
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(run.plain, example, check_trace=False)
        except Exception as error:
            raise InputError(f"the network cannot be traced ({first_line(error)})", where=where) from error
        save_net_with_metadata(
            traced,
            str(path),
            include_config_vals=False,
            meta_values=configs["metadata.json"],
            more_extra_files={"inference.json": json.dumps(configs["inference.json"]).encode()},
        )
        loaded = torch.jit.load(str(path))
    return check_same_outputs(run, loaded, run.checked_shapes(), where=where)


def bundle_metadata(run: ExportableRun) -> dict[str, Any]:
    """`metadata.json`: what goes in, what comes out, and what it was made with."""
    import monai
    import numpy as np

    plan = run.plan
    return {
        "schema": SCHEMA,
        "version": BUNDLE_VERSION,
        "changelog": {BUNDLE_VERSION: f"exported by voxfit {__version__}"},
        "monai_version": monai.__version__.split("+")[0],
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": PACKAGES,
        "name": plan.dataset_name,
        "task": f"3D segmentation, trained on {plan.dataset_name}",
        "description": f"Segments {', '.join(plan.class_names[1:])} in {_channel_names(plan)}; a 3D network trained and"
        f" exported by voxfit {__version__}",
        "authors": "not stated",
        "copyright": "not stated",
        "data_source": plan.dataset_name,
        "data_type": "nibabel",
        "image_classes": f"{plan.num_channels} channel(s): {_channel_names(plan)}",
        "pred_classes": f"{plan.num_classes} channels of logits; the class is the largest of them",
        "label_classes": ", ".join(f"{value} is {name}" for name, value in plan.labels.items()),
        "intended_use": "not a medical device, not for diagnosis",
        "network_data_format": {"inputs": {"image": _input_format(run)}, "outputs": {"pred": _output_format(run)}},
        BUNDLE_KEY: {"version": __version__, "checkpoint": run.checkpoint, "plan": json.loads(run.plan_json)},
    }


def _channel_names(plan: Plan) -> str:
    return ", ".join(channel.name for channel in plan.channels)


def _input_format(run: ExportableRun) -> dict[str, Any]:
    is_ct = all(channel.scheme == "ct" for channel in run.plan.channels)
    names = {str(index): channel.name for index, channel in enumerate(run.plan.channels)}
    return {
        "type": "image",
        "format": "hounsfield" if is_ct else "magnitude",
        "modality": "CT" if is_ct else _channel_names(run.plan),
        **_tensor_format(run, run.plan.num_channels),
        "channel_def": names,
    }


def _output_format(run: ExportableRun) -> dict[str, Any]:
    names = {str(index): name for index, name in enumerate(run.plan.class_names)}
    return {
        "type": "image",
        "format": "labels",
        "modality": "n/a",
        **_tensor_format(run, run.plan.num_classes),
        "channel_def": names,
    }


def _tensor_format(run: ExportableRun, num_channels: int) -> dict[str, Any]:
    return {
        "num_channels": num_channels,
        "spatial_shape": list(run.window),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
    }


def _readme(run: ExportableRun, *, name: str) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("pipeline", "inference"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return templates.get_template(TEMPLATE).render(
        name=name,
        plan=run.plan,
        channels=[asdict(channel) for channel in run.plan.channels],
        is_renamed=list(run.plan.label_values) != list(range(run.plan.num_classes)),
        stride=run.stride,
        differences=DIFFERENCES,
        version=__version__,
        packages=PACKAGES,
    )


def _pack(folder: Path, archive: Path) -> None:
    with ZipFile(archive, "w", ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder.parent))
