"""Planes that are handed on one after the other are those of the whole volume, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pipeline.inference.planes import NotFiniteError, Planes
from pipeline.inference.sliding_window import sliding_window_scores, stream_planes
from pipeline.inference.streamed_labels import plan_label_memory, sliding_window_labels
from pipeline.inference.window_outputs import ScoreHead, all_flips
from pipeline.inference.windows import SlidingWindow, gaussian_weights, longest_axis, window_starts
from pipeline.networks.unet import UNet

torch.set_num_threads(1)

sizes = st.tuples(*[st.integers(1, 13)] * 3)
sweeps = st.fixed_dictionaries(
    {
        "window": sizes,
        "overlap": st.sampled_from([0.0, 0.3, 0.5, 0.75]),
        "tta_axes": st.sets(st.integers(0, 2)).map(sorted),
        "window_batch": st.integers(1, 3),
    }
)


def scores_of(x: Tensor) -> Tensor:
    """Three scores of a voxel that do not depend on its neighbours, but on its place: windows disagree."""
    ramp = torch.linspace(-1, 1, x.shape[4]) + torch.linspace(0, 2, x.shape[2])[:, None, None]
    return torch.cat([x * 2 + ramp, x.sin() * ramp, 0.3 - x], dim=1)


def random_image(shape: tuple[int, ...], channels: int = 1) -> Tensor:
    return torch.randn((channels, *shape), generator=torch.Generator().manual_seed(1))


def whole(image: Tensor, sliding: SlidingWindow, axis: int) -> Tensor:
    """All windows added to a whole padded volume in the order of a sweep along `axis`: a plain second writing of it."""
    before = [max(0, length - size) // 2 for size, length in zip(image.shape[1:], sliding.window, strict=True)]
    after = [max(0, length - size) - b for size, length, b in zip(image.shape[1:], sliding.window, before, strict=True)]
    padded = functional.pad(image, [n for axis in (2, 1, 0) for n in (before[axis], after[axis])])
    scores, total = torch.zeros(3, *padded.shape[1:]), torch.zeros(1, *padded.shape[1:])
    starts = [
        window_starts(size, length, overlap=sliding.overlap)
        for size, length in zip(padded.shape[1:], sliding.window, strict=True)
    ]
    order = [axis, *(other for other in range(3) if other != axis)]
    places = []
    for start in starts[axis]:
        firsts = product([start], *(starts[other] for other in order[1:]))
        row = [dict(zip(order, first, strict=True)) for first in firsts]
        places += [row[n : n + sliding.window_batch] for n in range(0, len(row), sliding.window_batch)]
    flips = all_flips(sliding.tta_axes)
    for batch in places:
        for flip in flips:
            for first in batch:
                box = (slice(None), *(slice(first[n], first[n] + sliding.window[n]) for n in range(3)))
                given = scores_of(padded[box][None].flip(flip)).flip(flip)[0]
                share = gaussian_weights(sliding.window)[None] / len(flips)
                total[box] += share
                scores[box] = torch.lerp(scores[box], given, share / total[box])
    inner = [slice(b, b + size) for b, size in zip(before, image.shape[1:], strict=True)]
    return scores[(slice(None), *inner)]


def gathered(planes: Iterator[Planes], shape: tuple[int, ...], axis: int) -> Tensor:
    """Planes put together; each must come once, in order."""
    result, done = torch.full((3, *shape), torch.nan), 0
    for each in planes:
        assert each.start == done < each.stop
        result.narrow(axis + 1, each.start, each.stop - each.start).copy_(each.take(slice(None)))
        done = each.stop
    assert done == shape[axis]
    return result


@settings(max_examples=120, deadline=None)
@given(shape=sizes, axis=st.integers(0, 2), sweep=sweeps)
def test_planes_equal_the_whole_accumulation_bit_by_bit_along_every_axis(
    shape: tuple[int, int, int], axis: int, sweep: dict[str, Any]
) -> None:
    image, sliding = random_image(shape), SlidingWindow(num_classes=3, **sweep)
    streamed = gathered(stream_planes(scores_of, image, sliding, axis=axis), shape, axis)
    assert torch.equal(streamed, whole(image, sliding, axis))


@settings(max_examples=60, deadline=None)
@given(shape=sizes, sweep=sweeps)
def test_the_scores_of_a_whole_volume_are_those_of_its_stream(
    shape: tuple[int, int, int], sweep: dict[str, Any]
) -> None:
    image, sliding = random_image(shape), SlidingWindow(num_classes=3, **sweep)
    scores = sliding_window_scores(scores_of, image, num_classes=3, **sweep)
    assert torch.equal(scores, gathered(stream_planes(scores_of, image, sliding), shape, longest_axis(shape)))
    assert torch.equal(scores, whole(image, sliding, longest_axis(shape)))


@settings(max_examples=60, deadline=None)
@given(shape=sizes, axis=st.integers(0, 2), sweep=sweeps, keep=st.integers(0, 4), data=st.data())
def test_a_region_is_the_same_part_of_the_whole(
    shape: tuple[int, int, int], axis: int, sweep: dict[str, Any], keep: int, data: st.DataObject
) -> None:
    # Windows that go through a mirrored network together are added in another order, which rounds otherwise.
    sliding = SlidingWindow(num_classes=3, **{**sweep, "window_batch": 1})
    image, region = random_image(shape), [slice(0, size) for size in shape]
    for other in {0, 1, 2} - {axis}:
        first = data.draw(st.integers(0, shape[other] - 1))
        region[other] = slice(first, data.draw(st.integers(first + 1, shape[other])))
    expected, calls, done = whole(image, sliding, axis)[(slice(None), *region)], [], 0

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return scores_of(x)

    for planes in stream_planes(counted, image, sliding, axis=axis, region=tuple(region), keep=keep):
        assert planes.start == max(0, done - keep)
        assert torch.equal(planes.means, expected.narrow(axis + 1, planes.start, planes.stop - planes.start))
        done = planes.stop
    reaching = [len(sliding.starts_within(other, shape[other], region[other])) for other in range(3)]
    assert len(calls) == reaching[0] * reaching[1] * reaching[2] * 2 ** len(sliding.tta_axes)


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_more_planes_are_held_than_a_window_has_however_long_the_volume(axis: int, keep: int) -> None:
    sliding = SlidingWindow(window=(6, 6, 6), num_classes=3)
    for length in (13, 130):
        shape = [7, 7, 7]
        shape[axis] = length
        for planes in stream_planes(scores_of, random_image(tuple(shape)), sliding, axis=axis, keep=keep):
            assert planes.means.untyped_storage().nbytes() == 3 * (6 + keep) * 7 * 7 * 4


@pytest.mark.parametrize("slab_stages", [0, 1])
@pytest.mark.parametrize("tta_axes", [(), (0, 2)])
def test_features_gathered_in_place_of_scores_give_the_same_scores(
    make_network: Callable[..., UNet], slab_stages: int, tta_axes: tuple[int, ...]
) -> None:
    network, image = make_network(2, 9, slab_stages=slab_stages), random_image((13, 9, 21), channels=2)
    sliding = SlidingWindow(window=(8, 6, 4), num_classes=9, tta_axes=tta_axes)
    expected = sliding_window_scores(network, image, window=(8, 6, 4), num_classes=9, tta_axes=tta_axes)
    for planes in stream_planes(network, image, sliding, of_features=True):
        assert len(planes.means) == 4
        assert planes.num_classes == 9
        some = planes.narrow(planes.start + 1, planes.stop)
        for classes in (slice(0, 9), slice(2, 5)):
            torch.testing.assert_close(
                some.take(classes), expected[classes, :, :, some.start : some.stop], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("is_unet", [True, False])
def test_labels_of_a_volume_are_its_highest_scores_also_in_blocks(
    make_network: Callable[..., UNet], is_unet: bool
) -> None:
    network, image = make_network(2, 9), random_image((13, 9, 21), channels=2)
    network = network if is_unet else nn.Conv3d(2, 9, 3, padding=1)
    sliding = SlidingWindow(window=(8, 6, 4), num_classes=9)
    scores = sliding_window_scores(network, image, window=(8, 6, 4), num_classes=9)
    memory = plan_label_memory(network, (13, 9, 21), sliding, num_channels=2)
    labels = sliding_window_labels(network, image, sliding, memory)
    bound = memory.num_bytes - memory.parts["means"] // 2
    divided = plan_label_memory(network, (13, 9, 21), sliding, num_channels=2, max_bytes=bound)
    assert len(divided.blocks) > 1
    assert divided.num_bytes <= bound
    assert torch.equal(labels, sliding_window_labels(network, image, sliding, divided))
    assert labels.dtype == torch.uint8
    clear = scores.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), scores.argmax(0)[clear])


def test_equal_scores_give_the_lowest_class_and_many_classes_are_counted_to_the_last() -> None:
    sliding, image = SlidingWindow(window=(4, 4, 4), num_classes=300), torch.zeros(1, 6, 5, 4)
    memory = plan_label_memory(nn.Identity(), (6, 5, 4), sliding, num_channels=1)

    def answer(*, last: float) -> Callable[[Tensor], Tensor]:
        level = torch.zeros(300)
        level[299] = last
        return lambda x: level[None, :, None, None, None].expand(len(x), -1, *x.shape[2:])

    assert not sliding_window_labels(answer(last=0), image, sliding, memory).any()
    assert (sliding_window_labels(answer(last=1), image, sliding, memory) == 299).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_planes_that_are_not_finite_are_found(value: float) -> None:
    means = torch.zeros(2, 3, 4, 5)
    Planes(0, 0, 3, 2, means).check_finite()
    Planes(0, 0, 3, 4, means, ScoreHead(torch.ones(4, 2), torch.zeros(4))).check_finite()
    means[1, 2, 3, 4] = value
    with pytest.raises(NotFiniteError):
        Planes(0, 0, 3, 2, means).check_finite()
    with pytest.raises(NotFiniteError):
        Planes(0, 0, 3, 4, means, ScoreHead(torch.ones(4, 2), torch.zeros(4))).check_finite()
    with pytest.raises(NotFiniteError):
        Planes(0, 0, 3, 4, torch.ones(2, 3, 4, 5), ScoreHead(torch.full((4, 2), value), torch.zeros(4))).check_finite()
