"""What a prediction makes of scores on the native grid, box by box: the segmentation, and on request more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Grid, Shape3
from pipeline.inference.export_formats import BLOSC2, ENTROPY, NIFTI_PROBABILITIES, VARIANCE, OutputFormat
from pipeline.inference.postprocess import Step, apply_postprocessing
from pipeline.io.probabilities import ProbabilitySpool, make_spool
from pipeline.io.volume import SourceGrid, Volume
from pipeline.plan import Plan
from pipeline.preprocessing.restore import LabelReducer, Reducer
from pipeline.preprocessing.score_resampling import Box

# Below this p ln(p) counts nothing in float32, and ln(0) is avoided.
SMALLEST = 1e-30


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was made of one volume.

    Attributes:
        label: (1, I, J, K) class values, post-processed.
        maps: (1, I, J, K) float32 by format, "entropy" and "variance".
        probabilities: Of all classes, where they were asked for; they are not post-processed.
    """

    label: Volume
    maps: Mapping[OutputFormat, Volume]
    probabilities: ProbabilitySpool | None = None


@dataclass(frozen=True, kw_only=True)
class OutputRequest:
    """What is wanted beside the segmentation.

    Attributes:
        gives_probabilities: Whether scores are probabilities; otherwise they are logits.
        entropy, variance: Whether the map is wanted.
        probabilities: The file that they are to be written to; None where they are not wanted.
    """

    gives_probabilities: bool = False
    entropy: bool = False
    variance: bool = False
    probabilities: Path | None = None

    @classmethod
    def of(cls, files: Mapping[OutputFormat, Path], *, gives_probabilities: bool) -> OutputRequest:
        """What files are to be written of a volume.

        Raises:
            InputError: The variance of a single network is asked for.
        """
        if VARIANCE in files and not gives_probabilities:
            raise InputError("a variance is over several networks", fix="Give several runs, or use entropy")
        return cls(
            gives_probabilities=gives_probabilities,
            entropy=ENTROPY in files,
            variance=VARIANCE in files,
            probabilities=files.get(NIFTI_PROBABILITIES, files.get(BLOSC2)),
        )

    @property
    def needs_probabilities(self) -> bool:
        """Whether more than the highest score is looked at."""
        return self.entropy or self.probabilities is not None

    def num_buffered(self, num_classes: int) -> int:
        """Values that are kept of every voxel of a box: logits of all classes are there before any is a probability."""
        if not self.needs_probabilities:
            return 0
        return 4 if self.gives_probabilities else num_classes + 4


LABEL_ONLY = OutputRequest()


class OutputReducer:
    """The segmentation and what else is wanted, see `Reducer`.

    Args:
        shape: (I, J, K) of the native grid.
        plan: Says which class has which value.
        request: What else is wanted.
    """

    def __init__(self, shape: Shape3, plan: Plan, request: OutputRequest) -> None:
        self._num_classes = plan.num_classes
        self._label = LabelReducer(shape, plan)
        self._entropy = EntropyReducer(shape, plan.num_classes) if request.entropy else None
        self._variance = MapReducer(shape) if request.variance else None
        self._spool = make_spool(request.probabilities, shape, plan.labels) if request.probabilities else None
        of_probabilities: list[Reducer] = [each for each in (self._entropy, self._spool) if each is not None]
        if of_probabilities and not request.gives_probabilities:
            of_probabilities = [SoftmaxReducer(of_probabilities, plan.num_classes)]
        self._of_classes: list[Reducer] = [self._label, *of_probabilities]

    @property
    def num_bytes(self) -> int:
        """Of all results."""
        found = sum(reducer.num_bytes for reducer in self._of_classes)
        return found + (self._variance.num_bytes if self._variance is not None else 0)

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Hand scores on; what is behind the last class is the variance."""
        count = self._num_classes - first_class
        if self._variance is not None and len(scores) > count:
            self._variance.add(box, 0, scores[count:])
        if count > 0:
            for reducer in self._of_classes:
                reducer.add(box, first_class, scores[:count])

    def close(self, box: Box) -> None:
        """All classes of a box were added."""
        for reducer in self._of_classes:
            reducer.close(box)

    def finish(self, grid: Grid, source: SourceGrid | None, steps: Sequence[Step]) -> Prediction:
        """The results, post-processed.

        Args:
            grid: Of the volume.
            source: Of the volume.
            steps: Post-processing.
        """
        label: NDArray[Any] = self._label.label
        if steps:
            label = apply_postprocessing(label, steps, grid.spacing)
        maps = {ENTROPY: self._entropy, VARIANCE: self._variance}
        return Prediction(
            Volume(label[None], grid, source),
            {kind: Volume(each.values[None], grid, source) for kind, each in maps.items() if each is not None},
            self._spool,
        )


class MapReducer:
    """One value per voxel (I, J, K) in float32, 0 where nothing came."""

    def __init__(self, shape: Shape3) -> None:
        self.values: NDArray[np.float32] = np.zeros(shape, np.float32)

    @property
    def num_bytes(self) -> int:
        """Of the map."""
        return self.values.nbytes

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Put the one score in its place."""
        self.values[box] = scores[0]

    def close(self, box: Box) -> None:
        """Nothing is left to do."""


class EntropyReducer(MapReducer):
    """Entropy of the class probabilities of every voxel over that of even ones: from 0, sure, to 1."""

    def __init__(self, shape: Shape3, num_classes: int) -> None:
        super().__init__(shape)
        self._largest = log(num_classes)

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Add -p ln(p)."""
        for score in scores:
            self.values[box] -= score * np.log(np.maximum(score, SMALLEST))

    def close(self, box: Box) -> None:
        """Bring it to its range."""
        self.values[box] = np.clip(self.values[box] / self._largest, 0, 1)


class SoftmaxReducer:
    """Makes probabilities of logits, which have to be there of all classes, and hands them on.

    Args:
        reducers: What takes the probabilities, all classes of a box at once.
        num_classes: K.
    """

    def __init__(self, reducers: Sequence[Reducer], num_classes: int) -> None:
        self._reducers, self._num_classes = reducers, num_classes

    @property
    def num_bytes(self) -> int:
        """Of what takes them."""
        return sum(reducer.num_bytes for reducer in self._reducers)

    def add(self, box: Box, first_class: int, scores: NDArray[np.float32]) -> None:
        """Keep logits until all are there."""
        if first_class == 0:
            self._logits = np.empty((self._num_classes, *scores.shape[1:]), np.float32)
        self._logits[first_class : first_class + len(scores)] = scores

    def close(self, box: Box) -> None:
        """Make probabilities of them."""
        values = self._logits
        values -= values.max(axis=0)
        np.exp(values, out=values)
        values /= values.sum(axis=0)
        for reducer in self._reducers:
            reducer.add(box, 0, values)
            reducer.close(box)
        del self._logits
