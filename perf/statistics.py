"""What raw samples say: medians, percentiles, and how sure the ratio of two medians is.

Timings are skewed and have outliers, so the median stands for a side, and the interval comes from resampling
the samples themselves, which assumes no distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 20_240_229

#: The percentiles that serving people quote.
QUANTILES = (50, 90, 99)


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
    """p50, p90 and p99 of the samples, by name."""
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


def _resampled_medians(samples: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Medians of ``resamples`` draws of as many samples: (n,) in, (resamples,) out."""
    draws = generator.integers(0, len(samples), (resamples, len(samples)))
    medians: Floats = np.median(samples[draws], axis=1)
    return medians


def _filled(samples: Sequence[float]) -> Floats:
    if not len(samples):
        raise ValueError("there are no samples")
    return np.asarray(samples, np.float64)
