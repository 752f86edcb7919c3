"""Intervals, paired tests and probabilities of improvement over seeds, and shares over clusters.

By scipy. Over seeds, values are one number per seed. What the values cannot tell is None: with one
seed, and where all seeds gave the same value, there is no interval and no t-test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

Method = Literal["t", "bootstrap"]
CONFIDENCE = 0.95
RESAMPLES = 9999
ROUNDING = 1e-12  # rounding error of values, as a share of the largest
FEW_CLUSTERS = 30  # with fewer, the variance between clusters is itself known roughly only


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with the bounds of its 95% interval; None where there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int | None = None
    """Groups of dependent values, such as the pairs of one prompt; None for independent values."""


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

    @property
    def p(self) -> float | None:
        """p of the t-test, or of the sign-flip test where the differences are equal."""
        return self.p_sign_flip if self.p_t is None else self.p_t


def estimate(values: Sequence[float], method: Method = "t") -> Estimate:
    """Mean of at least one value with its 95% interval.

    t: mean ± t_{n-1} s / sqrt(n), which suits few seeds that are about normal. bootstrap:
    percentiles of resampled means (Efron 1979), which assumes no distribution but is too narrow for
    fewer than about ten seeds. Equal values show no spread, so they have no interval.
    """
    data = np.asarray(values, dtype=np.float64)
    mean, n = float(data.mean()), len(data)
    if n < 2 or np.ptp(data) == 0.0:
        return Estimate(mean, None, None, n)
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
    sides are resampled. At 0 and 1 resampling shows no spread; there the interval is Wilson's for
    min(N, M) independent comparisons.
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
    if mean in (0.0, 1.0):
        return Estimate(mean, *_wilson(mean, n, _normal_quantile()), n)
    interval = _bootstrap((x, y), statistic)
    return Estimate(mean, float(interval.low), float(interval.high), n)


def proportion(successes: float, n: int) -> Estimate:
    """A share of n independent rows with its 95% Wilson interval."""
    share = successes / n
    return Estimate(share, *_wilson(share, n, _normal_quantile()), n)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927."""
    centre = share + z * z / (2 * n)
    spread = z * float(np.sqrt(share * (1.0 - share) / n + z * z / (4 * n * n)))
    scale = 1.0 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _normal_quantile() -> float:
    return float(_stats().norm.ppf(0.5 + CONFIDENCE / 2))


def _t_quantile(groups: int) -> float:
    return float(_stats().t.ppf(0.5 + CONFIDENCE / 2, groups - 1))


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

    The interval is that of `clustered_ratio`.
    """
    _, number = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    result = clustered_ratio(
        np.bincount(number, weights=np.asarray(outcomes, dtype=np.float64)), np.bincount(number)
    )
    return replace(result, n=len(outcomes))


def clustered_ratio(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray
) -> Estimate:
    """sum(a) / sum(b) over G independent clusters, with its 95% interval; n is sum(b).

    numerators, denominators: one number per cluster (G). The variance is that of a ratio of sums,
    V = G/(G-1) sum_g (a_g - R b_g)² / (sum b)². Where the a_g are counts (or halves, of ties) from
    0 to b_g, the interval is Wilson's for the number of independent rows that would have this
    variance, n_eff = R(1 - R) / V (Dean and Pagano 2015), with the t quantile of G - 1 degrees of
    freedom. At 0 and 1, where V is 0 whatever the truth is, n_eff is G. Other ratios have
    R ± t sqrt(V), and no interval where V is 0. One cluster has no interval.
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    total, groups = float(b.sum()), len(a)
    ratio = float(a.sum()) / total
    n = round(total)
    if groups < 2:
        return Estimate(ratio, None, None, n, groups)
    variance = float(((a - ratio * b) ** 2).sum()) / total**2 * groups / (groups - 1)
    t = _t_quantile(groups)
    if ((a < 0.0) | (a > b) | (2.0 * a % 1.0 != 0.0)).any():
        half = t * float(np.sqrt(variance))
        if half == 0.0:
            return Estimate(ratio, None, None, n, groups)
        return Estimate(ratio, ratio - half, ratio + half, n, groups)
    effective = float(groups)
    if 0.0 < ratio < 1.0:
        most = max(total, 1.0)
        effective = (
            min(max(ratio * (1.0 - ratio) / variance, 1.0), most) if variance > 0.0 else most
        )
    return Estimate(ratio, *_wilson(ratio, effective, t), n, groups)


def few_clusters(estimates: Iterable[Estimate | None], what: str = "prompts") -> str | None:
    """A sentence if an estimate rests on fewer than FEW_CLUSTERS clusters; None otherwise."""
    counts = [e.clusters for e in estimates if e is not None and e.clusters is not None]
    if min(counts, default=FEW_CLUSTERS) >= FEW_CLUSTERS:
        return None
    return (
        f"accuracies over fewer than {FEW_CLUSTERS} {what} (the fewest: {min(counts)}) have rough "
        "intervals; close values cannot be distinguished"
    )


def clustered_difference(differences: Sequence[float], clusters: Sequence[str]) -> Difference:
    """Mean of per-row differences with a t interval and test over clusters.

    Equal differences have neither; they have the exact sign-flip test, whose p is 2^(1-C).
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    variance, groups = _clustered_variance(values, clusters)
    if groups < 2:
        return Difference(mean, None, None, n, None, None)
    error = float(np.sqrt(variance))
    if error <= ROUNDING * abs(mean):  # no spread to test against, unless there is no difference
        p_t, p_sign_flip = (1.0, 1.0) if mean == 0.0 else (None, 2.0 ** (1 - groups))
        return Difference(mean, None, None, n, p_t, p_sign_flip)
    half = _t_quantile(groups) * error
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
