"""The way back: from scores on the prepared grid to label values on the native grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.plan import Plan
from pipeline.preprocessing.labels import class_values
from pipeline.preprocessing.preprocess import PreparedImage
from pipeline.preprocessing.resample import resample_scores

ScoresByClass = Callable[[int], NDArray[Any]]


def restore_label(scores: NDArray[Any] | ScoresByClass, prepared: PreparedImage, plan: Plan) -> NDArray[Any]:
    """The class of the highest score, on the native grid.

    Scores are resampled linearly and class by class with a running maximum, so that scores of all classes at native
    resolution never exist. Where scores are equal the lower class index is taken. Voxels that cropping took away are
    background.

    Args:
        scores: (K, I, J, L) on `prepared.grid`, or a function that gives those of a class index, (I, J, L); logits or
            probabilities.
        prepared: How the image came to its grid.
        plan: Says which class has which value.

    Returns:
        Label values on the native RAS grid (I, J, K), in the smallest integer type that holds the plan's values.

    Raises:
        InputError: A score is NaN.
    """
    of_class: ScoresByClass = scores if callable(scores) else scores.__getitem__
    best = np.full(prepared.crop_shape, -np.inf, np.float32)
    indices = np.zeros(prepared.crop_shape, np.uint8 if plan.num_classes <= 256 else np.uint16)
    for class_index in range(plan.num_classes):
        score = resample_scores(
            of_class(class_index)[None], prepared.crop_shape, anisotropic_axis=plan.anisotropic_axis
        )[0]
        if np.isnan(score).any():
            fix = "Predict in float32; if it stays, the weights are damaged"
            raise InputError(f"the network's scores of class {plan.class_names[class_index]} are NaN", fix=fix)
        wins = score > best
        best[wins] = score[wins]
        indices[wins] = class_index
    values = class_values(indices, plan)
    native = np.zeros(prepared.native_grid.shape, values.dtype)
    box = tuple(slice(a, a + n) for a, n in zip(prepared.crop_start, prepared.crop_shape, strict=True))
    native[box] = values
    return native
