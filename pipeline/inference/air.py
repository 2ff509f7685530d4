"""Windows that hold nothing but air, which need no network."""

from __future__ import annotations

from torch import Tensor

from pipeline.inference.windows import Box

# Of the range of a channel: what resampling leaves of rounding in a constant region.
CONSTANT_SHARE = 1e-4


class AirFinder:
    """Says of windows whether they are air: in every channel one value, and that below the channel's mean.

    Padding around a scan is so, and so is air of a CT once its intensities are clipped. Noise in the air of an MR is
    not, nor is bright metal that is clipped to one value. An image that is one value everywhere has no air.

    Args:
        image: (C, I, J, K), prepared.
    """

    def __init__(self, image: Tensor) -> None:
        self._image = image
        voxels = image.flatten(1)
        self._tolerance = (voxels.amax(1) - voxels.amin(1)) * CONSTANT_SHARE
        self._mean = voxels.mean(1)

    def __call__(self, place: Box) -> bool:
        """Whether the voxels of a window that lie within the image are air."""
        inside = [slice(max(0, side.start), side.stop) for side in place]
        lowest, highest = self._image[(slice(None), *inside)].flatten(1).aminmax(dim=1)
        return bool(((highest - lowest <= self._tolerance) & (highest < self._mean)).all())
