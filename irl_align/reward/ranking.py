"""Rank the N samples of each of M prompts: by the reward, by the policy's log-prob, or by both.

Samples are read a bounded number at a time, and only their scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.samples import ROWS_AT_ONCE, Samples
from irl_align.models.packing import Ids
from irl_align.reward.distributed import spread
from irl_align.reward.protocol import RewardFunction

Logprobs = Callable[[Ids, Ids], Sequence[np.ndarray]]
"""Prompts and completions -> log-probs (T,) of each completion's tokens under a policy."""


def sample_rewards(samples: Samples, reward: RewardFunction) -> np.ndarray:
    """Reward of every sample, (M * N,) float32 in the order of SampleSet.flat."""
    return _over_samples(samples, lambda p, c: spread(reward).score_ids(p, c).numpy())


def sample_lengths(samples: Samples) -> np.ndarray:
    """Number of tokens of every sample, (M * N,) in the order of sample_rewards."""
    return _over_samples(samples, lambda _, c: np.array([len(ids) for ids in c]))


def _over_samples(
    samples: Samples, score: Callable[[Ids, Ids], np.ndarray], sampled: bool = False
) -> np.ndarray:
    """A number for every sample, (M * N,), from a function of prompts (B,) and completions (B,).

    sampled: the completions are Completion.sampled_ids, as log-probs read them, not token_ids.
    """
    scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples.prompts)
    waiting: dict[int, list[Completion]] = {}

    def score_waiting() -> None:
        order = sorted(waiting)
        prompts = [samples.prompts[i] for i in order for _ in waiting[i]]
        completions = [c for i in order for c in waiting[i]]
        values = score(prompts, [c.sampled_ids if sampled else c.token_ids for c in completions])
        ends = np.cumsum([len(waiting[i]) for i in order])[:-1]
        for index, part in zip(order, np.split(values, ends), strict=True):
            scores[index] = part
        waiting.clear()

    count = 0
    for index, group in samples.groups():
        waiting[index] = group
        count += len(group)
        if count >= ROWS_AT_ONCE:
            score_waiting()
            count = 0
    if waiting:
        score_waiting()
    return np.concatenate(scores) if scores else np.zeros(0, np.float32)


def rank_samples(
    samples: Samples, rewards: np.ndarray | None, score: str, logprobs: Logprobs | None = None
) -> np.ndarray:
    """Score (M, N) of every sample, higher is better; truncated samples get -inf.

    rewards: (M * N,) from :func:`sample_rewards`. score: `reward`, `logprob` (mean per token under
    the policy) or `both`, the sum of the two after scaling each to variance 1 over all samples that
    are not truncated. logprobs: the policy's; None if the samples are plain, so that they have
    them.
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
        stored = np.array([mean for group in means for mean in group])
        parts.append(stored if logprobs is None else _mean_logprobs(samples, logprobs))
    for part in parts:
        deviation = part[finished].std() if len(parts) > 1 and finished.any() else 1.0
        total += part / (deviation or 1.0)
    total[~finished] = -np.inf
    return total.reshape(len(samples.prompts), -1)


def _mean_logprobs(samples: Samples, logprobs: Logprobs) -> np.ndarray:
    """Mean log-prob per token of every sample under a policy, (M * N,)."""
    return _over_samples(
        samples,
        lambda p, c: np.array([float(row.mean()) for row in logprobs(p, c)]),
        sampled=True,
    )
