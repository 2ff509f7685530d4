from __future__ import annotations

from itertools import pairwise
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.geometry import Shape3, Spacing
from pipeline.planning.candidates import (
    FALLBACK_SHARE,
    LEAST_FALLBACK_SHARE,
    SMALLEST_EDGE,
    fallback_patches,
    patch_candidates,
)
from pipeline.planning.topology import make_topology, round_up_patch

edges = st.integers(4, 400)
shapes = st.tuples(edges, edges, edges)
millimetres = st.floats(0.3, 8.0)
spacings = st.tuples(millimetres, millimetres, millimetres)


@given(shape=shapes, spacing=spacings)
@settings(max_examples=60, deadline=None)
def test_candidates_shrink_from_the_rounded_median_case_to_small_patches(shape: Shape3, spacing: Spacing) -> None:
    candidates = patch_candidates(shape, spacing)
    assert candidates[0] == round_up_patch(shape, spacing)
    for larger, smaller in pairwise(candidates):
        assert smaller != larger
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
    for patch in candidates:
        assert all(n % s == 0 for n, s in zip(patch, make_topology(patch, spacing).total_stride, strict=True))
    assert max(candidates[-1]) <= 2 * SMALLEST_EDGE


def test_candidates_keep_the_aspect_of_the_median_case() -> None:
    for patch in patch_candidates((512, 512, 256), (0.8, 0.8, 1.5)):
        if min(patch) >= 64:
            assert patch[0] / patch[1] in (1.0, patch[0] / (patch[0] + 32), (patch[1] + 32) / patch[1])
            assert 1.4 <= patch[0] / patch[2] <= 2.7


@given(shape=shapes, spacing=spacings)
@settings(max_examples=60, deadline=None)
def test_fallback_patches_shrink_by_a_fifth_down_to_a_quarter_and_suit_the_same_network(
    shape: Shape3, spacing: Spacing
) -> None:
    patch = round_up_patch(shape, spacing)
    stride = make_topology(patch, spacing).total_stride
    below = list(fallback_patches(patch, stride))
    for larger, smaller in pairwise([patch, *below]):
        assert prod(smaller) <= FALLBACK_SHARE * prod(larger)
        assert all(a >= b for a, b in zip(larger, smaller, strict=True))
    for fallback in below:
        assert prod(fallback) >= LEAST_FALLBACK_SHARE * prod(patch)
        assert all(n % s == 0 for n, s in zip(fallback, stride, strict=True))
        assert all(n >= min(whole, SMALLEST_EDGE) for n, whole in zip(fallback, patch, strict=True))


def test_a_whole_ct_has_several_fallback_patches_of_its_aspect() -> None:
    below = list(fallback_patches((512, 512, 256), (32, 32, 32)))
    shares = [prod(patch) / prod((512, 512, 256)) for patch in below]
    assert len(below) >= 4
    assert shares[0] > 0.7
    assert shares[-1] < 0.32
    assert all(1.5 <= patch[0] / patch[2] <= 2.5 for patch in below)
