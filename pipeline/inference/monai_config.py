"""`inference.json` of a MONAI bundle: this project's preparation of images and the way back, in MONAI's transforms.

The grid that an image is resampled to depends on its size, which MONAI's `Spacingd` rounds in another way than
`geometry.respaced_grid`; so the grid is computed by an expression, and `ResampleToMatchd` resamples to it. With that,
preparation and way back are those of `voxfit predict` up to rounding; only windows lie elsewhere (see `DIFFERENCES`).
"""

from __future__ import annotations

from math import inf
from typing import Any

from pipeline.inference.exportable import ExportableRun
from pipeline.io.nifti import smallest_integer
from pipeline.plan import ChannelPlan, Plan

Step = dict[str, Any] | str

DIFFERENCES = (
    "Windows: MONAI moves the last window of a row back to the border where voxfit spreads all of them evenly, so"
    " logits are blended from other windows.",
    "Precision: float32 throughout, where `voxfit predict` uses the run's precision if the device has it.",
)
IMPORTS = ("$import glob", "$import numpy as np", "$from scipy import ndimage", "$import torch", "$import monai")
RAS_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]
# Air that a crop takes away; an image of nothing but zeros stays whole.
FOREGROUND = "$lambda x: x != 0 if (x != 0).any() else x == 0"
GRID_SHAPE = (
    "$lambda x: tuple(int(n) for n in np.maximum(1, np.round(np.array(x.shape[1:])"
    " * np.linalg.norm(np.array(x.affine)[:3, :3], axis=0) / np.array(@target_spacing))))"
)
# Voxel borders aligned; the one voxel is spread over the grid without memory of its own. No `@` for the product: MONAI
# takes each for a reference.
GRID = (
    "$lambda x, shape: monai.data.MetaTensor(torch.zeros(1).expand(1, *shape), affine=x.affine.matmul(torch.as_tensor("
    "monai.transforms.utils.scale_affine(tuple(x.shape[1:]), tuple(shape)))),"
    " meta={k: v for k, v in x.meta.items() if k != 'affine'})"
)
MOVE = (
    "$lambda x, axis, voxels: (setattr(x, 'affine', x.affine.matmul(torch.as_tensor("
    "monai.transforms.utils.create_translate(3, [voxels * (a == axis) for a in range(3)])))), x)[1]"
)
# Of a slice half-way between two, ours is the upper and torch's the even one; so the grid is moved up by this share of
# a voxel, and for the way back down by as much. Ten times what float32 loses in a thousand slices.
TIE_VOXELS = 2e-4
BODY = "$lambda x: torch.as_tensor(ndimage.binary_fill_holes((x != 0).any(0).numpy()))"
OVER_BODY = (
    "$lambda c, body: torch.where(body, (c - c[body].mean()) / c[body].std(unbiased=False).clamp_min(1e-30), 0.0)"
)
# Images are resampled by cubic splines, scores come back linearly.
LINEAR_BACK = (
    "$lambda d: ([op['extra_info'].update(mode='bilinear', padding_mode='border') for op in"
    " d['image'].applied_operations if op.get('extra_info', {}).get('mode') == 3], d)[1]"
)


def inference_config(run: ExportableRun, *, overlap: float) -> dict[str, Any]:
    """The configuration that `python -m monai.bundle run` and other readers of bundles take.

    Args:
        run: The run.
        overlap: Share of the window that neighbouring windows have in common.
    """
    plan = run.plan
    return {
        "imports": list(IMPORTS),
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "target_spacing": list(plan.target_spacing),
        "grid_shape": GRID_SHAPE,
        "grid": GRID,
        **({} if plan.anisotropic_axis is None else {"move": MOVE}),
        **_body_expressions(plan.channels),
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": _compose(*_preprocessing(plan)),
        "datalist": _datalist(plan.num_channels),
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(run.window),
            "sw_batch_size": 1,
            "overlap": overlap,
            "mode": "gaussian",
            "sigma_scale": 0.125,
            "padding_mode": "constant",
            "cval": 0.0,
            "sw_device": "@device",
            "device": "cpu",
        },
        "postprocessing": _compose(*_postprocessing(plan)),
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
        "infer": ["$@evaluator.run()"],
    }


def _compose(*transforms: Step) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": list(transforms)}


def _on_image(target: str, **options: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": "image", **options}


def _datalist(num_channels: int) -> str:
    """Cases of the input folder: a file each, or one a channel, told by nnU-Net's suffixes."""
    if num_channels == 1:
        return "$sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    return (
        "$[[f.replace('_0000.nii', '_%04d.nii' % c) for c in range("
        f"{num_channels})] for f in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))]"
    )


def _preprocessing(plan: Plan) -> list[Step]:
    return [
        _on_image("LoadImaged", dtype="$np.float32"),
        # MONAI Deploy leaves out the transform that loads, and gives its own image to the next.
        _on_image("EnsureChannelFirstd"),
        _on_image("EnsureTyped", dtype="$torch.float32"),
        _on_image("Orientationd", axcodes="RAS", labels=RAS_LABELS),
        _on_image("CropForegroundd", source_key="image", select_fn=FOREGROUND, allow_smaller=True),
        *_normalization(plan.channels),
        *_resampling(plan.anisotropic_axis),
        {"_target_": "DeleteItemsd", "keys": "grid"},
    ]


