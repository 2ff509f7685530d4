from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.sampling.intensity import (
    ChannelParameters,
    add_noise,
    blur,
    change_gamma,
    change_intensity,
    lower_resolution,
    scale_contrast,
)

SHAPE = (11, 14, 9)
ALL = ChannelParameters(
    noise_std=0.2,
    noise_seed=5,
    blur_sigma=0.8,
    brightness=1.2,
    contrast=0.8,
    low_resolution=0.6,
    gamma=1.3,
    gamma_inverted=True,
)


def make_rows(num: int = 3) -> Tensor:
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(7)) * 2 + 1


def assert_equal_to_rows(ours: Tensor, theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, torch.stack([torch.as_tensor(t) for t in theirs]), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_values_come_in_the_precision_of_the_rows(dtype: torch.dtype) -> None:
    rows = make_rows().to(dtype)
    changed = change_intensity(rows, [ALL, ChannelParameters(), ALL._replace(noise_seed=6)])
    assert changed.dtype == dtype
    scaled = change_intensity(rows, [ChannelParameters(brightness=0.1), ChannelParameters(), ChannelParameters()])
    assert torch.equal(scaled, torch.cat([rows[:1] * 0.1, rows[1:]]))


def test_brightness_equals_monai_scale_intensity() -> None:
    from monai.transforms import ScaleIntensity

    rows, factors = make_rows(), (0.8, 1.1, 1.25)
    ours = change_intensity(rows, [ChannelParameters(brightness=f) for f in factors])
    theirs = [
        ScaleIntensity(minv=None, maxv=None, factor=f - 1)(row[None])[0] for row, f in zip(rows, factors, strict=True)
    ]
    assert_equal_to_rows(ours, theirs)


def test_contrast_equals_monai_scale_about_the_mean_with_kept_range() -> None:
    from monai.transforms import ScaleIntensityFixedMean

    rows, factors = make_rows(), (0.75, 1.1, 1.25)
    theirs = [
        ScaleIntensityFixedMean(factor=f - 1, preserve_range=True)(row[None])[0]
        for row, f in zip(rows, factors, strict=True)
    ]
    assert_equal_to_rows(scale_contrast(rows, torch.tensor(factors)), theirs)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_equals_monai_adjust_contrast_with_retained_statistics(inverted: bool) -> None:
    from monai.transforms import AdjustContrast

    rows, gammas = make_rows(), (0.7, 1.0, 1.5)
    theirs = [
        AdjustContrast(gamma, invert_image=inverted, retain_stats=True)(row[None])[0]
        for row, gamma in zip(rows, gammas, strict=True)
    ]
    ours = change_gamma(rows, torch.tensor(gammas), torch.full((3,), float(inverted)))
    assert_equal_to_rows(ours, theirs, 1e-4)


def test_blur_equals_monai_gaussian_with_replicated_edges() -> None:
    from monai.networks.layers.convutils import gaussian_1d
    from monai.networks.layers.simplelayers import separable_filtering

    rows, sigmas = make_rows(), (0.5, 0.73, 1.0)
    theirs = []
    for row, sigma in zip(rows, sigmas, strict=True):
        kernel = gaussian_1d(torch.tensor(sigma), truncated=5.0)
        theirs.append(separable_filtering(row[None, None], [kernel] * 3, mode="replicate")[0, 0])
    assert_equal_to_rows(blur(rows, torch.tensor(sigmas)), theirs, 1e-4)


def test_low_resolution_equals_monai_with_exact_neighbours() -> None:
    from monai.transforms import RandSimulateLowResolution

    rows, fractions = make_rows(), (0.5, 0.77, 0.9)
    theirs = []
    for row, f in zip(rows, fractions, strict=True):
        transform = RandSimulateLowResolution(prob=1, downsample_mode="nearest-exact", zoom_range=(f, f))
        theirs.append(transform(row[None])[0])
    assert_equal_to_rows(lower_resolution(rows, fractions), theirs)


@pytest.mark.parametrize("fraction", [0.6, 2 / 3, 0.75, 0.9])
def test_low_resolution_does_not_shift_the_image(fraction: float) -> None:
    ramp = torch.arange(24.0)[:, None, None].expand(1, 24, 6, 6).contiguous()
    shift = (lower_resolution(ramp, [fraction]) - ramp)[0, 4:-4].mean()
    assert abs(float(shift)) < 0.2


def test_noise_has_the_drawn_spread_and_depends_on_its_seed_alone() -> None:
    rows = torch.zeros(3, 20, 24, 18)
    noisy = add_noise(rows, torch.tensor([0.1, 0.3, 0.3]), [1, 2, 1])
    assert noisy[0].std() == pytest.approx(0.1, rel=0.05)
    assert noisy[1].std() == pytest.approx(0.3, rel=0.05)
    torch.testing.assert_close(noisy[2], noisy[0] * 3)
    alone = add_noise(rows[:1], torch.tensor([0.3]), [2])
    assert torch.equal(alone[0], noisy[1])


def test_mean_and_spread_survive_gamma_and_the_range_survives_contrast() -> None:
    rows = make_rows()
    bent = change_gamma(rows, torch.tensor([0.7, 1.2, 1.5]), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(bent.mean((1, 2, 3)), rows.mean((1, 2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(bent.std((1, 2, 3)), rows.std((1, 2, 3)), atol=1e-4, rtol=0)
    stretched = scale_contrast(rows, torch.tensor([1.25] * 3))
    assert torch.equal(stretched.amax((1, 2, 3)), rows.amax((1, 2, 3)))


def test_inverting_gamma_acts_on_the_other_end() -> None:
    rows = make_rows(1)
    plain = change_gamma(rows, torch.tensor([1.5]), torch.tensor([0.0]))
    inverted = change_gamma(-rows, torch.tensor([1.5]), torch.tensor([1.0]))
    torch.testing.assert_close(inverted, -plain, atol=1e-5, rtol=0)


def test_neutral_parameters_change_nothing_and_the_input_is_never_written_to() -> None:
    rows = make_rows()
    before = rows.clone()
    assert change_intensity(rows, [ChannelParameters()] * 3) is rows
    changed = change_intensity(rows, [ALL, ChannelParameters(), ALL])
    assert torch.equal(rows, before)
    assert torch.equal(changed[1], rows[1])
    assert not torch.allclose(changed[0], rows[0])


@pytest.mark.parametrize("name", ["noise_std", "blur_sigma", "brightness", "contrast", "low_resolution", "gamma"])
def test_each_parameter_changes_its_rows_and_no_other(name: str) -> None:
    rows = make_rows()
    only = ChannelParameters(**{name: getattr(ALL, name)})
    changed = change_intensity(rows, [ChannelParameters(), only, ChannelParameters()])
    assert not torch.allclose(changed[1], rows[1], atol=1e-3)
    assert torch.equal(changed[[0, 2]], rows[[0, 2]])
    assert torch.isfinite(changed).all()


def test_rows_do_not_see_each_other() -> None:
    rows = make_rows()
    drawn = [ALL, ALL._replace(noise_seed=6, gamma_inverted=False), ALL._replace(blur_sigma=0.5, contrast=1.2)]
    together = change_intensity(rows, drawn)
    alone = torch.cat([change_intensity(row[None], [one]) for row, one in zip(rows, drawn, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_kept_axis_is_neither_blurred_nor_thinned_out() -> None:
    per_slice = torch.randn(SHAPE[2], generator=torch.Generator().manual_seed(0)).expand(1, *SHAPE).contiguous()
    for parameters in (ChannelParameters(blur_sigma=1.0), ChannelParameters(low_resolution=0.5)):
        kept = change_intensity(per_slice, [parameters], kept_axis=2)
        torch.testing.assert_close(kept, per_slice, atol=1e-5, rtol=0)
        assert not torch.allclose(change_intensity(per_slice, [parameters]), per_slice, atol=1e-2)


def test_a_constant_image_stays_finite() -> None:
    rows = torch.full((1, *SHAPE), 3.0)
    changed = change_intensity(rows, [ALL._replace(noise_std=0.0)])
    np.testing.assert_allclose(changed.numpy(), 3.6, atol=1e-4)
