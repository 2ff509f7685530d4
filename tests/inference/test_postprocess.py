from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.transforms import FillHoles
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pipeline.artifacts import read_artifact, write_artifact
from pipeline.errors import InputError
from pipeline.inference.postprocess import (
    Postprocessing,
    Step,
    apply_postprocessing,
    read_postprocessing,
)
from pipeline.plan import Plan

SPACING = (0.5, 1.0, 2.0)


def largest(value: int) -> Step:
    return Step(class_name=f"class {value}", value=value, kind="keep_largest")


def small(value: int, volume: float) -> Step:
    return Step(class_name=f"class {value}", value=value, kind="remove_small", min_volume_mm3=volume)


def fill(value: int) -> Step:
    return Step(class_name=f"class {value}", value=value, kind="fill_holes")


LABELS = arrays(np.uint8, st.tuples(*[st.integers(1, 7)] * 3), elements=st.sampled_from([0, 0, 1, 1, 4]))
STEPS = st.lists(
    st.sampled_from([largest(1), largest(4), small(1, 2.0), small(4, 3.5), fill(1), fill(4)]), unique=True, max_size=6
)


def blobs(seed: int, shape: tuple[int, int, int] = (24, 31, 18)) -> NDArray[np.int16]:
    """Smooth random blobs of two classes, with holes and specks."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    label: NDArray[np.int16] = np.select([noise > 0.14, noise < -0.16], [1, 2], 0).astype(np.int16)
    return label


@settings(deadline=None, max_examples=150)
@given(label=LABELS, steps=STEPS, seed=st.integers(0, 99))
def test_once_is_as_good_as_twice_and_the_order_does_not_matter(
    label: NDArray[Any], steps: list[Step], seed: int
) -> None:
    before = label.copy()
    once = apply_postprocessing(label, steps, SPACING)
    np.testing.assert_array_equal(apply_postprocessing(once, steps, SPACING), once)
    shuffled = [steps[index] for index in np.random.default_rng(seed).permutation(len(steps))]
    np.testing.assert_array_equal(apply_postprocessing(label, shuffled, SPACING), once)
    np.testing.assert_array_equal(label, before)
    assert once.dtype == label.dtype


@settings(deadline=None, max_examples=150)
@given(label=LABELS, steps=STEPS)
def test_no_step_changes_another_class_and_removals_only_take_away(label: NDArray[Any], steps: list[Step]) -> None:
    done = apply_postprocessing(label, steps, SPACING)
    touched = {step.value for step in steps}
    for value in {1, 4} - touched:
        np.testing.assert_array_equal(done == value, label == value)
    # What was one class is that class still, or background that a class in `steps` may have filled.
    kept = (done != 0) & (label != 0) & (done != label)
    assert not kept.any() or any(step.kind == "fill_holes" for step in steps)
    removals = [step for step in steps if step.kind != "fill_holes"]
    removed = apply_postprocessing(label, removals, SPACING)
    assert np.all((removed == label) | (removed == 0))


def largest_by_graph(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest component of the graph whose edges join voxels at most one step apart along every axis."""
    places = np.argwhere(mask)
    pairs = cKDTree(places).query_pairs(1.0, p=np.inf, output_type="ndarray")
    graph = csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(places), len(places)))
    _, numbers = connected_components(graph, directed=False)
    kept = np.zeros_like(mask)
    kept[tuple(places[numbers == np.bincount(numbers).argmax()].T)] = True
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_component_is_that_of_the_graph_of_neighbours(seed: int) -> None:
    label = blobs(seed)
    done = apply_postprocessing(label, [largest(1), largest(2)], SPACING)
    for value in (1, 2):
        assert (done == value).sum() < (label == value).sum()
        np.testing.assert_array_equal(done == value, largest_by_graph(label == value))


@pytest.mark.parametrize("seed", range(4))
def test_holes_of_a_mask_are_monai_s_and_scipy_s(seed: int) -> None:
    mask = (blobs(seed) == 1).astype(np.int16)
    mask[8:15, 8:15, 5:12] = 1
    mask[10:13, 10:13, 7:10] = 0
    ours = apply_postprocessing(mask, [fill(1)], SPACING)
    assert ours.sum() > mask.sum()
    np.testing.assert_array_equal(ours == 1, ndimage.binary_fill_holes(mask == 1))
    theirs = FillHoles(applied_labels=[1], connectivity=1)(torch.from_numpy(mask[None]))
    np.testing.assert_array_equal(ours, theirs[0].numpy())


