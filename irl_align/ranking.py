"""Rank the N samples of each prompt: by the reward, by the policy's log-prob, or by both."""

from __future__ import annotations

import numpy as np

from irl_align.reward.model import RewardFunction
from irl_align.samples import SampleSet


def sample_rewards(samples: SampleSet, reward: RewardFunction) -> np.ndarray:
    """Reward of every sample, (M * N,) float32 in the order of SampleSet.flat."""
    prompts, completions = samples.flat()
    rewards: np.ndarray = reward.score_ids(prompts, [c.token_ids for c in completions]).numpy()
    return rewards


def rank_samples(samples: SampleSet, rewards: np.ndarray | None, score: str) -> np.ndarray:
    """Score (M, N) of every sample, higher is better; truncated samples are -inf.

    rewards: (M * N,) from :func:`sample_rewards`. score: `reward`, `logprob` (mean per token under
    the sampler) or `both`, the sum of the two after each has been brought to variance 1 over all
    samples that are not truncated.
    """
    _, completions = samples.flat()
    finished = np.array([not c.truncated for c in completions])
    total = np.zeros(len(completions))
    parts = []
    if score in ("reward", "both"):
        if rewards is None:
            raise ValueError(f"score {score} needs a reward")
        parts.append(rewards.astype(np.float64))
    if score in ("logprob", "both"):
        parts.append(np.array([float(c.logprobs.mean()) for c in completions]))
    for part in parts:
        spread = part[finished].std() if len(parts) > 1 and finished.any() else 1.0
        total += part / (spread or 1.0)
    total[~finished] = -np.inf
    return total.reshape(len(samples.prompts), -1)
