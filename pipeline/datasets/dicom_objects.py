"""Which series of a tree its structure sets and segmentations were drawn on."""

from __future__ import annotations

from collections import defaultdict

from pipeline.datasets.dicom_scan import Scan
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.series import Series


def objects_of(scan: Scan) -> dict[str, tuple[Header, ...]]:
    """Structure sets and segmentations by the key of the series that they were drawn on.

    Where the same series lies in several folders, an object belongs to the nearest copy. One that names several series
    belongs to each of them, and one that names none to the only one in its frame of reference.
    """
    volumes = [series for series in scan.series if not series.left_out]
    found: dict[str, list[Header]] = defaultdict(list)
    for label in scan.label_objects:
        if label.referenced_series:
            drawn_on = [series for series in volumes if series.first.series_uid in label.referenced_series]
        else:
            drawn_on = [series for series in volumes if _is_same_space(series, label)]
            drawn_on = drawn_on if len(drawn_on) == 1 else []
        for uid in dict.fromkeys(series.first.series_uid for series in drawn_on):
            copies = [series for series in drawn_on if series.first.series_uid == uid]
            nearest = max(copies, key=lambda series: shared_parts(series.first, label))
            found[nearest.key].append(label)
    return {key: _without_own(labels) for key, labels in found.items()}


def _without_own(labels: list[Header]) -> tuple[Header, ...]:
    """Without segmentations that this program has made, where a series has others: they are no truth to learn from."""
    others = tuple(label for label in labels if not label.is_own)
    return others or tuple(labels)


def own_aside(scan: Scan) -> tuple[Header, ...]:
    """Segmentations made by this program that are left aside for others on the same series."""
    used = {label.path for labels in objects_of(scan).values() for label in labels}
    labelled = {uid for labels in objects_of(scan).values() for label in labels for uid in label.referenced_series}
    return tuple(
        label
        for label in scan.label_objects
        if label.is_own and label.path not in used and labelled & set(label.referenced_series)
    )


def unplaced_objects(scan: Scan) -> tuple[Header, ...]:
    """Structure sets and segmentations whose series is not in the tree."""
    used = {label.path for labels in objects_of(scan).values() for label in labels}
    used |= {label.path for label in own_aside(scan)}
    return tuple(label for label in scan.label_objects if label.path not in used)


def num_in_space(scan: Scan, label: Header) -> int:
    """Series in the frame of reference of a structure set or segmentation that names none."""
    return 0 if label.referenced_series else sum(_is_same_space(series, label) for series in scan.series)


def _is_same_space(series: Series, label: Header) -> bool:
    return bool(label.frame_of_reference) and series.first.frame_of_reference == label.frame_of_reference


def shared_parts(image: Header, label: Header) -> int:
    """How many folders two files have in common: of several copies the nearest is meant."""
    return sum(a == b for a, b in zip(image.path.parts, label.path.parts, strict=False))
