"""Rollouts: which prompts come next, the samples drawn for them, and what they are worth.

All randomness is a function of the seed and the number of the update, so that a run that goes on
after a kill draws what it would have drawn.

Legend of shapes: B samples, N samples per prompt, T completion tokens, padded to the longest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from irl_align.config.policy_update import DENSE, PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.reward import credit
from irl_align.reward.distributed import spread
from irl_align.reward.protocol import RewardFunction, ScoreRequest
from irl_align.reward.scoring import policy_attention, score_tokens
from irl_align.utils import distributed


@dataclass(frozen=True)
class RolloutBatch:
    """B samples of a policy, the N of a prompt in a row."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logps: Tensor
    """(B, T) log-probs as sampled, 0 on padding."""
    mask: Tensor
    """(B, T) 1 on completion tokens."""
    truncated: Tensor
    """(B,) bool: without EOS."""


@dataclass(frozen=True)
class Scored:
    """What samples are worth, before the KL."""

    rewards: Tensor
    """(B,) the reward model's."""
    returns: Tensor
    """(B,) R: clipped, and changed where EOS is missing."""
    credit: Tensor
    """(B, T) R, less the rollout's mean R where it is centred, on its tokens."""
    health: dict[str, float]
    """Of attention, where the credit is made of it: entropy and last as in AttentionHealth, and
    mass, which the policy's attention does not have."""


def prompt_passes(
    prompts: Sequence[Sequence[int]], seed: int, start: int, count: int
) -> list[tuple[int, list[list[int]]]]:
    """(number of the pass, its prompts): `count` prompts from place `start` of endless passes, each
    in an order of its own."""
    out = []
    while count:
        number, place = divmod(start, len(prompts))
        order = np.random.default_rng([seed, number]).permutation(len(prompts))
        chosen = order[place : place + count]
        out.append((number, [list(prompts[i]) for i in chosen]))
        start, count = start + len(chosen), count - len(chosen)
    return out


def draw(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    update: int,
    count: int,
) -> RolloutBatch:
    """The samples of one update: `count` of them, sampling.n for each prompt."""
    rows: list[list[int]] = []
    drawn: list[Completion] = []
    prompts_each = count // sampling.n
    for number, chosen in prompt_passes(prompts, seed, update * prompts_each, prompts_each):
        # A prompt that comes twice in one rollout is drawn with other random numbers each time.
        seeded = replace(sampling, seed=_seed(seed, update, number))
        rows += [prompt for prompt in chosen for _ in range(sampling.n)]
        drawn += sample(generator, chosen, seeded)
    return collate(rows, drawn)


def sample(
    generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Completion]:
    """sampling.n completions of each prompt, in a row.

    Each process samples some of them; another engine than transformers spreads the work itself.
    """
    if not isinstance(generator, TransformersGenerator):
        groups = distributed.on_main(lambda: generate(generator, prompts, sampling))
    else:
        groups = distributed.over_rows(
            lambda numbers: generate(generator, [prompts[i] for i in numbers], sampling),
            [len(prompt) for prompt in prompts],
        )
    return [c for group in groups for c in group]


def collate(prompts: list[list[int]], completions: Sequence[Completion]) -> RolloutBatch:
    """Samples as padded arrays. Raises UserError where one has no token."""
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    if not len(lengths) or int(lengths.min()) == 0:
        empty = "no samples" if not len(lengths) else f"sample {int(lengths.argmin())} has no token"
        raise UserError(f"PPO: rollout: {empty}; expected at least one token in each")
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    logps = torch.zeros_like(mask)
    logps[mask.bool()] = torch.from_numpy(np.concatenate([c.logprobs for c in completions])).float()
    truncated = torch.tensor([c.truncated for c in completions])
    return RolloutBatch(prompts, [c.token_ids for c in completions], logps, mask, truncated)


def score(
    samples: RolloutBatch,
    reward: RewardFunction,
    policy: PreTrainedModel,
    options: PPOOptions,
    generator: torch.Generator,
) -> Scored:
    """One pass of the reward over the samples, and its credit to their tokens; no gradients.

    A missing EOS changes the terminal slot alone. Raises UserError for a reward that is not finite.
    """
    if options.missing_eos != "ignore" and bool(samples.truncated.all()):
        raise UserError(
            f"PPO: all {len(samples.truncated)} samples of a rollout are without EOS; raise "
            "generation.max_new_tokens, train SFT for longer, or set missing_eos: ignore"
        )
    scores = score_tokens(
        spread(reward),
        ScoreRequest(
            samples.prompts,
            samples.completions,
            prefixes=options.credit == "red",
            attention=options.credit == "abc",
            eos_prefixes=options.eos_prefixes,
        ),
    )
    rewards, attention = scores.rewards.float(), scores.attention
    if not bool(rewards.isfinite().all()):
        worst = int((~rewards.isfinite()).nonzero()[0])
        raise UserError(
            f"PPO: the reward of sample {worst} of a rollout is {float(rewards[worst])}, expected "
            "a finite number; look at the reward model's weights and settings"
        )
    clipped = rewards
    if options.clip_reward is not None:
        clipped = rewards.clamp(-options.clip_reward, options.clip_reward)
    if options.credit == "abc_policy":
        rows = distributed.over_sequences(
            lambda p, c: [row.clone() for row in policy_attention(policy, p, c)],
            samples.prompts,
            samples.completions,
        )
        attention = pad_sequence(rows, batch_first=True)
    returns = at_missing_eos(clipped, samples.truncated, options)
    shared = clipped - returns.mean() if options.center_rewards else clipped
    tokens = _credit(shared, scores.prefixes, attention, samples.mask, options, generator)
    tokens = tokens + credit.sparse(returns - clipped, samples.mask)
    health = {}
    if attention is not None:
        found = credit.attention_health(attention, samples.mask)
        health = {f"attention_{name}": float(x.mean()) for name, x in found._asdict().items()}
        if options.credit == "abc_policy":
            del health["attention_mass"]  # means over other steps for each token: no share
    return Scored(rewards, returns, tokens, health)


def _credit(
    rewards: Tensor,
    prefixes: Tensor | None,
    attention: Tensor | None,
    mask: Tensor,
    options: PPOOptions,
    generator: torch.Generator,
) -> Tensor:
    if options.credit == "uniform":
        return credit.uniform(rewards, mask)
    if options.credit == "red":
        assert prefixes is not None
        shaping: dict[str, Any] = {
            "beta_c": options.beta_c,
            "gamma": options.gamma,
            "dynamic_initialisation": options.dynamic_initialisation,
        }
        return credit.red(rewards, prefixes, mask, **shaping)
    if options.credit in ("abc", "abc_policy"):
        assert attention is not None
        return credit.abc(rewards, attention, mask, beta=options.beta)
    if options.credit == "random":
        return credit.random(rewards, mask, generator, options.concentration, options.beta)
    assert options.credit not in DENSE
    return credit.sparse(rewards, mask)


def at_missing_eos(rewards: Tensor, truncated: Tensor, options: PPOOptions) -> Tensor:
    """Rewards (B,) with those of samples without EOS (arXiv:2403.17031 sec. 3) replaced or less."""
    if options.missing_eos == "replace":
        return torch.where(truncated, torch.full_like(rewards, options.eos_value), rewards)
    if options.missing_eos == "subtract":
        return rewards - options.eos_value * truncated.float()
    return rewards


def _seed(seed: int, update: int, number: int) -> int:
    name = f"{seed}/rollout/{update}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % 2**63
