"""Fingerprints of made-up datasets, and a small network with its loss for the meter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.datasets.fingerprint import CaseFingerprint, ChannelStatistics, Fingerprint
from pipeline.geometry import Shape3, Spacing
from pipeline.losses.deep_supervision import DeepSupervisionLoss
from pipeline.losses.dice_ce import DiceCELoss
from pipeline.plan import NetworkPlan

# What the meter's tests run.
PATCH = (16, 24, 8)
TINY = NetworkPlan(
    features_per_stage=(4, 8, 12),
    strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)),
    kernel_sizes=((3, 3, 1), (3, 3, 3), (3, 3, 3)),
    num_blocks_per_stage=(1, 2, 1),
)
OUR_LOSS = DeepSupervisionLoss(DiceCELoss())
STATISTICS = ChannelStatistics(lower=-950.0, upper=1200.0, mean=90.0, std=250.0, minimum=-1024.0, maximum=3071.0)


@pytest.fixture(scope="session")
def fingerprint_of() -> Callable[..., Fingerprint]:
    """Make the fingerprint of `num_cases` equal cases, or of one case for each of `full_shapes`, before cropping."""

    def make(
        shape: Shape3,
        spacing: Spacing = (1.0, 1.0, 1.0),
        *,
        num_classes: int = 3,
        num_cases: int = 10,
        channel_names: tuple[str, ...] = ("T1",),
        full_shapes: tuple[Shape3, ...] = (),
    ) -> Fingerprint:
        case = {"patient": "a", "spacing": spacing, "cropped_shape": shape}
        shapes = full_shapes or (shape,) * num_cases
        return Fingerprint(
            dataset_name="made up",
            channel_names=channel_names,
            labels={"background": 0, **{f"class {index}": index for index in range(1, num_classes)}},
            ignore_value=None,
            channels=(STATISTICS,) * len(channel_names),
            cases=tuple(
                CaseFingerprint(case_id=f"case{index}", voxels_by_class=(1,) * num_classes, shape=full_shape, **case)
                for index, full_shape in enumerate(shapes)
            ),
        )

    return make