def _normalization(channels: tuple[ChannelPlan, ...]) -> list[Step]:
    """Normalisation before resampling; the body comes first, which is told by voxels that are still exactly 0."""
    steps: list[Step] = []
    if any(_takes_body(channel) for channel in channels):
        # `copy_` keeps the image's own record of where it lies.
        steps.append(
            _on_image("Lambdad", func="$lambda x: x.copy_(@normalize_body(x.as_tensor(), @body(x.as_tensor())))")
        )
    if any(channel.scheme == "ct" for channel in channels):
        lower = [channel.lower if channel.scheme == "ct" else -inf for channel in channels]
        upper = [channel.upper if channel.scheme == "ct" else inf for channel in channels]
        steps.append(_on_image("Lambdad", func=f"$lambda x: x.clamp_({_column(lower)}, {_column(upper)})"))
    pairs = [_subtrahend_and_divisor(channel) for channel in channels]
    if any(pair != (0.0, 1.0) for pair in pairs):
        subtrahend, divisor = ([pair[index] for pair in pairs] for index in (0, 1))
        steps.append(_on_image("NormalizeIntensityd", subtrahend=subtrahend, divisor=divisor, channel_wise=True))
    return steps


def _body_expressions(channels: tuple[ChannelPlan, ...]) -> dict[str, str]:
    """What `_normalization` needs where a channel is normalised over the body alone."""
    if not any(_takes_body(channel) for channel in channels):
        return {}
    parts = [f"@over_body(x[{c}], body)" if _takes_body(channel) else f"x[{c}]" for c, channel in enumerate(channels)]
    joined = f"$lambda x, body: torch.stack([{', '.join(parts)}])"
    return {"body": BODY, "over_body": OVER_BODY, "normalize_body": joined}


def _takes_body(channel: ChannelPlan) -> bool:
    return channel.scheme == "zscore" and channel.use_body_mask


def _subtrahend_and_divisor(channel: ChannelPlan) -> tuple[float | None, float | None]:
    """What MONAI subtracts and divides by; None stands for the image's own mean and standard deviation."""
    if channel.scheme == "ct":
        return channel.mean, channel.std
    return (None, None) if channel.scheme == "zscore" and not _takes_body(channel) else (0.0, 1.0)


def _column(values: list[float]) -> str:
    """A tensor (C, 1, 1, 1) as an expression."""
    shown = ", ".join(f"float('{value}')" if abs(value) == inf else repr(float(value)) for value in values)
    return f"torch.tensor([{shown}]).view(-1, 1, 1, 1)"


def _resampling(anisotropic_axis: int | None) -> list[Step]:
    """To the grid of the target spacing: cubic, and along an anisotropic axis the nearest slice, which comes last."""
    cubic = _resample_to_grid(3, "nearest")
    shape = "@grid_shape(d['image'])"
    if anisotropic_axis is None:
        return [_make_grid(f"@grid(d['image'], {shape})"), cubic]
    axis, native = anisotropic_axis, "d['image'].shape[1:]"
    in_plane = ", ".join(f"{native}[{a}]" if a == axis else f"{shape}[{a}]" for a in range(3))
    up = f"{TIE_VOXELS} * ({shape}[{axis}] != {native}[{axis}])"
    was_resampled = f"d['image'].applied_operations[-1]['orig_size'][{axis}] != {native}[{axis}]"
    return [
        _make_grid(f"@grid(d['image'], ({in_plane}))"),
        cubic,
        _make_grid(f"@move(@grid(d['image'], {shape}), {axis}, {up})"),
        _resample_to_grid("nearest", "border"),
        f"$lambda d: {{**d, 'image': @move(d['image'], {axis}, {-2 * TIE_VOXELS} * ({was_resampled}))}}",
    ]


def _make_grid(grid: str) -> str:
    return f"$lambda d: {{**d, 'grid': {grid}}}"


def _resample_to_grid(mode: int | str, padding_mode: str) -> Step:
    return _on_image(
        "ResampleToMatchd",
        key_dst="grid",
        mode=mode,
        padding_mode=padding_mode,
        align_corners=False,
        dtype="$np.float32",
    )


def _postprocessing(plan: Plan) -> list[Step]:
    values = list(plan.label_values)
    dtype = f"$np.{smallest_integer(min(values), max(values)).name}"
    indices = list(range(plan.num_classes))
    renamed = {"_target_": "MapLabelValued", "keys": "pred", "orig_labels": indices, "target_labels": values}
    return [
        # MONAI Deploy hands a dictionary only to what begins with a transform of dictionaries.
        {"_target_": "EnsureTyped", "keys": "pred"},
        LINEAR_BACK,
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
        *([] if values == indices else [renamed]),
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "seg",
            "output_ext": ".nii.gz",
            "output_dtype": dtype,
            "resample": False,
            "separate_folder": False,
        },
    ]
