"""Intervals, paired tests and probabilities of improvement over seeds, by scipy.

Values are one number per seed. With one seed there is no interval and no test: they are None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Method = Literal["t", "bootstrap"]
CONFIDENCE = 0.95
RESAMPLES = 9999
ROUNDING = 1e-12  # rounding error of values, as a share of the largest


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with the bounds of its 95% interval; None where there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with two-sided p-values of no difference."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p_t: float | None
    """Paired t-test."""
    p_sign_flip: float | None
    """Exact test over all 2^n signs of the differences. With n pairs it is at least 2^(1-n)."""


def estimate(values: Sequence[float], method: Method = "t") -> Estimate:
    """Mean of at least one value with its 95% interval.

    t: mean ± t_{n-1} s / sqrt(n), which suits few seeds that are about normal. bootstrap:
    percentiles of resampled means (Efron 1979), which assumes no distribution but is too narrow for
    fewer than about ten seeds.
    """
    data = np.asarray(values, dtype=np.float64)
    mean, n = float(data.mean()), len(data)
    if n < 2:
        return Estimate(mean, None, None, n)
    if np.ptp(data) == 0.0:  # scipy returns NaN
        return Estimate(mean, mean, mean, n)
    if method == "t":
        interval = _stats().ttest_1samp(data, 0.0).confidence_interval(CONFIDENCE)
    else:
        interval = _bootstrap((data,), np.mean)
    return Estimate(mean, float(interval.low), float(interval.high), n)


def paired_difference(
    values: Sequence[float], baseline: Sequence[float], method: Method = "t"
) -> Difference:
    """Differences values - baseline, paired by position (the same seed), and tests of no
    difference."""
    differences = _rounded(np.asarray(values, np.float64), np.asarray(baseline, np.float64))
    mean = estimate(differences.tolist(), method)
    if mean.n < 2:
        return Difference(mean.mean, None, None, mean.n, None, None)
    flipped = _stats().permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0
    )
    if np.ptp(differences) == 0.0:  # no spread to test against, unless there is no difference
        p_t = 1.0 if mean.mean == 0.0 else None
    else:
        p_t = float(_stats().ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean.mean, mean.low, mean.high, mean.n, p_t, float(flipped.pvalue))


def _rounded(values: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Differences [n]. If they differ only by rounding they are made equal: a test would take the
    rounding for spread and call any difference significant."""
    differences: np.ndarray = values - baseline
    error = ROUNDING * max(np.abs(values).max(), np.abs(baseline).max())
    if np.ptp(differences) > error:
        return differences
    mean = float(differences.mean())
    return np.full_like(differences, mean if abs(mean) > error else 0.0)


def probability_of_improvement(
    values: Sequence[float], others: Sequence[float], lower_is_better: bool
) -> Estimate:
    """P(X better than Y) for one run of each, where a tie counts half, with a bootstrap interval.

    (1 / NM) sum_ij S(x_i, y_j), the Mann-Whitney statistic (arXiv:2108.13264, section 4.3). Both
    sides are resampled.
    """

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        """x [..., N], y [..., M] -> [...]; S averaged over all N x M pairs."""
        signs = np.sign(x[..., :, None] - y[..., None, :]) * (-1.0 if lower_is_better else 1.0)
        shares: np.ndarray = (0.5 * (1.0 + signs)).mean(axis=(-2, -1))
        return shares

    x, y = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    mean, n = float(statistic(x, y)), min(len(x), len(y))
    if n < 2:
        return Estimate(mean, None, None, n)
    interval = _bootstrap((x, y), statistic)
    return Estimate(mean, float(interval.low), float(interval.high), n)


def proportion(successes: float, n: float) -> Estimate:
    """A share of n independent rows with its 95% Wilson interval; n may be an effective number."""
    z = float(_stats().norm.ppf(0.5 + CONFIDENCE / 2))
    share = successes / n
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927
    centre = share + z * z / (2 * n)
    spread = z * float(np.sqrt(share * (1.0 - share) / n + z * z / (4 * n * n)))
    scale = 1.0 + z * z / n
    return Estimate(
        share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), int(n)
    )


def _bootstrap(data: tuple[np.ndarray, ...], statistic: Any) -> Any:
    return (
        _stats()
        .bootstrap(
            data,
            statistic,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            method="percentile",
            vectorized=True,
            rng=0,
        )
        .confidence_interval
    )


def clustered_share(outcomes: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Mean of outcomes in [0, 1] whose rows are correlated within a cluster (pairs of one prompt).

    Wilson's interval for the number of independent rows that would have the clusters' variance:
    n_eff = p(1 - p) / V, with V the ratio estimator's variance (Dean and Pagano 2015).
    """
    values = np.asarray(outcomes, dtype=np.float64)
    share, n = float(values.mean()), len(values)
    variance, groups = _clustered_variance(values, clusters)
    if groups < 2:
        return Estimate(share, None, None, n)
    effective = float(groups)
    if variance > 0.0:
        effective = min(max(share * (1.0 - share) / variance, 1.0), float(n))
    interval = proportion(share * effective, effective)
    return Estimate(share, interval.low, interval.high, n)


def clustered_difference(differences: Sequence[float], clusters: Sequence[str]) -> Difference:
    """Mean of per-row differences with a t interval and test over clusters."""
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    variance, groups = _clustered_variance(values, clusters)
    if groups < 2:
        return Difference(mean, None, None, n, None, None)
    error = float(np.sqrt(variance))
    if error == 0.0:
        return Difference(mean, mean, mean, n, 1.0 if mean == 0.0 else 0.0, None)
    half = float(_stats().t.ppf(0.5 + CONFIDENCE / 2, groups - 1)) * error
    p = 2.0 * float(_stats().t.sf(abs(mean) / error, groups - 1))
    return Difference(mean, mean - half, mean + half, n, p, None)


def _stats() -> Any:
    """scipy.stats, imported on use: its import takes longer than everything else in a table."""
    from scipy import stats

    return stats


def _clustered_variance(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, int]:
    """(variance of the mean, number of clusters): C/(C-1) sum_c (sum of residuals)^2 / n^2."""
    _, number = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(number, weights=values - values.mean())
    groups = len(sums)
    if groups < 2:
        return 0.0, groups
    return float((sums**2).sum() / len(values) ** 2 * groups / (groups - 1)), groups
