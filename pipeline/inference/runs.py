"""Trained runs, one or several that are asked together: loaded once, after it is known that they fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.allocation import network_threads
from pipeline.config import PredictOptions
from pipeline.errors import InputError
from pipeline.inference.ensemble import Member
from pipeline.inference.loading import (
    as_trained,
    find_checkpoint,
    load_weights,
    read_mirror_axes,
    read_plan,
    read_precision,
    trained_mirror_axes,
)
from pipeline.inference.postprocess import Step, read_postprocessing
from pipeline.log import get_logger
from pipeline.networks.precision import DeviceType, PrecisionChoice, choose_device_type, choose_precision
from pipeline.networks.unet import UNet
from pipeline.networks.weights import read_weights
from pipeline.plan import Plan, Precision
from pipeline.run_files import RunFiles
from pipeline.sizes import GIB

ONE_PLAN = "Combine runs of one plan, as the folds of a cross-validation are"


@dataclass(frozen=True, eq=False)
class LoadedRuns:
    """What a prediction needs of trained runs.

    Attributes:
        plan: Of the first; what images and classes are is the same for all.
        members: The networks, on their device and in evaluation mode.
        device_type: Where they are.
        precision: What they compute in.
        postprocessing: What is done to their segmentations.
    """

    plan: Plan
    members: tuple[Member, ...]
    device_type: DeviceType
    precision: Precision
    postprocessing: tuple[Step, ...]


def load_runs(run_dirs: Sequence[Path], options: PredictOptions, *, network: nn.Module | None = None) -> LoadedRuns:
    """Load the weights of all runs.

    Args:
        run_dirs: Run folders: `plan.json`, `checkpoints/`, and for mirroring `config.yaml`.
        options: How they are asked.
        network: A network of one's own that the runs were trained with; None builds the plans' U-Nets.

    Raises:
        InputError: The runs do not fit each other, one has no plan or no such checkpoint, its weights are another
            network's, there is no GPU, or mirroring is asked of a run that was trained without.
    """
    plans = {run_dir: as_trained(read_plan(run_dir), run_dir) for run_dir in run_dirs}
    check_fit(plans)
    checkpoints = {run_dir: find_checkpoint(run_dir, options.checkpoint) for run_dir in run_dirs}
    axes = {run_dir: _mirrored_axes(run_dir, options) for run_dir in run_dirs}
    steps = common_postprocessing(plans) if options.postprocess == "auto" else ()
    device_type = choose_device_type(options.accelerator)
    members = []
    for run_dir, plan in plans.items():
        # Every run fills a network of its own.
        own = _make_network(plan) if network is None else network if not members else deepcopy(network)
        load_weights(own, read_weights(checkpoints[run_dir]), where=run_dir)
        members.append(Member(own.eval().to(device_type), plan.patch_size, axes[run_dir]))
    choice = _choose_precision(plans, device_type)
    if device_type == "cpu":
        torch.set_num_threads(network_threads() if options.num_threads == "auto" else options.num_threads)
    _say_what_is_loaded(members, device_type, choice)
    return LoadedRuns(plans[run_dirs[0]], tuple(members), device_type, choice.precision, steps)


def check_fit(plans: Mapping[Path, Plan]) -> None:
    """Refuse runs whose networks do not see the same images, or do not give the same classes; patches may differ.

    Raises:
        InputError: It names the first difference.
    """
    (first, wanted), *others = plans.items()
    for run_dir, plan in others:
        difference = _difference(plan, wanted)
        if difference:
            raise InputError(f"does not go with {first}: {difference}", where=run_dir, fix=ONE_PLAN)


def _difference(plan: Plan, other: Plan) -> str:
    names = ([channel.name for channel in each.channels] for each in (plan, other))
    compared = {
        "classes": (plan.labels, other.labels),
        # Their order is the order of the scores.
        "order of the classes": (plan.class_names, other.class_names),
        "channels": tuple(names),
        "target spacing": (plan.target_spacing, other.target_spacing),
        "anisotropic axis": (plan.anisotropic_axis, other.anisotropic_axis),
    }
    for name, (found, wanted) in compared.items():
        if found != wanted:
            return f"{name} {_short(found)}, there {_short(wanted)}"
    for channel, wanted_channel in zip(plan.channels, other.channels, strict=True):
        if channel != wanted_channel:
            names_of = [name for name, value in vars(channel).items() if value != getattr(wanted_channel, name)]
            values = [{name: getattr(each, name) for name in names_of} for each in (channel, wanted_channel)]
            return f"normalisation of {channel.name} {_short(values[0])}, there {_short(values[1])}"
    return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def common_postprocessing(plans: Mapping[Path, Plan]) -> tuple[Step, ...]:
    """The post-processing that was chosen for all runs alike; none, with a warning, where it differs.

    What was chosen on the few cases of one fold is not known to help an ensemble, so it is not taken from one of them.

    Raises:
        InputError: A run's `postprocessing.json` cannot be read.
    """
    with_choice = {run_dir: plan for run_dir, plan in plans.items() if RunFiles(run_dir).postprocessing.is_file()}
    chosen = {run_dir: read_postprocessing(run_dir, plan).steps for run_dir, plan in with_choice.items()}
    if not chosen:
        return ()
    if len(chosen) == len(plans) and len(set(chosen.values())) == 1:
        steps = next(iter(chosen.values()))
        get_logger("predict").info("%d step(s) of post-processing from postprocessing.json", len(steps))
        return steps
    lacking = [str(run_dir) for run_dir in plans if run_dir not in chosen]
    why = f"{', '.join(lacking)} without" if lacking else "they differ"
    get_logger("predict").warning(
        "no post-processing: postprocessing.json was not chosen for all runs together (%s); `voxfit postprocess` with "
        "all of them as --run_dir does that",
        why,
    )
    return ()


def _mirrored_axes(run_dir: Path, options: PredictOptions) -> tuple[int, ...]:
    if options.tta == "none":
        return ()
    if isinstance(options.tta_axes, str):
        return read_mirror_axes(run_dir)
    chosen = tuple(sorted(set(options.tta_axes)))
    unseen = set(chosen) - set(trained_mirror_axes(run_dir))
    if unseen:
        named = ", ".join(str(axis) for axis in sorted(unseen))
        get_logger("predict").warning("%s was trained without mirroring axis %s", run_dir, named)
    return chosen


def _choose_precision(plans: Mapping[Path, Plan], device_type: DeviceType) -> PrecisionChoice:
    """What all runs were trained in; float32, which serves every network, where that differs."""
    trained = {read_precision(run_dir) or plan.precision for run_dir, plan in plans.items()}
    if len(trained) > 1:
        return PrecisionChoice("32-true", f"the runs were trained in {' and '.join(sorted(trained))}")
    return choose_precision(trained.pop(), device_type=device_type)


def _say_what_is_loaded(members: Sequence[Member], device_type: DeviceType, choice: PrecisionChoice) -> None:
    if len(members) == 1:
        get_logger("predict").info("network on %s in %s (%s)", device_type, *choice)
        return
    size = sum(tensor.nbytes for member in members for tensor in member.network.state_dict().values())
    get_logger("predict").info(
        "%d networks on %s in %s (%s), %.2f GiB of weights", len(members), device_type, *choice, size / GIB
    )


def _make_network(plan: Plan) -> UNet:
    """The plan's U-Net; windows of the size of its patch fit where the training step did."""
    return UNet(
        plan.num_channels,
        plan.num_classes,
        plan.network,
        slab_stages=plan.slab_stages,
        offload_stages=plan.offload_stages,
    )
