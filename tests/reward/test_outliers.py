"""Outliers by Mahalanobis distance: the covariance, the threshold, and shares of known samples."""

import numpy as np
import pytest

from irl_align.reward.outliers import (
    TYPICAL,
    ledoit_wolf,
    outlier_share,
    squared_distances,
    threshold,
)


@pytest.mark.parametrize(("count", "width"), [(5, 40), (60, 8), (400, 3)])
def test_ledoit_wolf_agrees_with_scikit_learn(count: int, width: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    draw = np.random.default_rng(count)
    states = draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + 3.0
    mean, shrunk = ledoit_wolf(states)
    expected, _ = covariance.ledoit_wolf(states)
    assert np.allclose(mean, states.mean(0))
    assert np.allclose(shrunk, expected, rtol=1e-9)


def test_squared_distances_are_written_by_hand() -> None:
    covariance = np.array([[4.0, 0.0], [0.0, 0.25]])
    states = np.array([[3.0, 2.0], [1.0, 1.5]])
    # (2^2 / 4) + (1^2 / 0.25), and 0.5^2 / 0.25
    found = squared_distances(states, np.array([1.0, 1.0]), covariance)
    assert found.tolist() == pytest.approx([5.0, 1.0])


def test_threshold_is_a_rank_that_new_samples_pass_with_5_percent_at_most() -> None:
    assert TYPICAL == 0.95
    assert threshold(np.arange(18.0)) == np.inf  # 19 numbers at least
    assert threshold(np.arange(19.0)) == 18.0  # passed by 1 of 20
    assert threshold(np.arange(99.0)) == 94.0  # rank 95 of 99


def keys(prompts: int, each: int) -> list[str]:
    return [f"p{i}" for i in range(prompts) for _ in range(each)]


def test_outlier_share_of_the_same_distribution_is_5_percent() -> None:
    draw = np.random.default_rng(0)
    mix = draw.normal(size=(12, 12))
    shares = []
    for _ in range(30):
        first, now = (draw.normal(size=(200, 12)) @ mix for _ in range(2))
        share = outlier_share(first, now, keys(200, 1), keys(200, 1))
        assert share is not None
        shares.append(share.mean)
    assert np.mean(shares) == pytest.approx(0.05, abs=0.012)


def test_outlier_share_finds_a_direction_in_which_samples_do_not_vary() -> None:
    """A small shift, as large as the least deviation, is far by Mahalanobis distance."""
    draw = np.random.default_rng(0)
    scales = np.array([100.0, 10.0, 0.1])
    first, now = (draw.normal(size=(400, 3)) * scales for _ in range(2))
    moved = now + np.array([0.0, 0.0, 1.0])  # ten deviations, and 1% of the largest one
    near, far = (outlier_share(first, x, keys(200, 2), keys(200, 2)) for x in (now, moved))
    assert near is not None and far is not None
    assert near.mean < 0.1 and near.clusters == 200
    assert far.mean > 0.9 and far.low is not None and far.low > 0.8


def test_outlier_share_of_half_the_samples_is_half() -> None:
    draw = np.random.default_rng(1)
    first, now = (draw.normal(size=(400, 4)) for _ in range(2))
    now[::2] += 100.0
    share = outlier_share(first, now, keys(400, 1), keys(400, 1))
    assert share is not None and share.mean == pytest.approx(0.525, abs=0.02)


def test_outlier_share_needs_19_samples_in_each_half() -> None:
    states = np.random.default_rng(0).normal(size=(40, 2))
    assert outlier_share(states, states, keys(40, 1), keys(40, 1)) is not None
    assert outlier_share(states[:36], states[:36], keys(36, 1), keys(36, 1)) is None
    assert outlier_share(states[:2], states[:2], ["a", "a"], ["a", "a"]) is None


def test_outlier_share_takes_states_that_do_not_vary() -> None:
    same = np.ones((40, 3))
    share = outlier_share(same, same, keys(40, 1), keys(40, 1))
    assert share is not None and share.mean == 0.0
