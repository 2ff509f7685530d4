"""nnU-Net raw layout: `dataset.json`, `imagesTr/<case>_0000<ending>`, `labelsTr/<case><ending>`, `imagesTs`.

The format is nnU-Net's, documentation/dataset_format.md; its v2 may also list the files of each case under `dataset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from pipeline.artifacts import read_artifact
from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.class_names import declared_classes
from pipeline.datasets.listing import (
    check_cases,
    check_names,
    declared_channels,
    nifti_files,
    split_channel,
    stem_of,
    unlisted_files,
)
from pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The files of one case, relative to the dataset's folder."""

    __pydantic_config__ = ConfigDict(extra="ignore")
    images: list[str]
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class _NnunetFile:
    """The keys of dataset.json that matter here."""

    __pydantic_config__ = ConfigDict(extra="ignore")
    labels: dict[str, object]
    channel_names: dict[str, str] | None = None
    modality: dict[str, str] | None = None
    file_ending: str = ".nii.gz"
    dataset: dict[str, _Entry] | None = None
    name: str = ""


def read_nnunet_raw(path: Path) -> Dataset:
    """Read an nnU-Net raw dataset from its `dataset.json`.

    Args:
        path: The JSON file; images and labels lie in folders beside it.

    Raises:
        InputError: The file does not fit the format, declares overlapping regions, or there is no training case.
    """
    content = read_artifact(path, _NnunetFile)
    check_names([f"file_ending {content.file_ending}"], path)
    declared = content.channel_names or content.modality
    if not declared:
        raise InputError("channel_names: missing", where=path, fix='Add "channel_names": {"0": "CT"} or the like')
    channels = declared_channels(declared, path)
    classes = declared_classes(content.labels, path)
    cases = check_cases(_training_cases(content, path, len(channels)), path)
    if not cases:
        raise InputError("no training case lies in imagesTr and labelsTr beside it", where=path)
    return Dataset(
        name=content.name or path.parent.name,
        root=path.parent,
        channel_names=channels,
        labels=classes.labels,
        ignore_value=classes.ignore_value,
        cases=cases,
        test_cases=check_cases(_cases_in(path.parent / "imagesTs", None, content.file_ending, len(channels)), path),
        unlisted_files=unlisted_files([path.parent / "imagesTr", path.parent / "labelsTr"], cases),
    )


def _training_cases(content: _NnunetFile, path: Path, num_channels: int) -> list[Case]:
    root = path.parent
    if content.dataset is None:
        return _cases_in(root / "imagesTr", root / "labelsTr", content.file_ending, num_channels)
    return [
        Case(
            case_id=case_id,
            images=tuple(root / name for name in entry.images),
            label=root / entry.label if entry.label else None,
        )
        for case_id, entry in content.dataset.items()
    ]


def _cases_in(images: Path, labels: Path | None, ending: str, num_channels: int) -> list[Case]:
    """Every case that has an image or a label; a channel that is missing beside others is expected at its place."""
    with_image = {
        found[0]: None
        for path in nifti_files(images)
        if path.name.endswith(ending) and (found := split_channel(stem_of(path)))
    }
    label_by_id = {stem_of(path): path for path in nifti_files(labels) if path.name.endswith(ending)} if labels else {}
    return [
        Case(
            case_id=case_id,
            images=tuple(images / f"{case_id}_{channel:04d}{ending}" for channel in range(num_channels))
            if case_id in with_image
            else (),
            label=label_by_id.get(case_id),
        )
        for case_id in with_image | dict.fromkeys(label_by_id)
    ]
