"""Two runs on the same cases: differences, the signed-rank test, and the price of testing often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from pipeline.evaluation.metrics import NAN

Values = NDArray[np.float64]

# Differences of equal Dice are not equal to the last bit: ranks would depend on rounding.
DIGITS = 10


def unit_means(values: Values, groups: Sequence[str]) -> Values:
    """The mean of each group, by rising name: patients with several cases count once."""
    return np.array([values[[group == name for group in groups]].mean() for name in sorted(set(groups))])


def signed_rank_p(differences: Values) -> tuple[float, float]:
    """The p-value of the two-sided Wilcoxon signed-rank test, and the least that it could be with so many differences.

    Differences of 0 are left out (Wilcoxon 1945); without any other p is 1. It is exact up to 50 differences that are
    all of different size, and up to 13 whatever they are; above it is from the normal approximation.

    Args:
        differences: One per independent unit.

    Returns:
        p and the least p; NaN both without any difference given.
    """
    if not len(differences):
        return NAN, NAN
    rounded = np.round(differences, DIGITS)
    other = rounded[rounded != 0]
    if not len(other):
        return 1.0, 1.0
    return float(wilcoxon(other).pvalue), float(2.0 ** (1 - len(other)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false alarm among them stays bounded (Holm 1979); NaN stays NaN."""
    adjusted = [NAN] * len(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    reached = 0.0
    for rank, (p, index) in enumerate(known):
        reached = max(reached, min(1.0, p * (len(known) - rank)))
        adjusted[index] = reached
    return adjusted
