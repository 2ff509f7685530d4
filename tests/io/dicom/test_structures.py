"""Structures to a label map: membership kept voxel by voxel in Python sets is the oracle."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.io.dicom import structures as module
from pipeline.io.dicom.structures import LabelClass, Structure, class_index, compose_label

SHAPE = (6, 5, 4)


def make_classes(num: int) -> list[LabelClass]:
    """c0, c1, ... with values that fall, so that the order and the value of a class cannot be mistaken."""
    return [LabelClass(name=f"c{n}", value=num - n, patterns=(f"c{n}_*",)) for n in range(num)]


def make_structure(name: str, *where: tuple[slice | int, ...]) -> Structure:
    mask = np.zeros(SHAPE, bool)
    for place in where:
        mask[place] = True
    return Structure(name, 1, mask)


def random_structures(rng: np.random.Generator, num_classes: int) -> list[Structure]:
    names = [f"c{rng.integers(num_classes)}_{n}" for n in range(int(rng.integers(0, 9)))]
    return [Structure(name, n, rng.random(SHAPE) < rng.uniform(0.05, 0.9)) for n, name in enumerate(names)]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_voxel_takes_its_last_class_and_overlaps_are_counted_by_pairs(seed: int):
    rng = np.random.default_rng(seed)
    classes = make_classes(4)
    found = random_structures(rng, 4)
    label = np.zeros(SHAPE, int)
    overlaps: dict[tuple[str, str], int] = {}
    for voxel in np.ndindex(SHAPE):
        members = sorted({int(structure.name[1]) for structure in found if structure.mask[voxel]})
        label[voxel] = classes[members[-1]].value if members else 0
        for a, b in combinations(members, 2):
            overlaps[f"c{a}", f"c{b}"] = overlaps.get((f"c{a}", f"c{b}"), 0) + 1
    composed = compose_label(found, classes, SHAPE)
    np.testing.assert_array_equal(composed.array, label)
    assert composed.overlaps == overlaps
    shuffled = compose_label([found[n] for n in rng.permutation(len(found))], classes, SHAPE)
    np.testing.assert_array_equal(shuffled.array, label)
    assert shuffled.overlaps == overlaps


def test_structures_of_one_class_are_united_and_do_not_overlap_each_other():
    classes = make_classes(2)
    parts = [make_structure("c0_left", (slice(0, 3),)), make_structure("c0_right", (slice(2, 5),))]
    composed = compose_label([*parts, make_structure("c1_a", (2,), (4,))], classes, SHAPE)
    expected = np.zeros(SHAPE, int)
    expected[0:5] = 2
    expected[[2, 4]] = 1
    np.testing.assert_array_equal(composed.array, expected)
    # Plane 2 is in both parts of c0, and counts once.
    assert composed.overlaps == {("c0", "c1"): 2 * 5 * 4}


def test_what_belongs_to_no_class_is_left_out():
    found = [make_structure(name, (n,)) for n, name in enumerate(["couch", "c0_a", "Body", "couch"])]
    composed = compose_label(found, make_classes(1), SHAPE)
    assert np.unique(np.nonzero(composed.array)[0]).tolist() == [1]


@pytest.mark.parametrize(("value", "dtype"), [(255, "uint8"), (256, "int16"), (40000, "uint16"), (70000, "int32")])
def test_the_type_holds_the_values_of_all_classes_whether_they_occur_or_not(value: int, dtype: str):
    classes = [LabelClass(name="a", value=1, patterns=("a",)), LabelClass(name="b", value=value, patterns=("b",))]
    assert compose_label([make_structure("a", (0,))], classes, SHAPE).array.dtype == dtype
    assert compose_label([make_structure("b", (0,))], classes, SHAPE).array.max() == value


@pytest.mark.parametrize(
    ("name", "patterns", "is_match"),
    [
        (" GTV_Mass ", ("gtv_mass",), True),
        ("gtv", (" GTV ",), True),
        ("GTV-1", ("gtv*",), True),
        ("GTV[1]", ("gtv[1]",), True),
        ("gtv1", ("gtv[1]",), True),
        ("gtv 10", ("gtv ?",), False),
        ("xgtv", ("gtv*",), False),
        ("lung_l", ("heart", "lung_?"), True),
        ("STRASSE", ("straße",), True),
        ("gtv", (), False),
    ],
)
def test_names_match_exactly_or_by_pattern_whatever_their_case(name: str, patterns: tuple[str, ...], is_match: bool):
    assert LabelClass(name="x", value=1, patterns=patterns).matches(name) is is_match


def test_a_structure_belongs_to_the_first_class_that_matches():
    classes = [LabelClass(name=n, value=v, patterns=(p,)) for n, v, p in [("l", 3, "lung_l"), ("lung", 1, "lung*")]]
    assert [class_index(name, classes) for name in ("Lung_L", "lung_r", "heart")] == [0, 1, None]
    assert class_index("lung_l", classes[::-1]) == 0


def test_no_structures_give_background_only():
    composed = compose_label([], make_classes(2), SHAPE)
    assert composed.array.shape == SHAPE
    assert not composed.array.any()
    assert composed.overlaps == {}


def test_masks_are_taken_one_at_a_time_and_memory_does_not_grow_with_classes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SLAB_VOXELS", 1 << 12)
    shape = (120, 64, 64)
    one_mask = int(np.prod(shape))

    def stream() -> Iterator[Structure]:
        for n in range(118):
            mask = np.zeros(shape, bool)
            mask[n : n + 2] = True
            yield Structure(f"c{n}_", n, mask)
            del mask

    tracemalloc.start()
    composed = compose_label(stream(), make_classes(118), shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(composed.overlaps) == 117
    # Set numbers (2 bytes), a mask (1) or the label (1), and what is small beside them.
    assert peak < 4 * one_mask


def test_more_than_65536_different_overlaps_are_still_told_apart():
    shape = (1 << 17, 1, 1)
    bits = np.arange(shape[0])[:, None, None, None] >> np.arange(17) & 1
    found = [Structure(f"c{n}_", n, bits[..., n].astype(bool)) for n in range(17)]
    composed = compose_label(found, make_classes(17), shape)
    expected = [17 - (int(n).bit_length() - 1) if n else 0 for n in range(shape[0])]
    np.testing.assert_array_equal(composed.array[:, 0, 0], expected)
    assert set(composed.overlaps.values()) == {1 << 15}
    assert len(composed.overlaps) == 17 * 16 // 2


def test_the_result_does_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    found = [*random_structures(rng, 3), make_structure("c2_x", (slice(1, 6),))]
    whole = compose_label(found, make_classes(3), SHAPE)
    monkeypatch.setattr(module, "SLAB_VOXELS", 2 * SHAPE[1] * SHAPE[2] + 1)
    parts = compose_label(found, make_classes(3), SHAPE)
    np.testing.assert_array_equal(parts.array, whole.array)
    assert parts.overlaps == whole.overlaps


def test_classes_that_cannot_be_told_apart_are_refused():
    a, same_name, same_value = (LabelClass(name=n, value=v, patterns=("x",)) for n, v in [("a", 1), ("a", 2), ("b", 1)])
    for other, text in [(same_name, "name a"), (same_value, "value 1")]:
        with pytest.raises(InputError, match=text):
            compose_label([], [a, other], SHAPE)


@pytest.mark.parametrize("value", [0, -1])
def test_background_is_no_class(value: int):
    with pytest.raises(InputError, match="0 is background"):
        LabelClass(name="a", value=value, patterns=())


def test_masks_of_another_shape_or_type_are_a_defect():
    for mask in (np.zeros((6, 5, 3), bool), np.zeros(SHAPE, np.uint8)):
        with pytest.raises(ValueError, match="mask is"):
            compose_label([Structure("c0_", 1, mask)], make_classes(1), SHAPE)
