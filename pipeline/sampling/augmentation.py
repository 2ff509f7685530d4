"""Random changes to training patches: drawn first, applied after, to one patch or to a batch, on any device.

Legend: images are (B, C, I, J, K) float32, labels (B, I, J, K) integers. The "box" is what is read from the
store for a patch: the patch itself, or what its rotation and zoom need, so that no padding comes into its corners.
Drawing takes a numpy generator and no voxels; applying takes voxels and no generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import AugmentationConfig
from pipeline.geometry import Shape3, Spacing
from pipeline.sampling.intensity import MAX_BLUR_SIGMA, ChannelParameters, change_intensity
from pipeline.sampling.spatial import Point, box_around, cut, middle, mirror, resample, sampling_matrix
from pipeline.store import PatchLocation

MAX_ROTATION = math.radians(30)
ZOOM_RANGE = (0.7, 1.4)
MAX_NOISE_VARIANCE = 0.1
BLUR_RANGE = (0.5, MAX_BLUR_SIGMA)
BRIGHTNESS_RANGE = CONTRAST_RANGE = (0.75, 1.25)
LOW_RESOLUTION_RANGE = (0.5, 1.0)
GAMMA_RANGE = (0.7, 1.5)
# nnU-Net draws gamma on the negative image with 0.1 and on the image itself with 0.3.
INVERTED_SHARE = 0.25


class AugmentationParameters(NamedTuple):
    """Everything that was drawn for one patch; applying it again gives the same patch. The defaults change nothing.

    A named tuple, because it travels in a batch, which Lightning takes apart and rebuilds.

    Attributes:
        channels: Intensity changes of each channel.
        rotation: Angles about i, j and k in radians.
        zoom: Above 1 things look larger.
        mirrored: Axes that are flipped, after rotation and zoom.
        centre: Where the patch's centre lies in the box, in voxels; None is the middle of the box.
    """

    channels: tuple[ChannelParameters, ...]
    rotation: Point = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    centre: Point | None = None

    @property
    def is_resampled(self) -> bool:
        """Whether voxels are interpolated."""
        return self.zoom != 1.0 or any(self.rotation)


class Augmentation:
    """Draws and applies the random changes of `AugmentationConfig`.

    Each change is drawn on its own with its probability, intensity changes for each channel. Factors (zoom, brightness,
    contrast, gamma) are drawn uniformly in their logarithm, so that halving is as likely as doubling; everything else
    is drawn uniformly. Images are interpolated linearly and labels by nearest neighbour; what comes from outside the
    volume is 0 and class 0.

    Args:
        config: Probabilities; `config.device` is for the caller.
        patch_size: Patch along i, j, k.
        num_channels: Input channels.
        spacing: Voxel size along i, j, k, so that rotations are rigid in millimetres.
        anisotropic_axis: The axis of thick slices: rotation stays in the plane across it, and nothing is zoomed,
            blurred or thinned out along it. None where voxels are near to cubes.
        mirror_axes: Axes that are mirrored where the configuration leaves them to the plan.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        *,
        patch_size: Shape3,
        num_channels: int,
        spacing: Spacing = (1.0, 1.0, 1.0),
        anisotropic_axis: int | None = None,
        mirror_axes: tuple[int, ...] = (0, 1, 2),
    ) -> None:
        self.config = config
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.spacing = spacing
        self.anisotropic_axis = anisotropic_axis
        self.mirror_axes = config.mirrored_axes(mirror_axes)

    def draw(self, rng: np.random.Generator) -> AugmentationParameters:
        """Draw the changes of one patch."""
        if not self.config.enabled:
            return AugmentationParameters((ChannelParameters(),) * self.num_channels)
        zoomed = rng.random() < self.config.scale
        return AugmentationParameters(
            rotation=self._draw_rotation(rng),
            zoom=_draw_factor(rng, ZOOM_RANGE) if zoomed else 1.0,
            mirrored=self._draw_mirrored(rng),
            channels=tuple(self._draw_channel(rng) for _ in range(self.num_channels)),
        )

    def locate_box(
        self, location: PatchLocation, parameters: AugmentationParameters, volume_shape: Shape3
    ) -> tuple[PatchLocation, AugmentationParameters]:
        """The box to read for the patch at `location`, and the parameters that apply to that box."""
        if not parameters.is_resampled:
            return location, parameters._replace(centre=middle(location.size))
        box, centre = box_around(location, self._matrix(parameters), volume_shape)
        return box, parameters._replace(centre=centre)

    def __call__(self, image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw and apply at once: image (C, I, J, K) and label (I, J, K), at least of the patch size."""
        return self.augment(image, label, self.draw(rng))

    def augment(self, image: Tensor, label: Tensor, parameters: AugmentationParameters) -> tuple[Tensor, Tensor]:
        """One patch: image (C, *patch_size) and label (*patch_size) from boxes (C, I, J, K) and (I, J, K)."""
        images, labels = self.augment_batch(image[None], label[None], [parameters])
        return images[0], labels[0]

    def augment_batch(
        self, images: Tensor, labels: Tensor, parameters: Sequence[AugmentationParameters]
    ) -> tuple[Tensor, Tensor]:
        """A batch on its own device: (B, C, *patch_size) and (B, *patch_size) from boxes of one common shape.

        Args:
            images: (B, C, I, J, K) float32; not changed.
            labels: (B, I, J, K) integers; not changed.
            parameters: One entry per patch.
        """
        moved = [self._move(*patch) for patch in zip(images, labels, parameters, strict=True)]
        patches = torch.stack([image for image, _ in moved])
        drawn = [channel for patch in parameters for channel in patch.channels]
        rows = change_intensity(patches.flatten(0, 1), drawn, kept_axis=self.anisotropic_axis)
        return rows.view(patches.shape), torch.stack([label for _, label in moved])

    def _move(self, image: Tensor, label: Tensor, parameters: AugmentationParameters) -> tuple[Tensor, Tensor]:
        centre = middle(label.shape) if parameters.centre is None else parameters.centre
        if parameters.is_resampled:
            matrix = self._matrix(parameters)
            image, label = resample(image, label, matrix, centre=centre, size=self.patch_size)
        else:
            image, label = cut(image, centre, self.patch_size), cut(label, centre, self.patch_size)
        return mirror(image, parameters.mirrored), mirror(label, parameters.mirrored)

    def _matrix(self, parameters: AugmentationParameters) -> NDArray[np.float64]:
        return sampling_matrix(
            parameters.rotation, parameters.zoom, spacing=self.spacing, kept_axis=self.anisotropic_axis
        )

    def _draw_rotation(self, rng: np.random.Generator) -> Point:
        if rng.random() >= self.config.rotate:
            return 0.0, 0.0, 0.0
        turning = [self.anisotropic_axis in (None, axis) for axis in range(3)]
        i, j, k = (float(rng.uniform(-MAX_ROTATION, MAX_ROTATION)) if turns else 0.0 for turns in turning)
        return i, j, k

    def _draw_mirrored(self, rng: np.random.Generator) -> tuple[bool, bool, bool]:
        i, j, k = (bool(draw < self.config.mirror) for draw in rng.random(3))
        allowed = self.mirror_axes
        return i and 0 in allowed, j and 1 in allowed, k and 2 in allowed

    def _draw_channel(self, rng: np.random.Generator) -> ChannelParameters:
        names = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
        drawn = {name for name in names if rng.random() < getattr(self.config, name)}
        return ChannelParameters(
            noise_std=math.sqrt(rng.uniform(0, MAX_NOISE_VARIANCE)) if "noise" in drawn else 0.0,
            noise_seed=int(rng.integers(1 << 31)) if "noise" in drawn else 0,
            blur_sigma=float(rng.uniform(*BLUR_RANGE)) if "blur" in drawn else 0.0,
            brightness=_draw_factor(rng, BRIGHTNESS_RANGE) if "brightness" in drawn else 1.0,
            contrast=_draw_factor(rng, CONTRAST_RANGE) if "contrast" in drawn else 1.0,
            low_resolution=float(rng.uniform(*LOW_RESOLUTION_RANGE)) if "low_resolution" in drawn else 1.0,
            gamma=_draw_factor(rng, GAMMA_RANGE) if "gamma" in drawn else 1.0,
            gamma_inverted="gamma" in drawn and bool(rng.random() < INVERTED_SHARE),
        )


def _draw_factor(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))
