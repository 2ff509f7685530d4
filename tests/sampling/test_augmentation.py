from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentationConfig
from pipeline.geometry import Shape3
from pipeline.sampling.augmentation import Augmentation, AugmentationParameters
from pipeline.sampling.intensity import ChannelParameters

PATCH: Shape3 = (12, 17, 10)
BOX: Shape3 = (21, 26, 19)
NAMES = ("mirror", "rotate", "scale", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma")
NEVER = dict.fromkeys(NAMES, 0.0)
SPATIAL = {**NEVER, "mirror": 0.5, "rotate": 1.0, "scale": 1.0}
NEUTRAL = AugmentationParameters(channels=(ChannelParameters(),) * 2)


def make_augmentation(*, anisotropic_axis: int | None = None, **options: object) -> Augmentation:
    config = AugmentationConfig(**options)  # type: ignore[arg-type]
    return Augmentation(config, patch_size=PATCH, num_channels=2, anisotropic_axis=anisotropic_axis)


def make_box(seed: int = 0, shape: Shape3 = BOX) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.normal(size=(2, *shape)).astype(np.float32))
    return image, torch.from_numpy(rng.integers(-1, 4, shape).astype(np.int16))


def draw_many(augmentation: Augmentation, num: int) -> list[AugmentationParameters]:
    return [augmentation.draw(np.random.default_rng([1, n])) for n in range(num)]


@pytest.mark.parametrize("options", [NEVER, {"enabled": False, **dict.fromkeys(NAMES, 1.0)}])
def test_zero_probabilities_or_switching_off_give_the_identity(options: dict[str, float]) -> None:
    augmentation = make_augmentation(**options)
    image, label = make_box(shape=PATCH)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert augmentation.draw(rng) == NEUTRAL
        got = augmentation(image, label, rng)
        assert torch.equal(got[0], image)
        assert torch.equal(got[1], label)


def test_the_same_generator_gives_the_same_patch_and_input_is_not_written_to() -> None:
    augmentation = make_augmentation(**dict.fromkeys(NAMES, 1.0))
    image, label = make_box()
    before = image.clone(), label.clone()
    one = augmentation(image, label, np.random.default_rng(4))
    two = augmentation(image, label, np.random.default_rng(4))
    three = augmentation(image, label, np.random.default_rng(5))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], three[0])
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])


def test_parameters_can_be_kept_and_applied_again() -> None:
    augmentation = make_augmentation(**dict.fromkeys(NAMES, 1.0))
    image, label = make_box()
    drawn = augmentation.draw(np.random.default_rng(4))
    replayed = augmentation.augment(image, label, pickle.loads(pickle.dumps(drawn)))
    at_once = augmentation(image, label, np.random.default_rng(4))
    assert torch.equal(replayed[0], at_once[0])
    assert torch.equal(replayed[1], at_once[1])


def test_a_batch_gives_the_same_as_its_patches_one_by_one() -> None:
    augmentation = make_augmentation(**dict.fromkeys(NAMES, 0.6))
    boxes = [make_box(seed) for seed in range(6)]
    drawn = draw_many(augmentation, 6)
    images, labels = augmentation.augment_batch(
        torch.stack([image for image, _ in boxes]), torch.stack([label for _, label in boxes]), drawn
    )
    assert images.shape == (6, 2, *PATCH)
    assert labels.shape == (6, *PATCH)
    for n, (image, label) in enumerate(boxes):
        alone = augmentation.augment(image, label, drawn[n])
        torch.testing.assert_close(images[n], alone[0], atol=1e-5, rtol=0)
        assert torch.equal(labels[n], alone[1])


def test_every_spatial_change_moves_image_and_label_alike() -> None:
    shape = (48, 50, 44)
    label = torch.from_numpy(np.random.default_rng(3).integers(-1, 100, shape).astype(np.int16))
    maps = torch.from_numpy(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32))
    augmentation = make_augmentation(**SPATIAL)
    mirrored = 0
    for drawn in draw_many(augmentation, 12):
        places, picked = augmentation.augment(maps, label, drawn._replace(channels=(ChannelParameters(),) * 3))
        clear = ((places - places.floor() - 0.5).abs() > 1e-3).all(dim=0)
        i, j, k = (axis[clear].round().long() for axis in places)
        assert torch.equal(label[i, j, k], picked[clear])
        mirrored += any(drawn.mirrored)
    assert mirrored > 3


def test_an_image_made_from_its_label_still_shows_it_after_everything() -> None:
    shape = (44, 48, 40)
    middle, radii = np.array([21.5, 23.5, 19.5]).reshape(3, 1, 1, 1), np.array([8.0, 10.0, 7.0]).reshape(3, 1, 1, 1)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    label = torch.from_numpy(((((places - middle) / radii) ** 2).sum(axis=0) < 1).astype(np.int16))
    image = torch.stack([label.float() * 4, label.float() * 4])
    config = AugmentationConfig(**{**dict.fromkeys(NAMES, 0.7), "noise": 0.0})  # type: ignore[arg-type]
    augmentation = Augmentation(config, patch_size=(28, 32, 26), num_channels=2)
    for drawn in draw_many(augmentation, 15):
        changed, moved = augmentation.augment(image, label, drawn)
        seen = changed[0] > (changed[0].amax() + changed[0].amin()) / 2
        assert dice(seen, moved == 1) > 0.9
        assert dice(seen, moved.roll(3, 0) == 1) < 0.9


def dice(one: Tensor, other: Tensor) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_intensity_changes_do_not_touch_labels() -> None:
    augmentation = make_augmentation(**{**dict.fromkeys(NAMES, 1.0), "mirror": 0.0, "rotate": 0.0, "scale": 0.0})
    image, label = make_box(shape=PATCH)
    changed, kept = augmentation(image, label, np.random.default_rng(0))
    assert torch.equal(kept, label)
    assert not torch.allclose(changed, image, atol=1e-2)


