"""Rollouts: the next prompts, the samples drawn for them, and their rewards and credit.

All random numbers are a function of the seed and the number of the update, so a run that resumes
after a kill draws the same samples. B is the number of samples; T is that of the longest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion, Generator, Sampling, generate
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.policy.ppo.micro_batches import PackedRollout
from irl_align.reward import credit
from irl_align.reward.distributed import spread
from irl_align.reward.protocol import RewardFunction, ScoreRequest, TokenScores
from irl_align.reward.scoring import policy_attention, score_tokens
from irl_align.utils import distributed


@dataclass(frozen=True)
class RolloutBatch:
    """B samples of a policy; the N of a prompt are consecutive."""

    prompts: list[list[int]]
    completions: list[list[int]]
    """Ids as the reward reads them."""
    actions: list[list[int]]
    """Ids as they were sampled, which log-probs are of: they may end in another stop id."""
    logps: Tensor
    """(B, T) log-probs of the actions from the sampler, 0 on padding."""
    mask: Tensor
    """(B, T) 1 on completion tokens."""
    truncated: Tensor
    """(B,) bool: without EOS."""


@dataclass(frozen=True)
class RolloutScores:
    """Rewards of samples and their credit, before the KL."""

    rewards: Tensor
    """(B,) the reward model's."""
    returns: Tensor
    """(B,) R: clipped, and changed for samples without EOS."""
    credit: Tensor
    """(B, T) R split over its tokens; with center_rewards minus the rollout's mean R."""
    health: dict[str, float]
    """Monitors of attention-based credit: entropy and last as in AttentionHealth, and mass, which
    the policy's attention does not have."""


@dataclass(frozen=True)
class Rollout:
    """Samples with all that is computed from them before an update."""

    samples: RolloutBatch
    scores: RolloutScores
    packed: PackedRollout
    logps: Tensor
    """(B, T) log-probs of the present policy: the sampler's own if the learner has the same."""
    reference_logps: Tensor
    """(B, T) log-probs of the reference."""
    values: Tensor | None
    """(B, T) values of the present critic."""
    weights: Tensor | None
    """(B, T) truncated importance weights, if they are requested and not all 1."""


def prompt_passes(
    prompts: Sequence[Sequence[int]], seed: int, start: int, count: int
) -> list[tuple[int, list[list[int]]]]:
    """`count` prompts from position `start` of endless passes over the prompts.

    Each pass has its own order. Returns pairs of a pass's number and its prompts.
    """
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
        # A prompt that occurs twice in one rollout gets other random numbers each time.
        seeded = replace(sampling, seed=_seed(seed, update, number))
        rows += [prompt for prompt in chosen for _ in range(sampling.n)]
        drawn += sample(generator, chosen, seeded)
    return collate(rows, drawn)


def sample(
    generator: Generator, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Completion]:
    """sampling.n consecutive completions of each prompt, drawn from the policy at a temperature.

    top_p and top_k are left out: a ratio and a KL are means over samples of the policy itself, and
    no weight corrects for tokens that could not be drawn. Each process samples some of them; other
    engines than transformers spread the work themselves.
    """
    sampling = sampling.all_tokens
    if isinstance(generator, TransformersGenerator):
        groups = distributed.over_rows(
            lambda numbers: generate(generator, [prompts[i] for i in numbers], sampling),
            [len(prompt) for prompt in prompts],
        )
    else:
        groups = distributed.on_main(lambda: generate(generator, prompts, sampling))
    return [completion for group in groups for completion in group]


def collate(prompts: list[list[int]], completions: Sequence[Completion]) -> RolloutBatch:
    """Samples as padded arrays. Raises UserError: a sample has no token."""
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    if not len(lengths) or int(lengths.min()) == 0:
        empty = "no samples" if not len(lengths) else f"sample {int(lengths.argmin())} has no token"
        raise UserError(f"PPO: rollout: {empty}; expected at least one token in each")
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).float()
    logps = torch.zeros_like(mask)
    logps[mask.bool()] = torch.from_numpy(np.concatenate([c.logprobs for c in completions])).float()
    truncated = torch.tensor([c.truncated for c in completions])
    texts = [c.token_ids for c in completions]
    actions = [c.sampled_ids for c in completions]
    return RolloutBatch(prompts, texts, actions, logps, mask, truncated)


