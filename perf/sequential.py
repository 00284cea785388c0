"""Sequential decisions: measure until it is clear on which side of a limit an effect lies, and cry wolf rarely.

Every opening of two engines gives one number, the logarithm of candidate over baseline. They are looked at a few times
while they grow in number; each look spends a share of the error that is allowed. Signed-rank tests assume no more than
that the numbers scatter evenly about their middle, and outliers cannot drag them. F. Wilcoxon (1945); S. Holm (1979)
for several metrics; the share of each look by C. Bonferroni's inequality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

#: How many numbers there are when they are looked at. Of fewer than eight no signed-rank test can be sure.
LOOKS = (8, 12, 18, 27, 40, 60, 90)

#: Up to how many numbers the distribution of ranks is counted out.
EXACT = 50

Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True)
class Effect:
    """A metric's change.

    Args:
        ratio: candidate over baseline, the middle of all (Hodges-Lehmann).
        interval: of the ratio; each end may be passed with the error of one look.
        limit: what the ratio may not be above.
        above: p-value that the ratio is not above the limit.
        below: p-value that it is not below.
        count: how many numbers there are.
    """

    ratio: float
    interval: tuple[float, float]
    limit: float
    above: float
    below: float
    count: int


def effect(log_ratios: Sequence[float], limit: float, *, alpha: float) -> Effect:
    """What openings say of a metric.

    Args:
        log_ratios: the logarithm of candidate over baseline, one an opening.
        limit: what the ratio may not be above, such as 1.03.
        alpha: error that may be made at this look.

    Raises:
        ValueError: if there are none.
    """
    from scipy.stats import wilcoxon

    if not log_ratios:
        raise ValueError("there are no numbers")
    numbers = np.asarray(log_ratios, np.float64)
    shifted = numbers - math.log(limit)
    # Where numbers are tied scipy would try all signs, which takes seconds.
    method = "exact" if len(shifted) <= EXACT and np.all(shifted) else "approx"
    above, below = (float(wilcoxon(shifted, alternative=side, method=method).pvalue) for side in ("greater", "less"))
    middle, low, high = _walsh(numbers, alpha)
    return Effect(math.exp(middle), (math.exp(low), math.exp(high)), limit, above, below, len(numbers))


def _walsh(numbers: np.ndarray[tuple[int], np.dtype[np.float64]], alpha: float) -> tuple[float, float, float]:
    """The median of the averages of all pairs of numbers, and its interval.

    M. Hollander and D. Wolfe, Nonparametric Statistical Methods, section 3.3: by the normal approximation.
    """
    from scipy.stats import norm

    n = len(numbers)
    rows, columns = np.triu_indices(n)
    averages = np.sort((numbers[rows] + numbers[columns]) / 2)
    spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    cut = max(0, math.floor(n * (n + 1) / 4 - norm.ppf(1 - alpha) * spread))
    return float(np.median(averages)), float(averages[cut]), float(averages[-1 - cut])


def decide(effects: Mapping[str, Effect], *, alpha: float) -> dict[str, Outcome]:
    """Of each metric, whether it is surely above its limit, surely below, or neither yet.

    Holm's steps keep the chance of any false alarm among all metrics at ``alpha``. Passing is each metric's own.

    Args:
        effects: by metric.
        alpha: error that may be made at this look.
    """
    failed = holm({name: each.above for name, each in effects.items()}, alpha)
    return {
        name: "fail" if name in failed else "pass" if each.below <= alpha else "undecided"
        for name, each in effects.items()
    }


def holm(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Which hypotheses are refuted, with a chance of at most ``alpha`` of any mistake (S. Holm, 1979)."""
    refuted: set[str] = set()
    for done, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[name] > alpha / (len(p_values) - done):
            break
        refuted.add(name)
    return refuted


def share(alpha: float) -> float:
    """The error that each look may make, for ``alpha`` in all."""
    return alpha / len(LOOKS)
