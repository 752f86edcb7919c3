"""Token-level credit: how one reward per completion is split over the completion's tokens.

Pure functions of padded arrays. `mask` (B, T) is 1 on completion tokens; padding gets credit 0. s_t
is the prefix before token t, R the reward of the whole completion. The terminal slot is a row's
last completion token, whether it is EOS or the sample was truncated: no slot follows it, so sparse
and dense credit see the same episode.

Two properties, which must not be confused:
- *potential-based* (sparse, red): r_t = sparse_t + gamma Phi(s_{t+1}) - Phi(s_t) with Phi = 0 at
  the end (Ng et al. 1999). The policy gradient is that of sparse, with rewards-to-go too.
- *return-preserving* (sparse, uniform, abc, random): the tokens' credit sums to R. Full-return
  REINFORCE is that of sparse, but rewards-to-go are biased, since a token's share depends on the
  tokens after it. red sums to R - beta_c R(x, empty), which does not depend on the actions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


@torch.no_grad()
def sparse(rewards: Tensor, mask: Tensor) -> Tensor:
    """All of R on the terminal slot: (B,), (B, T) -> (B, T). The baseline of every other kind."""
    return _full(rewards)[:, None] * _terminal(mask)


@torch.no_grad()
def uniform(rewards: Tensor, mask: Tensor) -> Tensor:
    """R / T on every token: (B,), (B, T) -> (B, T). Return-preserving, not potential-based."""
    return _full(rewards)[:, None] * _flat(mask, _full(rewards).dtype)


@torch.no_grad()
def red(
    rewards: Tensor,
    prefixes: Tensor,
    mask: Tensor,
    beta_c: float = 1.0,
    gamma: float = 1.0,
    dynamic_initialisation: bool = True,
) -> Tensor:
    """Differences of the reward of prefixes (arXiv:2411.08302): potential-based.

    rewards (B,), prefixes (B, T + 1), mask (B, T) -> (B, T). prefixes[:, t] is R(x, y_<t), the
    potential of s_t; Phi is 0 after the terminal slot, also of truncated samples, so the last
    column is not read. At gamma 1 and beta_c 1 token t gets R(x, y_<=t) - R(x, y_<t).

    The discounted sum is gamma^(T-1) R - beta_c Phi(s_0). Without dynamic_initialisation
    Phi(s_0) := 0 (the paper's ablation) and it is that of sparse. `gamma` must be that of the
    advantages: other differences are not potential-based. beta_c scales the potential only.
    """
    potential = _within(prefixes[:, :-1], mask)  # 0 beyond the end too: Phi(terminal) = 0
    if not dynamic_initialisation:
        potential[:, :1] = 0.0
    after = torch.nn.functional.pad(potential[:, 1:], (0, 1))
    # arXiv:2411.08302: beta_c r~_t + (1 - beta_c) R 1[t = T], written as potential-based shaping
    return sparse(rewards, mask) + beta_c * (gamma * after - potential)


@torch.no_grad()
def abc(rewards: Tensor, attention: Tensor, mask: Tensor, beta: float = 0.8) -> Tensor:
    """R split by attention (arXiv:2402.00782): return-preserving, not potential-based.

    The paper calls it potential-based, but alpha_t depends on the tokens after t.
    rewards (B,), attention (B, T), mask (B, T) -> (B, T). attention holds non-negative weights on
    the completion's tokens, here renormalised to alpha, sum 1; a row without mass gets the uniform
    alpha. The reward model's attention makes it ABC, the policy's makes it ABC-D.
    """
    return _split(rewards, _alpha(attention, mask), mask, beta)


@torch.no_grad()
def random(
    rewards: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    concentration: float = 1.0,
    beta: float = 0.8,
) -> Tensor:
    """As abc with alpha drawn from a symmetric Dirichlet: the control for abc's attention.

    rewards (B,), mask (B, T) -> (B, T). Return-preserving, not potential-based. concentration > 0;
    the generator is on the CPU. Completion tokens get the draws in row order, so padding has no
    influence.
    """
    shape = torch.full((int(mask.sum()),), concentration, dtype=torch.float64)
    draws = torch.zeros(mask.shape, dtype=torch.float64)
    draws[mask.bool().cpu()] = torch._standard_gamma(shape, generator=generator)
    return _split(rewards, _alpha(draws.to(mask.device), mask), mask, beta)


class AttentionHealth(NamedTuple):
    """Monitors of attention-based credit, each (B,); 0 on rows without tokens."""

    mass: Tensor
    """Share of the pooled token's attention on the completion; the prompt, which has the attention
    sinks, gets the rest."""
    entropy: Tensor
    """Entropy of alpha in nats, log T at most."""
    last: Tensor
    """Share of alpha on the terminal slot."""


@torch.no_grad()
def attention_health(attention: Tensor, mask: Tensor) -> AttentionHealth:
    """Monitors of the attention before renormalisation: (B, T), (B, T)."""
    alpha = _alpha(attention, mask)
    mass = _within(attention, mask).sum(1)
    return AttentionHealth(mass, torch.special.entr(alpha).sum(1), (alpha * _terminal(mask)).sum(1))


def _split(rewards: Tensor, alpha: Tensor, mask: Tensor, beta: float) -> Tensor:
    """arXiv:2402.00782: beta alpha_t R + (1 - beta) R 1[t = T]."""
    rewards = _full(rewards)[:, None]
    return rewards * (beta * alpha.to(rewards.dtype)) + (1 - beta) * rewards * _terminal(mask)


def _alpha(attention: Tensor, mask: Tensor) -> Tensor:
    """Weights (B, T) renormalised over the completion; uniform where they have no mass."""
    weights = _within(attention, mask)
    mass = weights.sum(1, keepdim=True)
    return torch.where(mass > 0, weights / mass, _flat(mask, weights.dtype))


def _flat(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / T on completion tokens: (B, T)."""
    return mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _terminal(mask: Tensor) -> Tensor:
    """Whether a column is the row's last completion token: (B, T); none in an empty row."""
    completion = mask.bool()
    return completion & (completion.cumsum(1) == completion.sum(1, keepdim=True))


def _within(values: Tensor, mask: Tensor) -> Tensor:
    """Values (B, T) on completion tokens, and 0 on padding, even where that is NaN."""
    values = _full(values)
    return values.where(mask.bool(), torch.zeros_like(values))


def _full(values: Tensor) -> Tensor:
    """Detached values, in float32 or better."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
