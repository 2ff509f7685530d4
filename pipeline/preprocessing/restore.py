"""The way back: from scores on the prepared grid to label values on the native grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.parallel import map_ahead
from pipeline.plan import Plan
from pipeline.preprocessing.labels import class_values
from pipeline.preprocessing.preprocess import PreparedImage
from pipeline.preprocessing.score_resampling import Box, ScoreResampling

ScoresByClass = Callable[[int], NDArray[Any]]
ScoresByClasses = Callable[[slice], NDArray[np.float32]]


class Reducer(Protocol):
    """Makes something of scores on the native grid, which never exist whole.

    Every voxel that cropping left comes in one box, and every box with all classes, in ascending chunks. Voxels that
    cropping took away do not come. A prediction that has to begin anew makes a new reducer.
    """

    @property
    def num_bytes(self) -> int:
        """What it holds of a whole volume."""

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Take scores (n, *box) of the classes from `first_class` on; they are not to be written to, nor kept."""

    def close(self, box: Box) -> None:
        """All classes of a box were added."""


class LabelReducer:
    """The class of the highest score; where scores are equal the lower class index.

    Args:
        shape: (I, J, K) of the native grid.
        plan: Says which class has which value.

    Attributes:
        label: Label values (I, J, K) in the smallest integer type that holds the plan's values, background where
            nothing came.
    """

    def __init__(self, shape: Shape3, plan: Plan) -> None:
        self._plan = plan
        self._index_dtype = np.uint8 if plan.num_classes <= 256 else np.uint16
        self.label: NDArray[Any] = np.zeros(shape, class_values(np.zeros(1, np.uint8), plan).dtype)

    @property
    def num_bytes(self) -> int:
        """Of the label."""
        return self.label.nbytes

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Keep what is higher than all before."""
        if first_class == 0:
            self._best = scores[0].copy()
            self._indices = np.zeros(self._best.shape, self._index_dtype)
            self._scratch = np.empty_like(self._indices)
        for class_index, score in enumerate(scores, start=first_class):
            # Indices ascend, so a class that wins is the highest index so far. Writing where a mask says so would take
            # ten times as long.
            wins = score > self._best
            np.maximum(self._best, score, out=self._best)
            np.multiply(wins, self._index_dtype(class_index), out=self._scratch)
            np.maximum(self._indices, self._scratch, out=self._indices)

    def close(self, box: Box) -> None:
        """Write the values of the classes."""
        self.label[box] = class_values(self._indices, self._plan)
        del self._best, self._indices, self._scratch


class ScoreReducer:
    """The scores themselves, all in memory.

    Args:
        shape: (I, J, K) of the native grid.
        num_classes: K.

    Attributes:
        scores: (K, I, J, K) in float32, 0 where nothing came.
    """

    def __init__(self, shape: Shape3, num_classes: int) -> None:
        self.scores: NDArray[np.float32] = np.zeros((num_classes, *shape), np.float32)

    @property
    def num_bytes(self) -> int:
        """Of all scores."""
        return self.scores.nbytes

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Put them in their place."""
        i, j, k = box
        self.scores[first_class : first_class + len(scores), i, j, k] = scores

    def close(self, box: Box) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class NativeScores:
    """Scores of a prepared image on its native grid, box by box.

    Attributes:
        resampling: From the prepared grid to the native voxels that cropping left.
        crop_start: Where these begin.
        num_classes: Of all scores.
        num_threads: That resample classes side by side; the result is the same.
    """

    resampling: ScoreResampling
    crop_start: Shape3
    num_classes: int
    num_threads: int = 1

    @classmethod
    def of(
        cls, prepared: PreparedImage, plan: Plan, *, num_scores: int | None = None, num_threads: int = 1
    ) -> NativeScores:
        """Those of a prepared image; `num_scores` where there are others than those of the classes."""
        resampling = ScoreResampling(prepared.grid.shape, prepared.crop_shape, plan.anisotropic_axis)
        num_classes = plan.num_classes if num_scores is None else num_scores
        return cls(resampling, prepared.crop_start, num_classes, num_threads)

    def reduce(self, scores: ScoresByClasses, box: Box, reducers: Sequence[Reducer], *, chunk: int) -> None:
        """Give the scores of a box to reducers.

        Args:
            scores: Gives those of some classes, (n, i, j, k) on
                `resampling.source_box(box)`; asked once for each class.
            box: Of the native voxels that cropping left.
            reducers: What takes them.
            chunk: Classes at a time, of all threads together.
        """
        i, j, k = (slice(side.start + a, side.stop + a) for side, a in zip(box, self.crop_start, strict=True))
        pieces = list(_chunks(self.num_classes, max(1, chunk // self.num_threads)))
        natives = self._resampled(scores, box, pieces, at_once=min(chunk, self.num_threads))
        for classes, native in zip(pieces, natives, strict=True):
            for reducer in reducers:
                reducer.add((i, j, k), classes.start, native)
            del native
        for reducer in reducers:
            reducer.close((i, j, k))

    def _resampled(
        self, scores: ScoresByClasses, box: Box, pieces: Sequence[slice], *, at_once: int
    ) -> Iterator[NDArray[np.float32]]:
        def resample(classes: slice) -> NDArray[np.float32]:
            return self.resampling.apply(scores(classes), box)

        if at_once == 1 or len(pieces) == 1:
            return map(resample, pieces)
        return map_ahead(resample, pieces, _threads(self.num_threads), ahead=at_once)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="resample")


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


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

    def checked(classes: slice) -> NDArray[np.float32]:
        score = of_class(classes.start)[None].astype(np.float32, copy=False)
        if np.isnan(score).any():
            fix = "Predict in float32; if it stays, the weights are damaged"
            raise InputError(f"the network's scores of class {plan.class_names[classes.start]} are NaN", fix=fix)
        i, j, k = needed
        return score[:, i, j, k]

    native, reducer = NativeScores.of(prepared, plan), LabelReducer(prepared.native_grid.shape, plan)
    x, y, z = (slice(0, size) for size in prepared.crop_shape)
    # Where the grid is finer than the native one, its outermost planes may have no part in anything.
    needed = native.resampling.source_box((x, y, z))
    native.reduce(checked, (x, y, z), [reducer], chunk=1)
    return reducer.label