def test_a_hole_that_holds_another_class_keeps_it() -> None:
    label = np.ones((7, 8, 9), np.uint8)
    label[2:5, 2:5, 2:6] = 0
    label[3, 3, 3] = 4
    done = apply_postprocessing(label, [fill(1)], SPACING)
    assert done[3, 3, 3] == 4
    assert (done == 1).sum() == label.size - 1


def test_what_is_taken_away_inside_another_class_is_filled_whatever_comes_first() -> None:
    label = np.ones((7, 8, 9), np.uint8)
    label[3, 3, 3] = 4
    for steps in ([fill(1), small(4, 99.0)], [small(4, 99.0), fill(1)]):
        assert np.all(apply_postprocessing(label, steps, SPACING) == 1)


def test_background_within_two_classes_goes_to_the_lower_value_whatever_comes_first() -> None:
    label = np.ones((9, 9, 9), np.uint8)
    label[2:7, 2:7, 2:7] = 4
    label[4, 4, 4] = 0
    for steps in ([fill(4), fill(1)], [fill(1), fill(4)]):
        assert apply_postprocessing(label, steps, SPACING)[4, 4, 4] == 1


def test_components_below_a_volume_go_and_one_of_exactly_it_stays() -> None:
    label = np.zeros((9, 9, 9), np.uint8)
    label[0, 0, :2] = 1
    label[4, 4, :3] = 1
    label[8, 8, :4] = 1
    # 0.3 is not a binary fraction: three voxels are not exactly 0.9 mm3.
    done = apply_postprocessing(label, [small(1, 0.9)], (0.3, 1.0, 1.0))
    assert [int(done[i, i].sum()) for i in (0, 4, 8)] == [0, 3, 4]


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    label = np.zeros((5, 5, 5), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = label[2, 2, 2] = 1
    label[4, 0, 0] = label[4, 0, 1] = 1
    done = apply_postprocessing(label, [largest(1)], SPACING)
    assert done[2, 2, 2] == 1
    assert done[4, 0, 0] == 0


def test_nothing_of_a_class_stays_nothing() -> None:
    label = np.zeros((4, 5, 6), np.uint8)
    steps = [largest(1), small(4, 2.0), fill(1)]
    np.testing.assert_array_equal(apply_postprocessing(label, steps, SPACING), label)


def test_memory_follows_the_box_of_the_class_not_the_volume() -> None:
    label = np.zeros((120, 130, 110), np.uint8)
    label[40:60, 30:50, 20:45] = 1
    steps = [largest(1), fill(1)]
    apply_postprocessing(label, steps, SPACING)
    tracemalloc.start()
    apply_postprocessing(label, steps, SPACING)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The result, and a byte per voxel.
    assert peak < 2.2 * label.size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": 0, "kind": "fill_holes"}, "background"),
        ({"value": 1, "kind": "remove_small"}, "min_volume_mm3"),
        ({"value": 1, "kind": "keep_largest", "min_volume_mm3": 3.0}, "min_volume_mm3"),
        ({"value": 1, "kind": "remove_small", "min_volume_mm3": -1.0}, "positive"),
    ],
)
def test_a_step_that_says_nothing_sensible_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Step(class_name="organ", **options)


def test_the_file_is_read_back_and_must_fit_the_plan(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(InputError, match=r"no postprocessing\.json.*voxfit postprocess"):
        read_postprocessing(tmp_path, make_plan())
    step = Step(class_name="organ_1", value=4, kind="remove_small", min_volume_mm3=20.0)
    chosen = Postprocessing(steps=(step,), min_gain=0.002, case_ids=("a", "b"))
    write_artifact(tmp_path / "postprocessing.json", chosen)
    assert read_postprocessing(tmp_path, make_plan()) == chosen
    assert read_artifact(tmp_path / "postprocessing.json", Postprocessing).schema_version == 1
    with pytest.raises(InputError, match="no class organ_1 with the value 4"):
        read_postprocessing(tmp_path, make_plan(labels={"background": 0, "organ_1": 1}))
