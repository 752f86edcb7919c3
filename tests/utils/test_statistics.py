"""Statistics over seeds, against numbers worked out by hand."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irl_align.utils.statistics import (
    Estimate,
    clustered_difference,
    clustered_ratio,
    clustered_share,
    estimate,
    few_clusters,
    paired_difference,
    probability_of_improvement,
    proportion,
)

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=6)


def test_estimate_gives_a_t_interval() -> None:
    # mean 2, s = 1, n = 3; t of 0.975 with 2 degrees of freedom is 4.302653 (tables).
    half = 4.302653 / math.sqrt(3)
    result = estimate([1.0, 2.0, 3.0])
    assert (result.mean, result.n) == (2.0, 3)
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_one_value_has_no_interval() -> None:
    assert (estimate([0.3]).low, estimate([0.3]).high, estimate([0.3]).n) == (None, None, 1)
    alone = paired_difference([0.5], [0.25])
    assert alone.mean == 0.25
    assert (alone.low, alone.p_t, alone.p_sign_flip) == (None, None, None)
    assert probability_of_improvement([0.1], [0.2], True).low is None


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_estimate_of_equal_values_has_no_interval(method: str) -> None:
    result = estimate([0.1, 0.1, 0.1], method)  # type: ignore[arg-type]
    assert (result.low, result.high) == (None, None) and result.mean == pytest.approx(0.1)


@settings(max_examples=25, deadline=None)
@given(VALUES)
def test_bootstrap_interval_lies_within_the_values(values: list[float]) -> None:
    result = estimate(values, "bootstrap")
    if len(set(values)) == 1:
        assert (result.low, result.high) == (None, None)
        return
    assert result.low is not None and result.high is not None
    slack = 1e-9 + 1e-9 * max(map(abs, values))
    assert min(values) - slack <= result.low <= result.high <= max(values) + slack
    assert estimate(values, "bootstrap") == result  # the resamples are seeded


def test_paired_difference_gives_a_t_test() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom, whose two-sided
    # p is 1 - t / sqrt(2 + t^2) (closed form for 2 degrees of freedom).
    t = 2.0 * math.sqrt(3.0)
    result = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.p_t == pytest.approx(1.0 - t / math.sqrt(2.0 + t * t))


@settings(max_examples=25, deadline=None)
@given(VALUES)
def test_paired_difference_counts_all_signs(differences: list[float]) -> None:
    total = abs(sum(differences))
    flips = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
             for signs in product((1, -1), repeat=len(differences))]  # fmt: skip
    expected = sum(flip >= total - 1e-9 for flip in flips) / len(flips)
    result = paired_difference(differences, [0.0] * len(differences))
    assert result.p_sign_flip == pytest.approx(expected, abs=1e-9)


def test_equal_values_are_not_significant() -> None:
    same = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.p_t, same.p_sign_flip) == (0.0, 1.0, 1.0)
    constant = paired_difference([2.0, 3.0], [1.0, 2.0])  # no spread: a t-test has no answer
    assert constant.p_t is None and constant.p_sign_flip == 0.5
    assert (constant.mean, constant.low, constant.high) == (1.0, None, None)


def test_paired_difference_ignores_rounding() -> None:
    result = paired_difference([0.31, 0.32, 0.33], [0.26, 0.27, 0.28])  # 0.05, to rounding
    assert result.mean == pytest.approx(0.05) and (result.low, result.p_t) == (None, None)
    assert paired_difference([0.1 + 0.2, 0.3], [0.3, 0.3]).p_t == 1.0


@pytest.mark.parametrize(
    ("values", "others", "lower", "expected"),
    [
        ([1.0, 2.0], [3.0, 4.0], True, 1.0),
        ([1.0, 2.0], [3.0, 4.0], False, 0.0),
        ([1.0, 3.0], [2.0, 3.0], True, 2.5 / 4),  # wins 1<2, 1<3; loses 3>2; ties 3=3
        ([5.0], [5.0, 6.0, 4.0], False, 1.5 / 3),
    ],
)
def test_probability_of_improvement_counts_wins_and_half_ties(
    values: list[float], others: list[float], lower: bool, expected: float
) -> None:
    result = probability_of_improvement(values, others, lower)
    assert result.mean == pytest.approx(expected)
    if result.low is not None and result.high is not None:
        assert 0.0 <= result.low <= result.mean <= result.high <= 1.0
        assert result.high - result.low > 0.3  # of at most two seeds each


def test_proportion_gives_wilsons_interval() -> None:
    # 8 of 10: the interval is 0.4902 to 0.9433 (Newcombe 1998).
    result = proportion(8, 10)
    assert (result.mean, result.n) == (0.8, 10)
    assert (result.low, result.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none, every = proportion(0, 5), proportion(5, 5)
    assert none.low == 0.0 and every.high == 1.0 and none.high is not None and none.high > 0.3


def wilson(share: float, n: float, t: float) -> tuple[float, float]:
    """Bounds p with |share - p| = t sqrt(p (1 - p) / n), the roots of a quadratic in p."""
    roots = np.roots([n + t * t, -(2 * n * share + t * t), n * share * share])
    return float(min(roots)), float(max(roots))


def test_clustered_share_of_independent_rows_is_wilsons_interval() -> None:
    """One row per cluster: the variance is p(1-p)/(n-1), so n_eff = n - 1."""
    outcomes = [1.0] * 8 + [0.0] * 2
    result = clustered_share(outcomes, [str(i) for i in range(10)])
    assert (result.mean, result.n, result.clusters) == (0.8, 10, 10)
    # t of 0.975 with 9 degrees of freedom is 2.262157 (tables).
    assert (result.low, result.high) == pytest.approx(wilson(0.8, 9, 2.262157), abs=1e-5)


def test_clustered_share_ignores_repeated_rows() -> None:
    """Ten equal rows per prompt have the same n_eff as one."""
    prompts = ["a", "b", "c", "d"]
    single = clustered_share([1.0, 1.0, 1.0, 0.0], prompts)
    repeated = clustered_share([1.0] * 30 + [0.0] * 10, [p for p in prompts for _ in range(10)])
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert (repeated.n, repeated.clusters) == (40, 4)
    assert clustered_share([1.0, 0.0], ["a", "a"]).low is None


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize(("groups", "t"), [(3, 4.302653), (10, 2.262157)])
def test_clustered_share_at_0_and_100_percent_counts_clusters(
    right: float, groups: int, t: float
) -> None:
    """No row differs, so only the number of prompts says how far the truth may be."""
    result = clustered_share([right] * 4 * groups, [str(i // 4) for i in range(4 * groups)])
    assert (result.low, result.high) == pytest.approx(wilson(right, groups, t), abs=1e-5)
    # At least as wide as the exact interval: 0.025^(1/G) is the Clopper-Pearson bound.
    assert result.low is not None and result.high is not None
    assert result.high - result.low >= 1.0 - 0.025 ** (1 / groups)


@pytest.mark.parametrize(
    ("groups", "pairs", "share", "correlation"),
    [
        (3, 4, 0.9, 0.3),
        (5, 4, 0.95, 0.3),
        (10, 4, 0.98, 0.5),
        (10, 4, 0.7, 0.0),
        (30, 4, 0.9, 0.3),
        (100, 1, 0.98, 0.0),
    ],
)
def test_clustered_share_covers_the_truth_in_nominal_share(
    groups: int, pairs: int, share: float, correlation: float
) -> None:
    """Simulated: each prompt has its own share, beta-distributed with this correlation of pairs."""
    random = np.random.default_rng(0)
    keys = [str(i // pairs) for i in range(groups * pairs)]
    covered = []
    for _ in range(600):
        own = np.full(groups, share)
        if correlation:
            spread = 1.0 / correlation - 1.0
            own = random.beta(share * spread, (1.0 - share) * spread, groups)
        outcomes = random.random((groups, pairs)) < own[:, None]
        result = clustered_share(outcomes.ravel().astype(float).tolist(), keys)
        assert result.low is not None and result.high is not None
        covered.append(result.low <= share <= result.high)
    assert np.mean(covered) >= 0.925  # 0.95 less 2.8 standard errors of 600 draws


def test_clustered_ratio_equals_the_interval_by_hand() -> None:
    # Accuracies of three prompts with 2, 1 and 3 pairs: 1 of 2, 1 of 1, 1 of 3; R = 1/2.
    # Residuals 0, 1/2, -1/2; variance (3/2)(1/2) / 36 = 1/48, so n_eff is (1/4) 48 = 12, but no
    # more than the 6 pairs.
    actual = clustered_ratio([1, 1, 1], [2, 1, 3])
    assert (actual.mean, actual.n, actual.clusters) == (0.5, 6, 3)
    assert (actual.low, actual.high) == pytest.approx(wilson(0.5, 6, 4.302653), abs=1e-5)


def test_clustered_ratio_of_other_numbers_has_a_t_interval() -> None:
    result, plain = clustered_ratio([1.2, 2.4, 3.1], [1, 1, 1]), estimate([1.2, 2.4, 3.1])
    assert (result.low, result.high) == pytest.approx((plain.low, plain.high))
    assert clustered_ratio([0.3, 0.3], [1, 1]).low is None


def test_few_clusters_names_the_smallest_number() -> None:
    many, few = Estimate(0.5, 0.4, 0.6, 90, 30), Estimate(0.5, 0.2, 0.8, 12, 3)
    assert few_clusters([many, Estimate(0.5, 0.4, 0.6, 5), None]) is None
    note = few_clusters([many, few])
    assert note is not None and "fewer than 30 prompts (the fewest: 3)" in note


def test_clustered_difference_by_hand() -> None:
    # Clusters with sums of residuals 1, -1 around the mean 0.5 of 4 rows: V = 2/16 * 2/1 = 1/4.
    result = clustered_difference([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert result.mean == 0.5
    # t = 0.5 / 0.5 = 1 with one degree of freedom, whose two-sided p is 1/2 (Cauchy).
    assert result.p_t == pytest.approx(0.5)
    assert result.high is not None and result.high == pytest.approx(0.5 + 0.5 * 12.7062, abs=1e-3)
    assert clustered_difference([0.0, 0.0], ["a", "b"]).p_t == 1.0
    # The same difference in every cluster shows no spread to test against.
    equal = clustered_difference([1.0, 1.0, 1.0], ["a", "b", "c"])
    assert (equal.mean, equal.low, equal.high, equal.p_t) == (1.0, None, None, None)
    assert equal.p == equal.p_sign_flip == 0.25  # all of three signs, or none: 2 of 8
