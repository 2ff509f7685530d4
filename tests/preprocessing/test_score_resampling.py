"""Boxes of resampled scores are parts of the whole, to the last bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.preprocessing.resample import resample_scores
from pipeline.preprocessing.score_resampling import ScoreResampling

shapes = st.tuples(*[st.integers(1, 12)] * 3)
anisotropic_axes = st.one_of(st.none(), st.integers(0, 2))


@settings(max_examples=200, deadline=None)
@given(source=shapes, target=shapes, anisotropic_axis=anisotropic_axes, data=st.data())
def test_a_box_is_the_same_part_of_the_whole(
    source: tuple[int, int, int], target: tuple[int, int, int], anisotropic_axis: int | None, data: st.DataObject
) -> None:
    scores = np.random.default_rng(0).normal(size=(3, *source)).astype(np.float32)
    resampling = ScoreResampling(source, target, anisotropic_axis)
    box = []
    for size in target:
        first = data.draw(st.integers(0, size - 1))
        box.append(slice(first, data.draw(st.integers(first + 1, size))))
    i, j, k = box
    needed = resampling.source_box((i, j, k))
    part = resampling.apply(scores[(slice(None), *needed)], (i, j, k))
    whole = resample_scores(scores, target, anisotropic_axis=anisotropic_axis)
    np.testing.assert_array_equal(part, whole[:, i, j, k])


@settings(max_examples=100, deadline=None)
@given(source=st.integers(1, 40), target=st.integers(1, 40), is_nearest=st.booleans())
def test_planes_are_ready_as_soon_as_what_they_are_made_from_is_there_and_need_one_plane_kept(
    source: int, target: int, is_nearest: bool
) -> None:
    resampling = ScoreResampling((source, 5, 5), (target, 5, 5), 0 if is_nearest else None)
    needed = [resampling.source_side(0, slice(n, n + 1)) for n in range(target)]
    done = 0
    for num_source in range(1, source + 1):
        ready = resampling.num_ready(0, num_source)
        assert all(side.stop <= num_source for side in needed[:ready])
        assert all(side.stop > num_source for side in needed[ready:])
        # What became ready with this plane needs no plane but this one and the one before.
        assert all(side.start >= num_source - 2 for side in needed[done:ready])
        done = ready
    assert done == target
