"""Structures of any origin to one label map: which class a structure belongs to, and who wins where classes overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.geometry import Shape3
from pipeline.io.nifti import smallest_integer

SLAB_VOXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class Structure:
    """One delineated structure.

    Attributes:
        name: As the file tells it.
        number: As the file tells it; with the name it tells structures of a file apart.
        mask: (i, j, k) bool in file order: (columns, rows, slices) of the image.
    """

    name: str
    number: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """A class of the label map.

    Attributes:
        name: Of the class.
        value: In the label map, 1 or more: 0 is background.
        patterns: Names of structures, exact or with `*`, `?` and `[...]`; case and surrounding blanks do not matter.
    """

    name: str
    value: int
    patterns: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.value < 1:
            raise InputError(f"value {self.value} is not 1 or more", where=f"class {self.name}", fix="0 is background")

    def matches(self, structure_name: str) -> bool:
        """Whether the structure belongs here, unless an earlier class takes it."""
        name = structure_name.strip().casefold()
        patterns = [pattern.strip().casefold() for pattern in self.patterns]
        return name in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, eq=False)
class ComposedLabel:
    """A label map and what became of the structures.

    Attributes:
        array: (i, j, k) in the smallest integer type that holds the values of all classes.
        overlaps: Voxels that two classes claim, by their names; the second has won over the first. A voxel of three
            classes counts for each of the three pairs.
    """

    array: NDArray[Any]
    overlaps: dict[tuple[str, str], int]


def class_index(structure_name: str, classes: Sequence[LabelClass]) -> int | None:
    """Position of the first class that the name matches, None where there is none."""
    return next((index for index, label_class in enumerate(classes) if label_class.matches(structure_name)), None)


def compose_label(
    structures: Iterable[Structure], classes: Sequence[LabelClass], shape: Shape3, *, smaller_wins: bool = False
) -> ComposedLabel:
    """Unite the structures of each class; where classes overlap, the later one in `classes` wins, or the smaller one.

    The result does not depend on the order of the structures. They are taken one at a time: memory is one mask, 2 bytes
    per voxel (4 beyond 65536 different overlaps), and at the end the label, however many classes there are.

    Args:
        structures: Masks of `shape`.
        classes: Names and values are unique.
        shape: (i, j, k) of the image.
        smaller_wins: Where classes overlap, the one with fewer voxels wins; the later one of two equal ones.

    Raises:
        InputError: Two classes share a name or a value.
        ValueError: A mask is not a boolean array of `shape`.
    """
    _check_unique(classes)
    memberships = _Memberships(shape)
    for structure in structures:
        if structure.mask.shape != tuple(shape) or structure.mask.dtype != np.bool_:
            raise ValueError(f"mask is {structure.mask.dtype} {structure.mask.shape}, not bool {tuple(shape)}")
        index = class_index(structure.name, classes)
        if index is not None:
            memberships.add(index, structure.mask)
        del structure  # or its mask would stay while the next one is made
    names, sizes = [label_class.name for label_class in classes], memberships.count_classes(len(classes))
    ranks = sorted(range(len(classes)), key=lambda index: (-sizes[index] if smaller_wins else 0, index))
    rank = {index: place for place, index in enumerate(ranks)}
    overlaps = {}
    for pair, count in sorted(memberships.count_pairs().items()):
        under, over = sorted(pair, key=rank.__getitem__)
        overlaps[names[under], names[over]] = count
    label = memberships.label([label_class.value for label_class in classes], rank)
    return ComposedLabel(label, overlaps)


def _check_unique(classes: Sequence[LabelClass]) -> None:
    for kind in ("name", "value"):
        items = [getattr(label_class, kind) for label_class in classes]
        double = next((item for item in items if items.count(item) > 1), None)
        if double is not None:
            raise InputError(f"two classes have the {kind} {double}", where="classes", fix="Give each class its own")


class _Memberships:
    """Per voxel the set of classes that claim it, as a number: sets that occur are few, voxels many.

    Only so are overlaps of pairs exact whatever comes first, without keeping a mask per class.
    """

    def __init__(self, shape: Shape3) -> None:
        self._sets: list[frozenset[int]] = [frozenset()]
        self._number_of: dict[frozenset[int], int] = {frozenset(): 0}
        self._numbers: NDArray[Any] = np.zeros(shape, np.uint16)

    def add(self, index: int, mask: NDArray[np.bool_]) -> None:
        """Add class `index` to the sets of the voxels of `mask`."""
        for slab in _slabs(mask.shape):
            part = mask[slab]
            if part.any():
                before = self._numbers[slab][part]
                # Only sets that occur here grow: of all sets, their number would double with every class.
                occurring = np.flatnonzero(np.bincount(before))
                after = [self._number(self._sets[number] | {index}) for number in occurring]
                lookup = np.zeros(len(self._sets), self._numbers.dtype)
                lookup[occurring] = after
                self._numbers[slab][part] = lookup[before]

    def _number(self, members: frozenset[int]) -> int:
        if members not in self._number_of:
            self._number_of[members] = len(self._sets)
            self._sets.append(members)
            if len(self._sets) > 1 + np.iinfo(self._numbers.dtype).max:
                self._numbers = self._numbers.astype(np.uint32)
        return self._number_of[members]

    def _counts(self) -> NDArray[np.int64]:
        """Voxels of each set of classes."""
        counts = np.zeros(len(self._sets), np.int64)
        for slab in _slabs(self._numbers.shape):
            counts += np.bincount(self._numbers[slab].reshape(-1), minlength=counts.size)
        return counts

    def count_classes(self, num_classes: int) -> list[int]:
        """Number of voxels that each class claims."""
        counts = self._counts()
        return [
            int(sum(counts[number] for number, members in enumerate(self._sets) if index in members))
            for index in range(num_classes)
        ]

    def count_pairs(self) -> dict[tuple[int, int], int]:
        """Number of voxels in both classes, by pairs of class indices, lower first; pairs without any are left out."""
        counts = self._counts()
        pairs: dict[tuple[int, int], int] = {}
        for number in np.flatnonzero(counts):
            for pair in combinations(sorted(self._sets[number]), 2):
                pairs[pair] = pairs.get(pair, 0) + int(counts[number])
        return pairs

    def label(self, values: Sequence[int], rank: Mapping[int, int]) -> NDArray[Any]:
        """(i, j, k) value of the class of the highest rank in each voxel's set."""
        dtype = smallest_integer(0, max(values, default=0))
        lookup = np.asarray(
            [values[max(members, key=rank.__getitem__)] if members else 0 for members in self._sets], dtype
        )
        array = np.empty(self._numbers.shape, dtype)
        for slab in _slabs(array.shape):  # an index array as a whole would be 8 bytes per voxel
            array[slab] = lookup[self._numbers[slab]]
        return array


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Parts of the first axis, so that temporary arrays stay small."""
    thickness = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return (slice(start, start + thickness) for start in range(0, shape[0], thickness))
