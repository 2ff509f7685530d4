"""What users get wrong about a step is one line with the network, the patch and the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.losses.segmentation_loss import make_loss
from pipeline.networks.norms import replace_batchnorm
from pipeline.networks.recompute import recompute_modules
from pipeline.planning.budget import estimate_overhead_bytes
from pipeline.planning.fit import largest_patch, patches_within
from pipeline.planning.kept_bytes import propose_recompute
from pipeline.planning.meter import meter_step

GIB = 1024**3


class Halves(nn.Module):
    """Halves, doubles and adds: it takes no patch of odd edges."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(4, 3, 2, stride=2)
        self.skip = nn.Conv3d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x."""
        return self.up(self.down(x)) + self.skip(x)


class ReadsValues(nn.Module):
    """Decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x, or of -x."""
        return self.head(x) if x.mean() > 0 else self.head(-x)


def meter(network: nn.Module | None = None, **options: Any) -> object:
    given = {"patch_size": (8, 8, 8), "in_channels": 2, **options}
    return meter_step(network or Halves(), make_loss(), **given)


def fit(network: nn.Module | None = None, **options: Any) -> object:
    given = {"patch_sizes": [(16, 16, 16), (8, 8, 8)], "in_channels": 2, "budget_bytes": GIB, **options}
    return largest_patch(network or Halves(), make_loss(), **given)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: meter(in_channels=5),
            r"^Halves: the step fails with patch 8 x 8 x 8, 5 channel\(s\) and batch 1 \(RuntimeError: .*5 channels",
        ),
        (lambda: meter(patch_size=(8, 7, 8)), r"^Halves: the step fails with patch 8 x 7 x 8, 2 channel"),
        (
            lambda: propose_recompute(Halves(), in_channels=5, patch_size=(8, 8, 8)),
            r"^Halves: the step fails",
        ),
        (
            lambda: propose_recompute(ReadsValues(), in_channels=2, patch_size=(8, 8, 8)),
            r"^ReadsValues: .* the value",
        ),
        (lambda: fit(ReadsValues(), recompute="auto"), r"^ReadsValues: .* reads the value of a tensor"),
        (lambda: meter(patch_size=(8, 8)), r"^patch_size: three edges"),
        (lambda: meter(in_channels=0), r"^patch_size: three edges .* in_channels 0"),
        (lambda: meter(optimizer="adam"), r'^optimizer: "adam" is neither sgd, adamw nor a function'),
        (lambda: meter(precision="fp32"), r'^precision: "fp32" is none of bf16-mixed, 16-mixed, 32-true'),
        (lambda: meter(device_type="gpu"), r'^device_type: "gpu" is none of cpu, cuda'),
        (lambda: meter(Halves().requires_grad_(False)), r"^Halves: no parameter requires a gradient"),
        (lambda: fit(patch_sizes=[]), r"^patch_sizes: no patch is given"),
        (lambda: fit(patch_sizes=[(8, 8, 8), (16, 8, 8)]), r"^patch_sizes: 16 x 8 x 8 comes after 8 x 8 x 8"),
        (lambda: fit(recompute="0"), r'^recompute: "0" is neither auto'),
        (lambda: fit(recompute=["0"]), r'^recompute: a list of module names is needed, such as \["0"\]'),
        (lambda: recompute_modules(Halves(), "0"), r"^recompute: a list of module names"),
        (lambda: patches_within((8, 8, 8), 0), r"^divisor: must be at least 1"),
        (lambda: replace_batchnorm(nn.Sequential(nn.BatchNorm3d(4)), num_groups=0), r"^num_groups: must be at least 1"),
    ],
)
def test_a_step_that_cannot_be_metered_is_one_clear_line(
    act: Callable[[], object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    if "the step" in message:
        assert caught.value.__cause__ is not None


class GrowsByRecompute(nn.Module):
    """Has a part that keeps less than its inputs take, and so is best left plain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 1, 1)
        self.cheap = _Sum()
        self.head = nn.Conv3d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x."""
        return self.head(self.cheap(self.first(x), torch.ones(1, 60, *x.shape[2:])))


class _Sum(nn.Module):
    def forward(self, x: Tensor, wide: Tensor) -> Tensor:
        return torch.sigmoid(x + wide.sum(1, keepdim=True))


def test_a_patch_that_fits_plain_is_not_recomputed_though_recomputation_would_cost_more() -> None:
    peaks = [
        meter_step(network, make_loss(), patch_size=(16, 16, 16), in_channels=2).peak_bytes
        for network in (GrowsByRecompute(), recompute_modules(GrowsByRecompute(), ["cheap"]))
    ]
    assert peaks[0] < peaks[1], "the network is not what it is said to be"
    budget = peaks[0] + estimate_overhead_bytes(peaks[0])
    patches = [(24, 24, 24), (16, 16, 16), (8, 8, 8)]
    found = largest_patch(
        GrowsByRecompute(), make_loss(), in_channels=2, budget_bytes=budget, patch_sizes=patches, recompute=[["cheap"]]
    )
    assert (found.best.patch_size, found.best.recompute) == ((16, 16, 16), ())