def score(
    samples: RolloutBatch,
    reward: RewardFunction,
    policy: PreTrainedModel,
    options: PPOOptions,
    generator: torch.Generator,
) -> RolloutScores:
    """One pass of the reward over the samples, and its credit for their tokens; no gradients.

    A missing EOS changes only the terminal slot, which also has the part of the reward that is not
    distributed (scores.terminal). Raises UserError: no sample has EOS, or a reward is not finite.
    """
    if options.missing_eos != "ignore" and bool(samples.truncated.all()):
        raise UserError(
            f"PPO: all {len(samples.truncated)} samples of a rollout are without EOS; raise "
            "generation.max_new_tokens, train SFT for longer, or set missing_eos: ignore"
        )
    request = ScoreRequest(
        samples.prompts,
        samples.completions,
        prefixes=options.credit == "red",
        attention=options.credit == "abc",
        eos_prefixes=options.eos_prefixes,
    )
    scores = score_tokens(spread(reward), request)
    rewards = clipped = scores.rewards.float()
    if options.clip_reward is not None:
        clipped = rewards.clamp(-options.clip_reward, options.clip_reward)
    if options.credit == "abc_policy":
        rows = distributed.over_sequences(
            lambda p, c: [row.clone() for row in policy_attention(policy, p, c)],
            samples.prompts,
            samples.completions,
        )
        scores = replace(scores, attention=pad_sequence(rows, batch_first=True))
    returns = at_missing_eos(clipped, samples.truncated, options)
    split = clipped - returns.mean() if options.center_rewards else clipped
    last = returns - clipped
    if scores.terminal is not None:
        split, last = split - scores.terminal, last + scores.terminal
    tokens = _credit(split, scores, samples.mask, options, generator)
    tokens = tokens + credit.sparse(last, samples.mask)
    health = {}
    if scores.attention is not None:
        monitors = credit.attention_health(scores.attention, samples.mask)._asdict()
        health = {f"attention_{name}": float(values.mean()) for name, values in monitors.items()}
        if options.credit == "abc_policy":
            del health["attention_mass"]  # each weight is a mean over other steps: no share
    return RolloutScores(rewards, returns, tokens, health)


def _credit(
    rewards: Tensor,
    scores: TokenScores,
    mask: Tensor,
    options: PPOOptions,
    generator: torch.Generator,
) -> Tensor:
    """The recipe's credit (B, T) for rewards (B,)."""
    if options.credit == "uniform":
        return credit.uniform(rewards, mask)
    if options.credit == "red":
        assert scores.prefixes is not None
        return credit.red(
            rewards,
            scores.prefixes,
            mask,
            options.beta_c,
            options.gamma,
            options.dynamic_initialisation,
        )
    if options.credit in ("abc", "abc_policy"):
        assert scores.attention is not None
        return credit.abc(rewards, scores.attention, mask, options.beta)
    if options.credit == "random":
        return credit.random(rewards, mask, generator, options.concentration, options.beta)
    return credit.sparse(rewards, mask)


def at_missing_eos(rewards: Tensor, truncated: Tensor, options: PPOOptions) -> Tensor:
    """Rewards (B,) with missing_eos applied to samples without EOS: arXiv:2403.17031 sec. 3."""
    if options.missing_eos == "relative":
        return below_finished(rewards, truncated, options.eos_value)
    if options.missing_eos == "replace":
        return torch.where(truncated, torch.full_like(rewards, options.eos_value), rewards)
    if options.missing_eos == "subtract":
        return rewards - options.eos_value * truncated.float()
    return rewards


def below_finished(rewards: Tensor, truncated: Tensor, margin: float) -> Tensor:
    """Rewards (B,) in which no sample without EOS is worth as much as any finished one.

    With the finished samples' rewards F: R = min(R, min F - margin * std F) for the others, so
    that never stopping does not pay, whatever the scale and the sign of the reward. Where F does
    not vary, the std is that of all rewards; where these do not vary either, it is 1. At least one
    sample has EOS.
    """
    finished = rewards[~truncated]
    rounding = 1e-6 * float(rewards.abs().max())
    spreads = [float(part.double().std(correction=0)) for part in (finished, rewards)]
    scale = next((spread for spread in spreads if spread > rounding), 1.0)
    return torch.where(truncated, rewards.clamp(max=finished.min() - margin * scale), rewards)


def _seed(seed: int, update: int, number: int) -> int:
    name = f"{seed}/rollout/{update}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % 2**63
