"""What raw samples say: medians, percentiles, and how sure the ratio of two medians is.

Timings are skewed and have outliers, so the median stands for a side. Of one process the interval comes from resampling
the samples themselves, which assumes no distribution; where there were several it is over how these differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import numpy as np
import numpy.typing as npt

from flabc.errors import require

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 20_240_229

#: Resamples where samples hang together, of which there may be thousands.
BLOCK_RESAMPLES = 2000

#: The percentiles that serving people quote.
QUANTILES = (50, 90, 95, 99)


def median(samples: Sequence[float]) -> float:
    """The middle of the samples, in their own unit.

    Raises:
        ValueError: if there are none.
    """
    return percentile(samples, 50)


def percentile(samples: Sequence[float], q: float) -> float:
    """The value below which ``q`` percent (0 to 100) of the samples lie, interpolated linearly.

    Raises:
        ValueError: if there are none.
    """
    return float(np.percentile(_filled(samples), q))


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95 and p99 of the samples, by name."""
    return {f"p{q}": percentile(samples, q) for q in QUANTILES}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of ``a`` over the median of ``b``.

    Raises:
        ValueError: if either is empty.
        ZeroDivisionError: if the median of ``b`` is 0.
    """
    return median(a) / median(b)


def median_ratio_interval(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """Confidence interval of :func:`median_ratio` by the percentile bootstrap.

    Each side is resampled on its own with replacement; the interval spans the middle ``confidence`` of the
    ratios. The same samples and seed give the same interval. With a handful of samples it is rough and tends
    to be too narrow. After B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Raises:
        ValueError: if either is empty.
    """
    generator = np.random.default_rng(seed)
    above, below = (_resampled_medians(_filled(samples), resamples, generator) for samples in (a, b))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(above / below, [tail, 100 - tail])
    return float(low), float(high)


def ratio_over_openings(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]
) -> tuple[float, tuple[float, float]]:
    """How many times ``b`` is ``a``, and the 95 % interval, where two processes of one program differ.

    Samples of one process say nothing of the next, however many they are: the ratio of medians of an opening is one
    observation, and the interval is Student's of their logarithms. T. Kalibera and R. Jones, Rigorous Benchmarking in
    Reasonable Time (2013). With one opening alone it is :func:`median_ratio_interval`, which knows of no other.

    Args:
        a: samples of each opening.
        b: samples of each opening, opened beside those of ``a``.

    Raises:
        ValueError: if there is no opening, not as many of both, or one without samples.
    """
    ratios = [median_ratio(above, below) for above, below in zip(a, b, strict=True)]
    if len(ratios) == 1:
        return ratios[0], median_ratio_interval(a[0], b[0])
    logs = [log(ratio) for ratio in ratios]
    middle, error = float(np.mean(_filled(logs))), mean_error(logs) or 0.0
    students = require("scipy.stats", "report").t
    reach = float(students.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * error
    return exp(middle), (exp(middle - reach), exp(middle + reach))


def _resampled_medians(samples: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Medians of ``resamples`` draws of as many samples: (n,) in, (resamples,) out."""
    draws = generator.integers(0, len(samples), (resamples, len(samples)))
    medians: Floats = np.median(samples[draws], axis=1)
    return medians


def percentile_intervals(runs: Sequence[Sequence[float]]) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of :func:`percentiles` over all runs, of samples that hang together.

    Who comes behind somebody that waits long waits long as well, so blocks of neighbours are drawn, about as long as
    the square root of their run: the circular block bootstrap (D. Politis and J. Romano, 1992). Of few samples a high
    percentile's interval ends at the largest of them.

    Raises:
        ValueError: if a run is empty.
    """
    drawn = np.percentile(_blocks(runs, np.random.default_rng(SEED)), QUANTILES, axis=1)  # (quantiles, resamples)
    ends = np.percentile(drawn, [2.5, 97.5], axis=1).T
    return {f"p{q}": (float(low), float(high)) for q, (low, high) in zip(QUANTILES, ends, strict=True)}


def median_ratio_block_interval(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % confidence interval of the ratio of medians of runs whose samples hang together.

    Raises:
        ValueError: if a run is empty.
    """
    generator = np.random.default_rng(SEED)
    above, below = (np.median(_blocks(runs, generator), axis=1) for runs in (a, b))
    low, high = np.percentile(above / below, [2.5, 97.5])
    return float(low), float(high)


def _blocks(runs: Sequence[Sequence[float]], generator: np.random.Generator) -> Floats:
    """Draws of blocks from each run, as many samples as it has, side by side: (BLOCK_RESAMPLES, all samples)."""
    drawn = []
    for samples in map(_filled, runs):
        n, length = len(samples), round(len(samples) ** 0.5)
        begins = generator.integers(0, n, (BLOCK_RESAMPLES, -(-n // length), 1))
        places = (begins + np.arange(length)).reshape(BLOCK_RESAMPLES, -1)[:, :n] % n
        drawn.append(samples[places])
    return np.concatenate(drawn, axis=1)


def _filled(samples: Sequence[float]) -> Floats:
    if not len(samples):
        raise ValueError("there are no samples")
    return np.asarray(samples, np.float64)


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None if there are fewer than two."""
    return None if len(values) < 2 else float(np.std(values, ddof=1) / np.sqrt(len(values)))


def ratio_error(sums: Floats, sizes: Floats) -> float | None:
    """Standard error of ``sums.sum() / sizes.sum()`` over independent units, by linearisation; both (n,).

    After W. G. Cochran, Sampling Techniques (1977), chapter 6. None if there are fewer than two units.
    """
    n = len(sums)
    if n < 2:
        return None
    residuals = sums - sizes * (sums.sum() / sizes.sum())
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / sizes.sum())


def pass_at_k(n: int, passed: float, k: int) -> float:
    """Probability that one of ``k`` answers is right, unbiased, from ``n`` answers of which ``passed`` are.

    M. Chen et al., Evaluating Large Language Models Trained on Code (2021), section 2.1.

    Raises:
        ValueError: if there are fewer answers than ``k``.
    """
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} answers, not {n}")
    failed = n - int(passed)
    return 1.0 if failed < k else float(1 - np.prod(1 - k / np.arange(failed + 1, n + 1)))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that as many units are gained as lost, from those that changed (Q. McNemar, 1947)."""
    from scipy.stats import binomtest

    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost).pvalue)


def paired_test(a: Sequence[float], b: Sequence[float], *, seed: int = SEED) -> float:
    """Two-sided p-value that paired values differ by nothing: the mean difference under random flips of sign.

    Exact for few pairs, by ``RESAMPLES`` random flips for many. R. A. Fisher, The Design of Experiments (1935).
    """
    from scipy.stats import permutation_test

    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if not differences.any():
        return 1.0
    changed = differences[differences != 0]  # the others do not change under a flip
    if len(changed) < 2:
        return 1.0
    found = permutation_test(
        (changed,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES - 1,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
