"""Which series of a tree its structure sets and segmentations were drawn on."""

from __future__ import annotations

from collections import defaultdict

from pipeline.datasets.dicom_scan import Scan
from pipeline.io.dicom.headers import Header
from pipeline.io.dicom.series import Series


def objects_of(scan: Scan) -> dict[str, tuple[Header, ...]]:
    """Structure sets and segmentations by the key of the series that they were drawn on.

    Segmentations that this program has made are left aside where a series has others: they are no truth to learn from.
    """
    return {
        key: tuple(label for label in labels if not label.is_own) or tuple(labels)
        for key, labels in _drawn_on(scan).items()
    }


def unplaced_objects(scan: Scan) -> tuple[Header, ...]:
    """Structure sets and segmentations whose series is not in the tree."""
    placed = {label.path for labels in _drawn_on(scan).values() for label in labels}
    return tuple(label for label in scan.label_objects if label.path not in placed)


def _drawn_on(scan: Scan) -> dict[str, list[Header]]:
    """All objects by the key of their series.

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
    return found


def num_in_space(scan: Scan, label: Header) -> int:
    """Series in the frame of reference of a structure set or segmentation that names none."""
    return 0 if label.referenced_series else sum(_is_same_space(series, label) for series in scan.series)


def _is_same_space(series: Series, label: Header) -> bool:
    return bool(label.frame_of_reference) and series.first.frame_of_reference == label.frame_of_reference


def shared_parts(image: Header, label: Header) -> int:
    """How many folders two files have in common: of several copies the nearest is meant."""
    return sum(a == b for a, b in zip(image.path.parts, label.path.parts, strict=False))
