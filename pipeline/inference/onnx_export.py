"""A trained run as one ONNX file that says how its input is made and what its output means."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline import __version__
from pipeline.artifacts import atomic_path
from pipeline.errors import InputError, first_line
from pipeline.inference.exportable import ExportableRun, check_same_outputs
from pipeline.log import get_logger

if TYPE_CHECKING:
    import onnx

# The lowest that torch's exporter writes without converting down; group norms become InstanceNormalization, which all
# runtimes have, in the normal form of (batch, groups, rest).
OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "Install them: pip install 'voxfit[export]'"
# What protobuf, and so one ONNX file, can hold.
MAX_FILE_BYTES = 2**31 - 1
# Upper ends of the axes that stay free in the file: windows in a batch, and multiples of the network's stride along an
# axis of space. Torch asks for some; nothing that fits memory comes near them.
LARGEST_FREE_BATCH, MOST_STRIDES = 1024, 4096


def check_onnx_packages() -> None:
    """Refuse at once where a package is missing.

    Raises:
        InputError: It names those that are not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"an export to ONNX needs {', '.join(missing)}, not installed here", fix=INSTALL)


def write_onnx(run: ExportableRun, path: Path) -> Path:
    """Write the network in float32 with a dynamic batch axis and, for the plan's U-Net, dynamic spatial axes.

    The file is read by onnxruntime and compared with the run's own network before it takes its place.

    Args:
        run: The run.
        path: NAME.onnx; what stands there is replaced only by a file that passed the check.

    Raises:
        InputError: A package is missing, the network cannot be exported or is too large for one file, its outputs are
            not the same, or the file cannot be written.
    """
    check_onnx_packages()
    import onnx

    model, is_dynamic = _export(run, path)
    onnx.helper.set_model_props(model, model_properties(run, is_dynamic=is_dynamic))
    if model.ByteSize() > MAX_FILE_BYTES:
        raise InputError("the network has more than 2 GiB of weights, which one ONNX file cannot hold", where=path)
    shapes = run.checked_shapes()
    if not is_dynamic:
        shapes = [(batch, run.plan.num_channels, *run.window) for batch in (1, 2)]
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
        onnx.checker.check_model(temporary)
        difference = check_same_outputs(run, _session(temporary), shapes, where=path)
    axes = "batch and spatial axes" if is_dynamic else "batch axis"
    get_logger("export").info(
        "%s: ONNX opset %d, dynamic %s; onnxruntime differs by %.1e of the outputs' scale on %s",
        *(path, OPSET, axes, difference, " and ".join(str(list(shape)) for shape in shapes)),
    )
    return path


def model_properties(run: ExportableRun, *, is_dynamic: bool) -> dict[str, str]:
    """What the file says about itself, as ONNX's `metadata_props`: text, or JSON where the value is structured."""
    plan = run.plan
    size = f"multiples of {list(run.stride)}" if is_dynamic and run.stride else "the patch size"
    return {
        "voxfit_version": __version__,
        "torch_version": torch.__version__,
        "opset": str(OPSET),
        "checkpoint": run.checkpoint,
        "input": f"image: (batch, {plan.num_channels}, i, j, k) float32 in RAS order; i, j, k are {size}",
        "output": f"logits: (batch, {plan.num_classes}, i, j, k) float32; the class index is the largest of them",
        "preparation": "crop to the box of voxels that are not 0 in any channel; normalise each channel as channels"
        " says; resample to spacing_mm (cubic; nearest along anisotropic_axis)",
        "channels": json.dumps([_channel(channel) for channel in plan.channels]),
        "classes": json.dumps(plan.labels),
        "spacing_mm": json.dumps(plan.target_spacing),
        "anisotropic_axis": json.dumps(plan.anisotropic_axis),
        "patch_size": json.dumps(plan.patch_size),
        "plan": run.plan_json,
    }


def _channel(channel: Any) -> dict[str, Any]:
    """Name and normalisation of a channel, without figures that its scheme does not use."""
    figures: dict[str, tuple[str, ...]] = {"ct": ("lower", "upper", "mean", "std"), "zscore": ("use_body_mask",)}
    return {name: getattr(channel, name) for name in ("name", "scheme", *figures.get(channel.scheme, ()))}


def _export(run: ExportableRun, path: Path) -> tuple[onnx.ModelProto, bool]:
    """The model, and whether its spatial axes are dynamic."""
    if run.stride is not None:
        try:
            return _export_axes(run, spatial=True), True
        except Exception as error:
            # Torch's reasoning about sizes differs from version to version; the window itself always works.
            get_logger("export").warning("only windows of the patch size: %s", _innermost_reason(error))
    try:
        return _export_axes(run, spatial=False), False
    except Exception as error:
        raise InputError(
            f"the network cannot be exported to ONNX ({_innermost_reason(error)})",
            where=path,
            fix="torch.export has to understand it: no data-dependent control flow, no own autograd functions",
        ) from error


def _export_axes(run: ExportableRun, *, spatial: bool) -> onnx.ModelProto:
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_FREE_BATCH)}
    size = run.window
    if spatial and run.stride is not None:
        # An example far from 1, of which torch makes a constant, and of unequal sides, which it takes for one.
        size = tuple(steps * step for steps, step in zip((2, 3, 4), run.stride, strict=True))
        axes |= {2 + axis: _multiple("ijk"[axis], step) for axis, step in enumerate(run.stride)}
    example = torch.zeros(2, run.plan.num_channels, *size)
    with _quiet():
        program = torch.onnx.export(
            run.plain,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _multiple(name: str, step: int) -> Any:
    """A spatial axis whose size is any multiple of `step`."""
    count = torch.export.Dim(name, min=1, max=MOST_STRIDES)
    return step * count if step > 1 else count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that it could use and does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _session(path: Path) -> Any:
    """A function from images to logits as onnxruntime computes them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])

    return run


def _innermost_reason(error: Exception) -> str:
    """The innermost reason of an exporter's many-layered error."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)
