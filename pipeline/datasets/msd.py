"""Medical Segmentation Decathlon layout: `dataset.json` with a list of cases, also known as a MONAI datalist.

The format is described in Antonelli et al. 2022, "The Medical Segmentation Decathlon", doi 10.1038/s41467-022-30695-9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict

from pipeline.artifacts import read_artifact
from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.class_names import Classes, declared_classes, discovered_classes
from pipeline.datasets.listing import (
    check_cases,
    check_names,
    counted_channels,
    declared_channels,
    split_channel,
    stem_of,
    unlisted_files,
)
from pipeline.errors import InputError
from pipeline.log import get_logger

DATASET_FILE = "dataset.json"
TRAINING_FOLDERS = ("imagesTr", "labelsTr")


@dataclass(frozen=True, kw_only=True)
class _Item:
    """One case of the list; `case_id` and `patient` are ours, the rest is the Decathlon's."""

    __pydantic_config__ = ConfigDict(extra="ignore")
    image: str | list[str]
    label: str | None = None
    case_id: str = ""
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class _MsdFile:
    """The keys of dataset.json that matter here."""

    __pydantic_config__ = ConfigDict(extra="ignore")
    training: list[_Item]
    validation: list[_Item] = field(default_factory=list)
    test: list[str | _Item] = field(default_factory=list)
    labels: dict[str, object] | None = None
    modality: dict[str, str] | list[str] | str | None = None
    channel_names: dict[str, str] | list[str] | str | None = None
    name: str = ""


def read_msd(path: Path, *, is_list: bool = False) -> Dataset:
    """Read a Decathlon-style JSON file; its paths are relative to its folder.

    Args:
        path: The JSON file.
        is_list: The file is the bare list of cases, without the keys around it.

    Raises:
        InputError: The file does not fit the format (all keys at fault are named), or lists no training case.
    """
    content = _MsdFile(training=read_artifact(path, list[_Item])) if is_list else read_artifact(path, _MsdFile)
    if content.validation:
        get_logger().warning("%s: the list `validation` is not used; voxfit makes its own folds", path)
    tests = [_Item(image=item) if isinstance(item, str) else item for item in content.test]
    cases = check_cases(_cases(content.training, path), path)
    if not cases:
        raise InputError("`training` lists no case", where=path)
    channels = content.channel_names or content.modality
    classes = _classes(content, cases, path)
    folders = [path.parent / name for name in TRAINING_FOLDERS] if path.name == DATASET_FILE else []
    return Dataset(
        name=content.name or (path.parent.name if path.name == DATASET_FILE else path.stem),
        root=path.parent,
        channel_names=declared_channels(channels, path) if channels else counted_channels(cases),
        labels=classes.labels,
        ignore_value=classes.ignore_value,
        cases=cases,
        test_cases=check_cases(_cases(tests, path), path),
        unlisted_files=unlisted_files(folders, cases),
    )


def _classes(content: _MsdFile, cases: Sequence[Case], path: Path) -> Classes:
    if content.labels is not None:
        return declared_classes(content.labels, path)
    return discovered_classes([case.label for case in cases if case.label], path)


def _cases(items: Sequence[_Item], path: Path) -> list[Case]:
    used = [item for item in items if not Path(_first_name(item)).name.startswith("._")]
    counts = Counter(_short_id(item) for item in used)
    return [
        Case(
            case_id=_short_id(item) if item.case_id or counts[_short_id(item)] == 1 else _long_id(item),
            images=_image_files(item, path),
            label=path.parent / item.label if item.label else None,
            patient=item.patient,
        )
        for item in used
    ]


def _first_name(item: _Item) -> str:
    names = [item.image] if isinstance(item.image, str) else item.image
    return names[0] if names else item.label or ""


def _short_id(item: _Item) -> str:
    stem = stem_of(Path(_first_name(item)))
    channel = split_channel(stem)
    # `case_0000` alone may well be case number 0; of several files, the number is the channel.
    several = not isinstance(item.image, str) and len(item.image) > 1
    return item.case_id or (channel[0] if channel and several else stem)


def _long_id(item: _Item) -> str:
    """Folder and name, for lists such as `patient_7/t1.nii.gz` where the names alone repeat."""
    name = Path(_first_name(item))
    parts = [part for part in name.parent.parts if part not in ("..", name.anchor)]
    return "_".join([*parts, stem_of(name)])


def _image_files(item: _Item, path: Path) -> tuple[Path, ...]:
    names = [item.image] if isinstance(item.image, str) else item.image
    check_names([*names, *([item.label] if item.label else [])], path)
    files = [path.parent / name for name in names]
    return tuple(files if len(files) != 1 or files[0].exists() else _numbered_files(files[0]) or files)


def _numbered_files(path: Path) -> list[Path]:
    """The files `<stem>_0000`, `<stem>_0001`, ...: nnU-Net v1 lists the case's name without the channel."""
    stem, found = stem_of(path), list[Path]()
    suffix = path.name[len(stem) :]
    while (candidate := path.with_name(f"{stem}_{len(found):04d}{suffix}")).exists():
        found.append(candidate)
    return found
