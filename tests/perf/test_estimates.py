from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from flabc.perf.estimates import (
    median,
    median_ratio,
    median_ratio_interval,
    percentile,
    percentiles,
    ratio_over_openings,
)


def drawn(seed: int, middle: float, count: int = 200) -> list[float]:
    return (middle * np.random.default_rng(seed).lognormal(0, 0.1, count)).tolist()


def test_median_and_percentiles_of_known_samples() -> None:
    samples = [float(i) for i in range(101)]
    assert median(samples) == 50
    assert percentile(samples, 25) == 25
    assert percentiles(samples) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99}


def test_median_ratio_ignores_an_outlier() -> None:
    assert median_ratio([2.0, 2.0, 900.0], [4.0, 4.0, 4.0]) == 0.5


def test_interval_covers_the_known_ratio_and_excludes_one() -> None:
    low, high = median_ratio_interval(drawn(1, 16.0), drawn(2, 20.0))
    assert low < 0.8 < high < 1


def test_interval_covers_about_as_often_as_it_says() -> None:
    intervals = [
        median_ratio_interval(drawn(2 * i, 3.0, 40), drawn(2 * i + 1, 4.0, 40), resamples=400) for i in range(200)
    ]
    covered = sum(low <= 0.75 <= high for low, high in intervals) / len(intervals)
    assert 0.90 <= covered <= 0.995


def test_interval_is_repeatable_and_follows_the_seed() -> None:
    a, b = drawn(3, 1.0, 25), drawn(4, 1.0, 25)
    assert median_ratio_interval(a, b) == median_ratio_interval(a, b)
    assert median_ratio_interval(a, b, seed=1) != median_ratio_interval(a, b, seed=2)


def test_interval_narrows_with_more_samples_and_with_less_confidence() -> None:
    def width(count: int, confidence: float = 0.95) -> float:
        low, high = median_ratio_interval(drawn(5, 1.0, count), drawn(6, 1.0, count), confidence=confidence)
        return high - low

    assert width(400) < width(20)
    assert width(50, confidence=0.5) < width(50)


def test_equal_samples_give_no_width() -> None:
    assert median_ratio_interval([3.0] * 5, [6.0] * 5) == (0.5, 0.5)


def opened(seed: int, middle: float, openings: int) -> list[list[float]]:
    """Ten runs each of processes that differ by 3 %, while their own runs differ by 1 %."""
    draw = np.random.default_rng(seed)
    return [(middle * draw.lognormal(0, 0.03) * draw.lognormal(0, 0.01, 10)).tolist() for _ in range(openings)]


def test_the_interval_over_openings_covers_where_that_of_the_samples_does_not() -> None:
    sides = [(opened(2 * i, 3.0, 4), opened(2 * i + 1, 4.0, 4)) for i in range(300)]
    over = [ratio_over_openings(*each)[1] for each in sides]
    flat = [median_ratio_interval(*(list(chain(*each)) for each in pair), resamples=200) for pair in sides]
    covered = [sum(low <= 0.75 <= high for low, high in intervals) / len(sides) for intervals in (over, flat)]
    assert 0.92 <= covered[0] <= 0.98
    assert covered[1] < 0.8


def test_the_interval_over_openings_is_students() -> None:
    a, b = opened(1, 3.0, 5), opened(2, 4.0, 5)
    logs = np.log([median(x) / median(y) for x, y in zip(a, b, strict=True)])
    wanted = ttest_1samp(logs, 0).confidence_interval(0.95)
    ratio, interval = ratio_over_openings(a, b)
    assert ratio == pytest.approx(np.exp(logs.mean()))
    assert interval == pytest.approx((np.exp(wanted.low), np.exp(wanted.high)))
    assert ratio_over_openings(a[:1], b[:1]) == (median_ratio(a[0], b[0]), median_ratio_interval(a[0], b[0]))
    with pytest.raises(ValueError, match="shorter"):
        ratio_over_openings(a, b[:4])


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], []), ([], [])])
def test_no_samples_is_an_error(sides: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="no samples"):
        median_ratio(*sides)
    with pytest.raises(ValueError, match="no samples"):
        median_ratio_interval(*sides)
