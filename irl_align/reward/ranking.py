"""Rank the N samples of each of M prompts: by the reward, by the policy's log-prob, or by both.

Samples are read a bounded number at a time, and only their scores are kept.
"""

from __future__ import annotations

import numpy as np

from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.samples import ROWS_AT_ONCE, Samples
from irl_align.reward.distributed import spread
from irl_align.reward.protocol import RewardFunction


def sample_rewards(samples: Samples, reward: RewardFunction) -> np.ndarray:
    """Reward of every sample, (M * N,) float32 in the order of SampleSet.flat."""
    rewards: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples.prompts)
    waiting: dict[int, list[Completion]] = {}

    def score() -> None:
        order = sorted(waiting)
        prompts = [samples.prompts[i] for i in order for _ in waiting[i]]
        completions = [c.token_ids for i in order for c in waiting[i]]
        scores = spread(reward).score_ids(prompts, completions).numpy()
        ends = np.cumsum([len(waiting[i]) for i in order])[:-1]
        for index, values in zip(order, np.split(scores, ends), strict=True):
            rewards[index] = values
        waiting.clear()

    count = 0
    for index, group in samples.groups():
        waiting[index] = group
        count += len(group)
        if count >= ROWS_AT_ONCE:
            score()
            count = 0
    if waiting:
        score()
    return np.concatenate(rewards) if rewards else np.zeros(0, np.float32)


def rank_samples(samples: Samples, rewards: np.ndarray | None, score: str) -> np.ndarray:
    """Score (M, N) of every sample, higher is better; truncated samples get -inf.

    rewards: (M * N,) from :func:`sample_rewards`. score: `reward`, `logprob` (mean per token under
    the sampler) or `both`, the sum of the two after scaling each to variance 1 over all samples
    that are not truncated.
    """
    ended: list[list[bool]] = [[]] * len(samples.prompts)
    means: list[list[float]] = [[]] * len(samples.prompts)
    for index, group in samples.groups():
        ended[index] = [not completion.truncated for completion in group]
        means[index] = [float(completion.logprobs.mean()) for completion in group]
    finished = np.array([flag for group in ended for flag in group], dtype=bool)
    total = np.zeros(len(finished))
    parts = []
    if score in ("reward", "both"):
        if rewards is None:
            raise ValueError(f"score {score} needs a reward")
        parts.append(rewards.astype(np.float64))
    if score in ("logprob", "both"):
        parts.append(np.array([mean for group in means for mean in group]))
    for part in parts:
        deviation = part[finished].std() if len(parts) > 1 and finished.any() else 1.0
        total += part / (deviation or 1.0)
    total[~finished] = -np.inf
    return total.reshape(len(samples.prompts), -1)
