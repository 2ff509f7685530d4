"""Three orthogonal slices of a case with the contours of reference and prediction.

Pictures follow the radiological convention: the patient's right is on the left, and anterior is on the left of
sagittal slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.evaluation.figures import data_uri
from pipeline.geometry import Spacing
from pipeline.io.volume import foreground_box

Array = NDArray[Any]
Box = tuple[slice, slice, slice]

FIGURE_WIDTH, DPI = 10.5, 120
MOST_HEIGHT = 6.0
GAP_SHARE = 0.02
MARGIN_MM, MARGIN_SHARE = 12.0, 0.3
SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)
# Axis that a slice is cut across: its name, then what lies left and right of the picture.
PLANES = {2: ("axial", "R", "L"), 1: ("coronal", "R", "L"), 0: ("sagittal", "A", "P")}


@dataclass(frozen=True, eq=False, kw_only=True)
class ReportCase:
    """A case to be shown.

    Attributes:
        case_id: As in the metrics.
        image: (I, J, K) intensities of one channel, in RAS order.
        reference, prediction: (I, J, K) class values on the same grid.
        spacing: Voxel size along i, j, k in millimetres.
    """

    case_id: str
    image: Array
    reference: Array
    prediction: Array
    spacing: Spacing

    def __post_init__(self) -> None:
        shapes = {self.image.shape, self.reference.shape, self.prediction.shape}
        if len(shapes) != 1 or self.image.ndim != 3:
            raise ValueError(f"case {self.case_id}: image, reference and prediction differ in shape: {sorted(shapes)}")


def draw_slices(case: ReportCase, *, labels: Mapping[str, int], colors: Mapping[str, str]) -> str:
    """Axial, coronal and sagittal slices through the largest reference area, at one scale, as a PNG data URI.

    The view is cut to the surroundings of the labels. Solid contours are the reference, dashed ones the prediction.

    Args:
        case: What to show.
        labels: Value by class name, without background.
        colors: By class name.
    """
    places = largest_slices(case.reference if case.reference.any() else case.prediction)
    box = _view_box(case)
    widths, heights = zip(*(_extent(box, axis, case.spacing) for axis in PLANES), strict=True)
    width = min(FIGURE_WIDTH, MOST_HEIGHT * sum(widths) / max(heights))
    figure = Figure(figsize=(width, width * max(heights) / sum(widths)), facecolor="black")
    left = 0.0
    for axis, extent in zip(PLANES, zip(widths, heights, strict=True), strict=True):
        share = extent[0] / sum(widths)
        gap = GAP_SHARE / 2
        axes = figure.add_axes((left + gap * share, gap, share * (1 - 2 * gap), 1 - 2 * gap))
        left += share
        _draw_plane(axes, case, axis, places[axis], box, labels, colors)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="black", metadata={"Software": None})
    return data_uri(buffer.getvalue(), "image/png")


def largest_slices(label: Array) -> tuple[int, int, int]:
    """For each axis the position whose slice holds the most foreground; the middle one of an empty label.

    Args:
        label: (I, J, K) class values.
    """
    mask = label != 0
    found = []
    for axis in range(3):
        areas = mask.sum(axis=tuple(other for other in range(3) if other != axis))
        found.append(int(areas.argmax()) if areas.any() else mask.shape[axis] // 2)
    return found[0], found[1], found[2]


def oriented_slice(volume: Array, axis: int, position: int) -> Array:
    """(rows, columns) as on the screen, first row on top, of (I, J, K) in RAS order.

    Axial: anterior on top; coronal and sagittal: superior on top; left and right as in `PLANES`.
    """
    picture: Array = np.take(volume, position, axis=axis).T[::-1, ::-1]
    return picture


def _view_box(case: ReportCase) -> Box:
    """The labels of both, with a margin; everything when there is no label."""
    spans = foreground_box(np.stack([case.reference != 0, case.prediction != 0]))
    box = []
    for span, size, step in zip(spans, case.image.shape, case.spacing, strict=True):
        margin = int(np.ceil(max(MARGIN_MM / step, MARGIN_SHARE * (span.stop - span.start))))
        box.append(slice(max(0, span.start - margin), min(size, span.stop + margin)))
    return box[0], box[1], box[2]


def _extent(box: Box, axis: int, spacing: Spacing) -> tuple[float, float]:
    """Width and height of a slice across `axis` in millimetres."""
    sizes = [(span.stop - span.start) * step for span, step in zip(box, spacing, strict=True)]
    horizontal, vertical = (other for other in range(3) if other != axis)
    return sizes[horizontal], sizes[vertical]


def _draw_plane(
    axes: Axes,
    case: ReportCase,
    axis: int,
    position: int,
    box: Box,
    labels: Mapping[str, int],
    colors: Mapping[str, str],
) -> None:
    width, height = _extent(box, axis, case.spacing)
    picture, reference, prediction = (
        oriented_slice(volume[box], axis, position - box[axis].start)
        for volume in (case.image, case.reference, case.prediction)
    )
    lower, upper = np.percentile(case.image[box].astype(float), [0.5, 99.5])
    axes.imshow(
        picture, cmap="gray", vmin=lower, vmax=max(upper, lower + 1e-6), extent=(0, width, height, 0), aspect="equal"
    )
    for name, value in labels.items():
        _draw_contour(axes, reference == value, (width, height), color=colors[name], dashed=False)
        _draw_contour(axes, prediction == value, (width, height), color=colors[name], dashed=True)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    _annotate(axes, axis, position, width)


def _draw_contour(
    axes: Axes, mask: NDArray[np.bool_], extent: tuple[float, float], *, color: str, dashed: bool
) -> None:
    if not mask.any():
        return
    # Padded, so that a class that touches the border has a closed contour.
    rows, columns = mask.shape
    x = (np.arange(-1, columns + 1) + 0.5) * extent[0] / columns
    y = (np.arange(-1, rows + 1) + 0.5) * extent[1] / rows
    style = "dashed" if dashed else "solid"
    lines = axes.contour(x, y, np.pad(mask, 1).astype(float), levels=[0.5], colors=[color], linestyles=style)
    lines.set_linewidth(1.5 if dashed else 1.3)
    if dashed:
        lines.set_path_effects([patheffects.withStroke(linewidth=2.6, foreground="black", alpha=0.55)])


def _annotate(axes: Axes, axis: int, position: int, width: float) -> None:
    """Sides, plane and a scale bar."""
    name, left, right = PLANES[axis]
    style: Any = {"color": "white", "fontsize": 8, "transform": axes.transAxes}
    outline = [patheffects.withStroke(linewidth=2, foreground="black")]
    for x, y, text, place in (
        (0.02, 0.98, f"{name}, {'ijk'[axis]} = {position}", ("left", "top")),
        (0.02, 0.5, left, ("left", "center")),
        (0.98, 0.5, right, ("right", "center")),
    ):
        axes.text(x, y, text, ha=place[0], va=place[1], path_effects=outline, **style)
    length = max((bar for bar in SCALE_BARS_MM if bar <= 0.35 * width), default=SCALE_BARS_MM[0])
    axes.plot([0.97 - length / width, 0.97], [0.035, 0.035], color="white", linewidth=2, transform=axes.transAxes)
    axes.text(0.97, 0.05, f"{length} mm", ha="right", va="bottom", path_effects=outline, **style)
