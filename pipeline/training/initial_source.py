"""The run whose weights another training begins with: its checkpoint, its plan, and what is otherwise in that plan."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.artifacts import read_artifact
from pipeline.datasets.splits import Splits, select_fold
from pipeline.errors import InputError
from pipeline.geometry import format_spacing
from pipeline.networks.weights import has_averaged, hash_weights, load_checkpoint, weights_of
from pipeline.plan import ChannelPlan, NetworkPlan, Plan
from pipeline.planning.topology import make_topology
from pipeline.training.checkpoints import COUNTS_KEY, check_sums
from pipeline.training.run_folder import RunFolder

# Of a voxel's edge; what is less is rounding.
SPACING_TOLERANCE = 0.01
# Of the network's shape, what its weights do not depend on.
FREE_IN_NETWORK = ("deep_supervision",)


class Source(NamedTuple):
    """A checkpoint that a training may begin with.

    Attributes:
        checkpoint: The file.
        weights: By the network's own keys, on the CPU; the averaged ones where it has them.
        averaged: Whether it has.
        epoch: Epochs that it was trained for.
        plan: Of its run; None for a file that lies in no run folder.
        trained_on: Case ids that it was trained on; empty where that is not known.
    """

    checkpoint: Path
    weights: dict[str, Tensor]
    averaged: bool
    epoch: int
    plan: Plan | None
    trained_on: frozenset[str]

    @property
    def weights_hash(self) -> str:
        """A short hash of names and values."""
        return hash_weights(self.weights)


def read_source(init_from: str) -> Source:
    """Read the best checkpoint of a run folder, or the checkpoint itself.

    Raises:
        InputError: There is none, or it is torn, damaged, was not written by voxfit, or its weights are no numbers.
    """
    checkpoint = find_source(init_from)
    content = load_checkpoint(checkpoint)
    weights = {key: value for key, value in weights_of(content, checkpoint).items() if isinstance(value, Tensor)}
    try:
        check_sums(checkpoint)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"is damaged ({error})", where=checkpoint, fix="Use the other checkpoint of the run"
        ) from error
    _check_finite(weights, checkpoint)
    run = RunFolder(checkpoint.parent.parent)
    is_in_run = checkpoint.parent == run.best_checkpoint.parent and run.plan.is_file()
    return Source(
        checkpoint=checkpoint,
        weights=weights,
        averaged=has_averaged(content),
        epoch=_epoch_of(content),
        plan=read_artifact(run.plan, Plan) if is_in_run else None,
        trained_on=_trained_on(run) if is_in_run else frozenset(),
    )


def _check_finite(weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    # The first loss would be NaN, and blamed on a case or the rate.
    broken = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        what = f"{len(broken)} of {len(weights)} tensors hold NaN or infinity, the first is {broken[0]}"
        raise InputError(what, where=checkpoint, fix="Give a checkpoint from before its training diverged")


def find_source(init_from: str) -> Path:
    """The checkpoint that `init_from` means.

    Raises:
        InputError: There is none.
    """
    path = Path(init_from)
    if path.is_file():
        return path
    where = f"init_from {path}"
    if not path.is_dir():
        raise InputError("does not exist", where=where, fix="Give a run folder, or a checkpoint in one")
    run = RunFolder(path)
    if run.best_checkpoint.is_file():
        return run.best_checkpoint
    if run.last_checkpoint.is_file():
        fix = f"Give {run.last_checkpoint} to take the weights as they are now"
        raise InputError("has no best checkpoint yet", where=where, fix=fix)
    runs = sorted(str(each.parent) for each in path.glob(f"*/{run.record.name}"))
    fix = f"Give one of its runs: {', '.join(runs[:5])}" if runs else "Give a run folder of `voxfit train`"
    raise InputError("is no run folder: it has no checkpoints", where=where, fix=fix)


def _epoch_of(content: Mapping[str, object]) -> int:
    counts = content.get(COUNTS_KEY)
    epoch = counts.get("epoch") if isinstance(counts, dict) else None
    return epoch if isinstance(epoch, int) else 0


def _trained_on(run: RunFolder) -> frozenset[str]:
    record = run.read_record()
    if record is None or not run.splits.is_file():
        return frozenset()
    return frozenset(select_fold(read_artifact(run.splits, Splits), record.fold).train)


def network_differences(there: NetworkPlan, here: NetworkPlan) -> list[str]:
    """Figures of the networks' shapes that differ, each as `name (there ..., here ...)`; heads may be others."""
    names = [name for name in NetworkPlan.__dataclass_fields__ if name not in FREE_IN_NETWORK]
    pairs = {name: (getattr(there, name), getattr(here, name)) for name in names}
    return [f"{name} (there {a}, here {b})" for name, (a, b) in pairs.items() if a != b]


def planning_advice(there: Plan) -> str:
    """How to come to a plan with the same network."""
    network, patch, spacing = there.network, list(there.patch_size), list(there.target_spacing)
    options = {
        "base_features": network.features_per_stage[0],
        "max_features": max(network.features_per_stage),
        "block": network.block,
        "norm": network.norm,
        "num_groups": network.num_groups,
    }
    made = make_topology(there.patch_size, there.target_spacing, deep_supervision=network.deep_supervision, **options)
    if made != network:
        return "Copy `network` from the plan.json of its run into this one, with a patch that its strides divide"
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    return f'Plan with the same network: --patch_size "{patch}" --target_spacing "{spacing}" {flags}'


def describe_differences(source: Source, plan: Plan, validation: Sequence[str]) -> Iterator[str]:
    """What the weights have learnt otherwise than they are used here, a sentence each.

    Args:
        source: Where they come from.
        plan: Of the training that begins.
        validation: Its validation cases.
    """
    if source.plan is None:
        yield "the checkpoint lies in no run folder, so spacing, normalisation and classes were not compared"
        return
    there = source.plan
    pairs = zip(there.target_spacing, plan.target_spacing, strict=True)
    if any(abs(a - b) > SPACING_TOLERANCE * b for a, b in pairs):
        sizes = (format_spacing(each.target_spacing) for each in (there, plan))
        yield "voxels are of {} mm there and of {} mm here".format(*sizes)
    yield from _channel_differences(there.channels, plan.channels)
    if there.num_classes == plan.num_classes and there.class_names != plan.class_names:
        names = (", ".join(each.class_names[1:]) for each in (there, plan))
        yield "the head was kept, though its classes are {} there and {} here".format(*names)
    if seen := len(source.trained_on.intersection(validation)):
        yield (
            f"{seen} of {len(validation)} validation cases have the names of cases that the weights were trained on,"
            " which would flatter their scores"
        )


def _channel_differences(there: Sequence[ChannelPlan], here: Sequence[ChannelPlan]) -> Iterator[str]:
    if len(there) != len(here):
        names = (", ".join(channel.name for channel in each) for each in (there, here))
        yield "channels are {} there and {} here".format(*names)
        return
    for number, (a, b) in enumerate(zip(there, here, strict=True), start=1):
        if (before := _normalisation(a)) != (now := _normalisation(b)):
            yield f"channel {number} is {before} there and {now} here"


def _normalisation(channel: ChannelPlan) -> str:
    """Name and normalisation, to the digits that matter."""
    if channel.scheme == "ct":
        figures = (
            f"clipped to {channel.lower:.4g} .. {channel.upper:.4g}, mean {channel.mean:.4g}, std {channel.std:.4g}"
        )
        return f"{channel.name} (ct: {figures})"
    masked = " within the body" if channel.scheme == "zscore" and channel.use_body_mask else ""
    return f"{channel.name} ({channel.scheme}{masked})"
