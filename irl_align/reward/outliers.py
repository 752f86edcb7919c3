"""Outliers among a policy's samples, by the hidden state that a reward reads of each.

InfoRM (arXiv:2510.13694): hacked texts are far from SFT's samples in a reward's latent space, by
Mahalanobis distance; MOP is the share beyond a threshold. Here the hidden state is that under the
reward's head, and the threshold comes from held-out samples of SFT, not from a normal distribution.

Legend of shapes: N samples, H width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from irl_align.utils.statistics import Estimate, clustered_share

TYPICAL = 0.95  # share of pi_0's own samples that are no outliers


def ledoit_wolf(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (H,) and shrunk covariance (H, H) of states (N, H): Ledoit and Wolf (2004).

    (1 - s) S + s mu I, with S the covariance over N, mu = tr(S) / H, and the s that minimises the
    expected squared error: s = min(b, d) / d, d = |S - mu I|^2, b = sum_n |x_n x_n' - S|^2 / N^2.
    """
    mean = states.mean(0)
    centred = states - mean
    count, width = centred.shape
    sample = centred.T @ centred / count
    target = np.trace(sample) / width * np.eye(width)
    distance = ((sample - target) ** 2).sum()
    # sum_n |x_n x_n'|^2 - N |S|^2, since the x_n x_n' have mean S
    error = ((centred**2).sum(1) ** 2).sum() / count**2 - (sample**2).sum() / count
    shrinkage = min(error, distance) / distance if distance > 0 else 1.0
    return mean, (1.0 - shrinkage) * sample + shrinkage * target


def squared_distances(states: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distances (x - mean)' C^-1 (x - mean) of states (N, H): (N,).

    A covariance without full rank, of states that hardly vary, gets its pseudo-inverse.
    """
    centred = states - mean
    inverse = np.linalg.pinv(covariance, hermitian=True)
    distances: np.ndarray = ((centred @ inverse) * centred).sum(1)
    return distances


def threshold(distances: np.ndarray) -> float:
    """The distance that a new sample of the same distribution passes with probability 1 - TYPICAL
    at most: of N distances the one of rank ceil((N + 1) TYPICAL) (conformal prediction).

    Infinite for fewer than 19 distances, which cannot tell.
    """
    rank = math.ceil((len(distances) + 1) * TYPICAL)
    return float(np.sort(distances)[rank - 1]) if rank <= len(distances) else math.inf


def outlier_share(
    first: np.ndarray, now: np.ndarray, first_prompts: Sequence[str], now_prompts: Sequence[str]
) -> Estimate | None:
    """Share of the states `now` (M, H) that are outliers among pi_0's, `first` (N, H).

    Cross-fitted over two halves of the prompts: mean and covariance come from pi_0's samples of one
    half, the threshold and the judged samples are of the other. None if a half is too small.
    """
    first, now = first.astype(np.float64), now.astype(np.float64)
    half = {key: i % 2 for i, key in enumerate(sorted({*first_prompts, *now_prompts}))}
    one, two = (np.array([half[key] for key in keys]) for keys in (first_prompts, now_prompts))
    flags = np.zeros(len(now))
    for part in (0, 1):
        if (one != part).sum() < 2:
            return None
        # Shrinking the covariance of coordinates of unequal size would hide the small ones.
        scale = first[one != part].std(0)
        scale[scale == 0.0] = 1.0
        fitted = ledoit_wolf(first[one != part] / scale)
        limit = threshold(squared_distances(first[one == part] / scale, *fitted))
        if math.isinf(limit):
            return None
        flags[two == part] = squared_distances(now[two == part] / scale, *fitted) > limit
    return clustered_share(flags.tolist(), list(now_prompts))
