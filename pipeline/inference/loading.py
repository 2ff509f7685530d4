"""What prediction needs of a run folder: plan, checkpoint, weights, and the axes that training mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from pipeline.artifacts import read_artifact
from pipeline.config import AugmentationConfig
from pipeline.datasets.splits import Splits
from pipeline.errors import InputError
from pipeline.plan import Plan, Precision
from pipeline.run_files import RunFiles
from pipeline.run_record import known_record

if TYPE_CHECKING:
    from torch import Tensor, nn

PLAN_FIX = "Put back the plan.json that the run was trained with, or pass the network it was trained with"


def read_plan(run_dir: Path) -> Plan:
    """The plan that a run was trained with.

    Raises:
        InputError: The folder is no run, or its plan cannot be read.
    """
    path = RunFiles(run_dir).plan
    if not path.is_file():
        raise InputError("is no run folder: it has no plan.json", where=run_dir, fix="Give the folder of a training")
    return read_artifact(path, Plan)


def read_held_out(run_dir: Path) -> tuple[str, ...]:
    """Ids of the cases that a run was not trained on: the validation cases of its fold.

    Raises:
        InputError: The run has no `splits.json` or no options, or held out nothing.
    """
    files = RunFiles(run_dir)
    splits, fold = read_artifact(files.splits, Splits), _read_config(files.config).get("fold")
    if not isinstance(fold, int) or not 0 <= fold < len(splits.folds):
        raise InputError(f"the run held out no fold (fold: {fold})", where=run_dir, fix="Use --cases all")
    return splits.folds[fold].validation


def read_held_out_by_all(run_dirs: Sequence[Path]) -> tuple[str, ...]:
    """Ids of the cases that none of the runs was trained on.

    Raises:
        InputError: See `read_held_out`; or there are none, as of the folds of a cross-validation.
    """
    first, *others = [read_held_out(run_dir) for run_dir in run_dirs]
    common = tuple(case_id for case_id in first if all(case_id in held_out for held_out in others))
    if not common:
        raise InputError("no case was held out by all of the runs", fix="Predict with one run at a time")
    return common


def as_trained(plan: Plan, run_dir: Path) -> Plan:
    """The plan with patch and execution as the run came to use them: an out-of-memory may have stepped them down.

    Windows of the training patch see group statistics as training did. Runs without a readable record keep the plan's.
    """
    record = known_record(RunFiles(run_dir))
    if record is None:
        return plan
    reached = [each.to_rung for each in record.step_downs][-1:]
    stages = {name: getattr(rung, name) for rung in reached for name in ("slab_stages", "offload_stages")}
    return replace(plan, patch_size=record.patch_size or plan.patch_size, candidates=(), fallbacks=(), **stages)


def read_precision(run_dir: Path) -> Precision | None:
    """The precision that the run was trained in, from its `run.json`; None where it does not say."""
    record = known_record(RunFiles(run_dir))
    return next((known for known in get_args(Precision) if record is not None and known == record.precision), None)


def find_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The file of a run's checkpoint, "best" or "last".

    Raises:
        InputError: The run has no such checkpoint (the message names what it has).
    """
    folder = RunFiles(run_dir).checkpoints
    path = folder / f"{checkpoint}.ckpt"
    if path.is_file():
        return path
    others = sorted(item.stem for item in folder.glob("*.ckpt"))
    folds = sorted(str(item.parent.parent) for item in run_dir.glob(f"fold_*/{folder.name}/{path.name}"))
    if folds:
        what = "is a work folder, whose runs are the folders of its folds"
        raise InputError(what, where=run_dir, fix=f"Use {' '.join(folds)}")
    fix = f"Use --checkpoint {others[0]}" if others else "Train the run first"
    raise InputError(f"the run has no checkpoint {path.name}", where=run_dir, fix=fix)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    """Load weights into a network that must have exactly these.

    Raises:
        InputError: One line on the first difference in shape, or on the keys that are missing or too many.
    """
    expected = network.state_dict()
    for key in expected:
        if key in weights and weights[key].shape != expected[key].shape:
            found, wanted = list(weights[key].shape), list(expected[key].shape)
            what = f"the checkpoint's {key} is {found}, the network's {wanted}"
            raise InputError(f"{what}: another number of classes, channels or features", where=where, fix=PLAN_FIX)
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        first = f"it lacks {missing[0]}" if missing else f"it also has {extra[0]}"
        counts = f"{len(missing)} missing and {len(extra)} more"
        raise InputError(f"the checkpoint is of another network: {first} ({counts})", where=where, fix=PLAN_FIX)
    network.load_state_dict(dict(weights))


def read_mirror_axes(run_dir: Path) -> tuple[int, ...]:
    """The axes that training mirrored, where it did.

    Raises:
        InputError: Training did not mirror: a network that never saw a mirrored image is not to be asked about one.
    """
    axes = trained_mirror_axes(run_dir)
    if not axes:
        raise InputError("the run was trained without mirroring", where=run_dir, fix="Use --tta none")
    return axes


def trained_mirror_axes(run_dir: Path) -> tuple[int, ...]:
    """The axes that training mirrored, from the run's `config.yaml`, or its plan where that leaves them to it."""
    group = _read_augmentation(RunFiles(run_dir).config)
    known = {name: group[name] for name in ("enabled", "mirror", "mirror_axes") if name in group}
    return tuple(AugmentationConfig(**known).mirrored_axes(read_plan(run_dir).mirror_axes))


def _read_augmentation(path: Path) -> dict[str, Any]:
    group = _read_config(path).get("augmentation")
    return group if isinstance(group, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    """The run's options; empty where it has none."""
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError("is not valid YAML", where=path, fix="Restore the file that training wrote") from error
    return config if isinstance(config, dict) else {}
