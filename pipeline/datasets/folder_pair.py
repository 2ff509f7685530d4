"""A bare pair of folders, `images` and `labels` or `imagesTr` and `labelsTr`, paired by file name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from pipeline.datasets.case import Case, Dataset
from pipeline.datasets.class_names import classes_beside
from pipeline.datasets.listing import check_cases, counted_channels, nifti_files, split_channel, stem_of, unlisted_files
from pipeline.errors import InputError

FOLDER_PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
TEST_FOLDER = "imagesTs"


def find_folder_pair(root: Path) -> tuple[Path, Path] | None:
    """The pair of folders in `root`, if there is one."""
    pairs = [(root / images, root / labels) for images, labels in FOLDER_PAIRS]
    return next((pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()), None)


def read_folder_pair(root: Path, images: Path, labels: Path) -> Dataset:
    """Read images and labels of the same name, or images with nnU-Net's channel suffix `_0000`.

    Classes come from `labels.json` in `root` where it exists, else from the label files.

    Raises:
        InputError: The folders hold no volumes, or no label holds a class.
    """
    label_by_id = {stem_of(path): path for path in nifti_files(labels)}
    images_by_id = _images_by_id(nifti_files(images), label_by_id)
    ids = sorted(images_by_id | label_by_id)
    if not ids:
        raise InputError("holds no NIfTI files", where=f"{images} and {labels}")
    found = [Case(case_id=i, images=images_by_id.get(i, ()), label=label_by_id.get(i)) for i in ids]
    cases = check_cases(found, root)
    tests = _images_by_id(nifti_files(root / TEST_FOLDER), ())
    classes = classes_beside([root / "labels.json"], list(label_by_id.values()), root)
    return Dataset(
        name=root.resolve().name,
        root=root,
        channel_names=counted_channels(cases),
        labels=classes.labels,
        ignore_value=classes.ignore_value,
        cases=cases,
        test_cases=check_cases([Case(case_id=i, images=files, label=None) for i, files in tests.items()], root),
        unlisted_files=unlisted_files([images, labels], cases),
    )


def _images_by_id(files: Sequence[Path], label_ids: Container[str]) -> dict[str, tuple[Path, ...]]:
    """Files of each case: `_0000` is a channel only where every file has one and no label carries it too."""
    channels = [split_channel(stem_of(path)) for path in files]
    if not all(channels) or any(stem_of(path) in label_ids for path in files):
        return {stem_of(path): (path,) for path in files}
    grouped: dict[str, list[Path]] = defaultdict(list)
    for path, channel in zip(files, channels, strict=True):
        if channel is not None:
            grouped[channel[0]].append(path)
    return {case_id: tuple(paths) for case_id, paths in grouped.items()}
