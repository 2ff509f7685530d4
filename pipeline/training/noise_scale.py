"""The gradient noise scale, from squared norms of gradients.

B_simple = tr(Sigma) / |G|^2, with the gradient G of the loss and the covariance Sigma of a single patch's gradient, is
a number of patches (McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training"): far fewer
an optimiser step leave a step mostly noise, far more add little to it. Both parts are estimated without bias from the
squared norms of gradients at two batch sizes (their appendix A.1): here single micro-batches and their mean, which
`pipeline.training.gradient_noise` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# The noise scale grows as the loss falls: an average over so many optimiser steps follows it through a training.
HORIZON = 1000
# Before that the standard errors themselves are guesses.
MIN_STEPS = 50
# A ratio whose denominator may well be zero is not worth telling.
MIN_STANDARD_ERRORS = 3.0
# A recommendation stays within what the reading can tell of batches that much larger.
MAX_GROWTH = 8


def signal_and_noise(
    mean_small: float, big: float, *, num_batches: int, mean_inverse_batch: float
) -> tuple[float, float]:
    """Unbiased |G|^2 and tr(Sigma) from the gradients of the micro-batches of one optimiser step.

    With micro-batches of B_small patches and B_big patches in all, these are equations A.2 and A.3 of McCandlish et
    al. 2018, with the mean over all micro-batches in place of a single one: that leaves the expectation as it is, and
    |G|^2 becomes the mean product of gradients of *different* micro-batches, rid of the spread of their own norms.

    Args:
        mean_small: Mean over micro-batches of the squared norm of the gradient of their mean loss.
        big: Squared norm of the mean of these gradients.
        num_batches: Micro-batches, at least 2.
        mean_inverse_batch: Mean of 1 / patches of a micro-batch.
    """
    spread = mean_small - big
    return big - spread / (num_batches - 1), spread * num_batches / ((num_batches - 1) * mean_inverse_batch)


def recommended_batch(noise_scale: float, *, batch_size: int, effective_batch: int) -> int:
    """The effective batch that goes with a noise scale.

    `batch_size` times the power of two that comes nearest (in ratio) to the noise scale, from `batch_size` itself up to
    `MAX_GROWTH` times the `effective_batch` that it was measured with: beyond that, measure again with the larger one.
    """
    largest = math.floor(math.log2(MAX_GROWTH * effective_batch / batch_size))
    nearest = round(math.log2(max(noise_scale, batch_size) / batch_size))
    return int(batch_size * 2 ** min(nearest, largest))


@dataclass(frozen=True)
class NoiseReading:
    """What is known of the noise scale; all in patches.

    Attributes:
        num_steps: Optimiser steps it comes from.
        noise_scale: tr(Sigma) / |G|^2; None before `MIN_STEPS` steps, and while |G|^2 is less than
            `MIN_STANDARD_ERRORS` standard errors above zero.
        standard_error: Of the noise scale.
        at_least: Where |G|^2 cannot be told from zero: what the noise scale most likely exceeds. None where even that
            is unknown, because the estimate of |G|^2 is below zero by more than its standard errors.
    """

    num_steps: int
    noise_scale: float | None = None
    standard_error: float | None = None
    at_least: float | None = None

    def describe(self, *, batch_size: int, effective_batch: int) -> str:
        """The reading in words, with the effective batch that it recommends."""
        if self.noise_scale is not None:
            recommended = recommended_batch(self.noise_scale, batch_size=batch_size, effective_batch=effective_batch)
            return (
                f"noise scale {self.noise_scale:.3g} +- {self.standard_error:.2g} patches, "
                f"recommended effective_batch {recommended} (now {effective_batch})"
            )
        if self.num_steps < MIN_STEPS:
            return f"noise scale not yet known ({self.num_steps} of {MIN_STEPS} steps)"
        bound = "" if self.at_least is None else f", it is above {self.at_least:.2g} patches"
        return f"noise scale not yet known: the mean gradient is lost in the noise{bound}"


@dataclass
class NoiseSums:
    """Running means of |G|^2 and tr(Sigma), in which a step's weight falls by 1 / `HORIZON` with every later one.

    Means are taken of both before the ratio, which of single steps would be worthless. Plain numbers, so that a
    checkpoint holds them exactly.

    Attributes:
        num_steps: Steps added.
        weights, squared_weights: Sums of the steps' weights and of their squares.
        signal, noise: Weighted sums of |G|^2 and of tr(Sigma).
        signal_squared, noise_squared, product: Weighted sums of their squares and of their product.
    """

    num_steps: int = 0
    weights: float = 0.0
    squared_weights: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    signal_squared: float = 0.0
    noise_squared: float = 0.0
    product: float = 0.0

    def add(self, signal: float, noise: float) -> None:
        """Add the estimates of one optimiser step."""
        keep = 1 - 1 / HORIZON
        self.num_steps += 1
        self.weights = keep * self.weights + 1
        self.squared_weights = keep**2 * self.squared_weights + 1
        self.signal = keep * self.signal + signal
        self.noise = keep * self.noise + noise
        self.signal_squared = keep * self.signal_squared + signal**2
        self.noise_squared = keep * self.noise_squared + noise**2
        self.product = keep * self.product + signal * noise

    def read(self) -> NoiseReading:
        """The noise scale, its standard error by propagation (delta method), or why there is none."""
        if self.num_steps < MIN_STEPS:
            return NoiseReading(self.num_steps)
        signal, noise = self.signal / self.weights, self.noise / self.weights
        count = self.weights**2 / self.squared_weights
        signal_variance = max(0.0, self.signal_squared / self.weights - signal**2) / (count - 1)
        noise_variance = max(0.0, self.noise_squared / self.weights - noise**2) / (count - 1)
        covariance = (self.product / self.weights - signal * noise) / (count - 1)
        if signal <= 0 or signal < MIN_STANDARD_ERRORS * math.sqrt(signal_variance):
            highest = signal + MIN_STANDARD_ERRORS * math.sqrt(signal_variance)
            return NoiseReading(self.num_steps, at_least=noise / highest if highest > 0 and noise > 0 else None)
        scale = max(0.0, noise / signal)
        variance = noise_variance - 2 * scale * covariance + scale**2 * signal_variance
        return NoiseReading(self.num_steps, scale, math.sqrt(max(0.0, variance)) / signal)
