"""What the store knows besides voxels: of itself (`store.json`) and of each case (`cases/<case>.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pipeline.geometry import Shape3, Spacing
from pipeline.plan import ChannelPlan, Plan, Record

IGNORE_INDEX = -1
"""Class index of voxels that take no part in the loss."""

# Raised whenever the same files and plan would give other voxels: cases of an older version are then made anew.
PREPROCESSING_VERSION = 2

Slices3 = tuple[slice, slice, slice]


@dataclass(frozen=True)
class PatchLocation:
    """A box of voxels of a volume.

    Attributes:
        start: First voxel along i, j, k; may be negative.
        size: Voxels along i, j, k; the end may pass the volume.
    """

    start: Shape3
    size: Shape3

    def overlap(self, shape: Shape3) -> tuple[Slices3, Slices3] | None:
        """Where the box and a volume of `shape` overlap: in the volume and in the box; None where they do not."""
        in_volume, in_box = [], []
        for start, size, length in zip(self.start, self.size, shape, strict=True):
            low, high = max(start, 0), min(start + size, length)
            if low >= high:
                return None
            in_volume.append(slice(low, high))
            in_box.append(slice(low - start, high - start))
        return (in_volume[0], in_volume[1], in_volume[2]), (in_box[0], in_box[1], in_box[2])


@dataclass(frozen=True, kw_only=True)
class SourceFile(Record):
    """State of a file that a case was made from: no path is kept, so a store can be handed on.

    Attributes:
        size: In bytes.
        mtime_ns: Time of the last change; together with `size` it tells without reading that nothing changed.
        sha256: Of the bytes.
    """

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CaseSource:
    """What a case is made from.

    Attributes:
        patient: Whom it shows; "" is unknown, and the case then counts as a patient of its own.
        key: Hash of everything that the stored voxels follow from; part of the data files' names.
        files: State of the files, images first.
    """

    patient: str = ""
    key: str = "0" * 16
    files: tuple[SourceFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CaseRecord(Record):
    """What is known of a stored case without reading its voxels.

    Attributes:
        case_id, patient: As in the dataset.
        shape: Stored voxels along i, j, k.
        spacing: Their size in millimetres.
        voxels_by_class: True number of voxels of each class, background first; ignored voxels are not counted.
        native_shape: Of the whole image in RAS order, before cropping.
        crop_start, crop_shape: The box of the native image that is stored.
        native_affine: 4x4, native voxel indices to RAS+ millimetres.
        key: Hash of the source files' content and the settings that the voxels follow from.
        files: State of the source files when they were read.
        data_bytes: Size of each data file; a file of another size is damaged.
        data_crc32: Checksum of each data file; none in records of earlier versions.
    """

    case_id: str
    patient: str
    shape: Shape3
    spacing: Spacing
    voxels_by_class: tuple[int, ...]
    native_shape: Shape3
    crop_start: Shape3
    crop_shape: Shape3
    native_affine: tuple[tuple[float, ...], ...]
    key: str
    files: tuple[SourceFile, ...]
    data_bytes: dict[str, int]
    data_crc32: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoreInfo(Record):
    """What all cases of a store have in common: the plan's keys that preprocessing depends on.

    Attributes:
        schema_version: Version of the store's layout.
        preprocessing_version: Of the code that made the voxels.
        channels, labels, ignore_value, target_spacing, anisotropic_axis: As in the plan.
        patch_size: What chunks were fitted to; any other patch can be read too, only slower.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    schema_version: int = 1
    preprocessing_version: int = PREPROCESSING_VERSION
    channels: tuple[ChannelPlan, ...]
    labels: dict[str, int]
    ignore_value: int | None
    target_spacing: Spacing
    anisotropic_axis: Literal[0, 1, 2] | None
    patch_size: Shape3

    @classmethod
    def of(cls, plan: Plan) -> StoreInfo:
        """The keys of `plan` that matter here."""
        return cls(
            channels=plan.channels,
            labels=plan.labels,
            ignore_value=plan.ignore_value,
            target_spacing=plan.target_spacing,
            anisotropic_axis=plan.anisotropic_axis,
            patch_size=plan.patch_size,
        )

    @property
    def num_channels(self) -> int:
        """Channels of every image."""
        return len(self.channels)

    @property
    def num_classes(self) -> int:
        """Classes, background included."""
        return len(self.labels)

    @property
    def settings(self) -> dict[str, Any]:
        """What stored voxels follow from besides the files; names and unused statistics are left out."""
        return {
            "channels": [_normalization(channel) for channel in self.channels],
            "labels": list(self.labels.values()),
            "ignore_value": self.ignore_value,
            "target_spacing": list(self.target_spacing),
            "anisotropic_axis": self.anisotropic_axis,
            "preprocessing_version": self.preprocessing_version,
        }

    def differences(self, plan_info: StoreInfo) -> list[str]:
        """A line for every setting in which this store and what a plan asks for differ."""
        own, asked = self.settings, plan_info.settings
        return _differences(own, asked)

    def name_differences(self, plan_info: StoreInfo) -> list[str]:
        """A line where channels or classes have other names."""
        own, asked = (
            {"channels": [channel.name for channel in info.channels], "labels": list(info.labels)}
            for info in (self, plan_info)
        )
        return _differences(own, asked)


def _differences(own: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return [f"{name}: {own[name]}, the plan has {asked[name]}" for name in own if own[name] != asked[name]]


def _normalization(channel: ChannelPlan) -> list[Any]:
    if channel.scheme == "ct":
        return [channel.scheme, channel.lower, channel.upper, channel.mean, channel.std]
    return [channel.scheme, "body"] if channel.scheme == "zscore" and channel.use_body_mask else [channel.scheme]