def test_labels_keep_their_values_and_outside_is_background() -> None:
    label = torch.full(PATCH, 3, dtype=torch.int16)
    label[:, :8] = -1
    augmentation = make_augmentation()
    turned = NEUTRAL._replace(rotation=(0.5, 0.3, -0.4), zoom=0.7)
    image, moved = augmentation.augment(torch.ones(2, *PATCH), label, turned)
    assert set(moved.unique().tolist()) == {-1, 0, 3}
    assert moved.dtype == torch.int16
    assert float(image[0][0, 0, 0]) == 0.0


@pytest.mark.parametrize(("axes", "expected"), [("auto", (1,)), ((0, 2), (0, 2)), ((), ())])
def test_axes_that_are_left_to_the_plan_are_the_plans(axes: object, expected: tuple[int, ...]) -> None:
    config = AugmentationConfig(mirror=1.0, mirror_axes=axes)  # type: ignore[arg-type]
    augmentation = Augmentation(config, patch_size=(4, 6, 5), num_channels=1, mirror_axes=(1,))
    drawn = augmentation.draw(np.random.default_rng(0))
    assert drawn.mirrored == tuple(axis in expected for axis in range(3))


def test_mirroring_flips_the_drawn_axes_of_image_and_label() -> None:
    augmentation = make_augmentation(**{**NEVER, "mirror": 1.0, "mirror_axes": (0, 2)})
    image, label = make_box(shape=PATCH)
    changed, moved = augmentation(image, label, np.random.default_rng(0))
    assert torch.equal(changed, image.flip(1, 3))
    assert torch.equal(moved, label.flip(0, 2))


def share(values: Sequence[object]) -> float:
    return float(np.mean([bool(value) for value in values]))


def test_drawn_parameters_follow_the_configured_probabilities() -> None:
    config = AugmentationConfig()
    drawn = draw_many(make_augmentation(), 3000)
    channels = [channel for patch in drawn for channel in patch.channels]
    observed = {
        "mirror": share([flag for patch in drawn for flag in patch.mirrored]),
        "rotate": share([any(patch.rotation) for patch in drawn]),
        "scale": share([patch.zoom != 1 for patch in drawn]),
        "noise": share([c.noise_std for c in channels]),
        "blur": share([c.blur_sigma for c in channels]),
        "brightness": share([c.brightness != 1 for c in channels]),
        "contrast": share([c.contrast != 1 for c in channels]),
        "low_resolution": share([c.low_resolution != 1 for c in channels]),
        "gamma": share([c.gamma != 1 for c in channels]),
    }
    for name, value in observed.items():
        assert value == pytest.approx(getattr(config, name), abs=0.03), name
    assert share([c.gamma_inverted for c in channels]) == pytest.approx(0.25 * config.gamma, abs=0.02)


def test_drawn_parameters_fill_their_documented_ranges_evenly() -> None:
    drawn = draw_many(make_augmentation(**dict.fromkeys(NAMES, 1.0)), 1500)
    channels = [patch.channels[0] for patch in drawn]
    ranges: dict[str, tuple[list[float], float, float]] = {
        "rotation": ([np.degrees(patch.rotation[1]) for patch in drawn], -30, 30),
        "zoom": ([np.log(patch.zoom) for patch in drawn], np.log(0.7), np.log(1.4)),
        "noise variance": ([c.noise_std**2 for c in channels], 0, 0.1),
        "blur": ([c.blur_sigma for c in channels], 0.5, 1),
        "brightness": ([np.log(c.brightness) for c in channels], np.log(0.75), np.log(1.25)),
        "contrast": ([np.log(c.contrast) for c in channels], np.log(0.75), np.log(1.25)),
        "low resolution": ([c.low_resolution for c in channels], 0.5, 1),
        "gamma": ([np.log(c.gamma) for c in channels], np.log(0.7), np.log(1.5)),
    }
    for name, (values, low, high) in ranges.items():
        counts, _ = np.histogram(values, bins=5, range=(low, high))
        assert counts.sum() == len(values), name
        assert counts.min() > 0.8 * len(values) / 5, name


def test_channels_and_changes_are_drawn_independently() -> None:
    drawn = draw_many(make_augmentation(**dict.fromkeys(NAMES, 0.5)), 2000)
    flags = np.array(
        [
            [any(p.rotation), p.zoom != 1, *p.mirrored]
            + [f for c in p.channels for f in (c.noise_std > 0, c.blur_sigma > 0, c.brightness != 1, c.gamma != 1)]
            for p in drawn
        ],
        float,
    )
    correlation = np.corrcoef(flags.T) - np.eye(flags.shape[1])
    assert np.abs(correlation).max() < 0.1
    assert len({c.noise_seed for p in drawn for c in p.channels if c.noise_std}) > 1900


def test_thick_slices_are_turned_in_their_plane_only() -> None:
    augmentation = make_augmentation(anisotropic_axis=1, **SPATIAL)
    slices = torch.arange(30.0)[None, :, None].expand(2, 24, 30, 22).contiguous()
    for drawn in draw_many(augmentation, 10):
        assert drawn.rotation[0] == drawn.rotation[2] == 0
        assert drawn.rotation[1] != 0
        changed, _ = augmentation.augment(slices, torch.zeros(24, 30, 22, dtype=torch.int16), drawn)
        along = changed[0][4:8, :, 4:6].amax((0, 2))
        steps = [float(b - a) for a, b in pairwise(along)]
        np.testing.assert_allclose(np.abs(steps), 1.0, atol=1e-4)
