"""Advantages from token rewards: GAE, RLOO, GRPO, REINFORCE, and their whitening.

Pure functions of padded arrays. `mask` (B, T) is 1 on completion tokens; results are 0 on padding.
s_t is the prefix before token t; the episode ends with a row's last token, truncated or not, so the
value after it is 0.

How each estimator combines with token rewards r_t = credit_t(R) - kl_coef * k1_t:

- ``gae`` and ``reinforce`` use every r_t. Potential-based credit (red) keeps the expected policy
  gradient, with any critic or baseline: GAE(sparse, V) equals GAE(red, V - Phi) for every lambda,
  so a critic that starts at the reward's own prefix scores counts Phi twice. Return-preserving
  credit (uniform, abc, random) biases rewards-to-go, hence both: R < 0 spread over the tokens pays
  for short completions, R > 0 for long ones, which `center_rewards` balances.
- ``rloo`` and ``grpo`` use only a completion's sum, the same number for each of its tokens. Sums
  of return-preserving credit are R, those of red are R - Phi(s_0), and Phi(s_0) is the same for all
  samples of a prompt: token credit cancels exactly, and recipes that request it are refused.
- A KL in the reward is part of the sums. GRPO would divide it by the prompt's own deviation, so
  with GRPO the KL belongs in the loss.
- r_t itself is never an advantage, since it ignores the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 1024  # columns of one matrix product; the matrix of powers has the square of it


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """y_t = sum over t' >= t of factor^(t' - t) values_t': (B, T) -> (B, T).

    Computed as products with the matrix of powers, in blocks from the end, without a token loop.
    """
    if factor == 0.0 or values.shape[1] == 0:
        return values.clone()
    if factor == 1.0:
        return values.flip(1).cumsum(1).flip(1)
    out = torch.empty_like(values)
    carried = values.new_zeros(values.shape[0], 1)  # y at the first column of the block after
    step = torch.arange(min(_BLOCK, values.shape[1]), device=values.device, dtype=values.dtype)
    powers = (factor ** (step[:, None] - step).clamp(min=0)).tril()  # [t', t]
    for start in range((values.shape[1] - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        block = values[:, start : start + _BLOCK]
        width = block.shape[1]
        sums = block @ powers[:width, :width]
        out[:, start : start + width] = sums + carried * factor ** (width - step[:width])
        carried = out[:, start : start + 1]
    return out


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = sum over t' >= t of gamma^(t' - t) r_t': (B, T), (B, T) -> (B, T)."""
    completion = mask.bool()
    sums = discounted_sums(_kept(rewards, completion), gamma)
    return _kept(sums, completion)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the critic's targets, each (B, T).

    rewards, values, mask: (B, T); values[:, t] is V(s_t).
    """
    completion = mask.bool()
    values = _kept(values, completion)
    after = torch.nn.functional.pad(values[:, 1:], (0, 1))  # V(s_{t+1}), 0 after the last token
    delta = _kept(rewards, completion) + gamma * after - values
    # arXiv:1506.02438 eq. 16: A_t = sum over t' >= t of (gamma lambda)^(t' - t) delta_t'
    advantages = _kept(discounted_sums(delta, gamma * lam), completion)
    return advantages, advantages + values


def rloo(returns: Tensor, n: int) -> Tensor:
    """Return minus the mean of the prompt's other samples (arXiv:2402.14740): (B,) -> (B,).

    The n >= 2 rows of a prompt are consecutive.
    """
    groups = returns.view(-1, n)
    others = (groups.sum(1, keepdim=True) - groups) / (n - 1)
    return (groups - others).flatten()  # A_i = G_i - mean_{j != i} G_j


def grpo(returns: Tensor, n: int, eps: float = 1e-4) -> Tensor:
    """Return standardised over the samples of its prompt (arXiv:2402.03300 sec. 4.1).

    (B,) -> (B,). The n >= 2 rows of a prompt are consecutive. The deviation divides by n - 1.
    """
    groups = returns.view(-1, n)
    centred = groups - groups.mean(1, keepdim=True)
    # A_i = (G_i - mean) / (std + eps)
    return (centred / (groups.std(1, keepdim=True) + eps)).flatten()


def reinforce(to_go: Tensor, mask: Tensor, baseline: float) -> Tensor:
    """A_t = G_t - b with a baseline that does not depend on the row: (B, T), (B, T) -> (B, T)."""
    return _kept(to_go - baseline, mask.bool())


def running_mean(baseline: float | None, to_go: Tensor, mask: Tensor, decay: float) -> float:
    """Baseline for the next rollout: decay * b + (1 - decay) * mean over tokens of G_t.

    to_go, mask: (B, T). The first baseline (before it: None) is the mean. In float64.
    """
    mean = float(to_go.double()[mask.bool()].mean())
    return mean if baseline is None else decay * baseline + (1.0 - decay) * mean


def over_tokens(per_row: Tensor, mask: Tensor) -> Tensor:
    """The same number on every token of a row: (B,), (B, T) -> (B, T)."""
    return per_row[:, None] * mask.to(per_row.dtype)


def standardize(values: Tensor, mask: Tensor) -> Tensor:
    """Values with mean 0 and variance 1 over the mask's tokens: (B, T), (B, T) -> (B, T)."""
    completion = mask.bool()
    kept = values[completion]
    return _kept((values - kept.mean()) / _deviation(kept), completion)


def scale_only(values: Tensor, mask: Tensor) -> Tensor:
    """Values scaled to variance 1 over the mask's tokens: (B, T), (B, T) -> (B, T)."""
    completion = mask.bool()
    return _kept(values / _deviation(values[completion]), completion)


WHITENINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "standardize": standardize,
    "scale_only": scale_only,
    "none": lambda values, mask: _kept(values, mask.bool()),
}


def _deviation(kept: Tensor, eps: float = 1e-8) -> Tensor:
    """sqrt(variance + eps) of values (M,), with Bessel's correction; sqrt(eps) for one value."""
    variance = kept.var(correction=1) if len(kept) > 1 else kept.new_zeros(())
    return (variance + eps).sqrt()


def _kept(values: Tensor, completion: Tensor) -> Tensor:
    """Values where `completion` (bool) holds, else 0, also in place of a NaN."""
    return values.where(completion, values.new_zeros(()))
