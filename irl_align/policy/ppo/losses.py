"""PPO's losses and monitors, per token: the caller takes their mean over a minibatch's tokens.

Legend of shapes: M tokens, V vocabulary; functions without a shape take any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irl_align.models.logprobs import k1


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)), rho = pi / pi_old: arXiv:1707.06347 eq. 7."""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def truncated_weights(logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:
    """min(pi / q, cap), pi the learner before its update, q what was sampled from.

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (2025), truncated importance sampling: a factor of policy_loss, without a gradient of its own.
    """
    return (logps - sampler_logps).exp().clamp(max=cap)


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None) -> Tensor:
    """0.5 max((V - G)^2, (V_clip - G)^2), V_clip at most clip from V_old: arXiv:2403.17031 sec. 3.

    Without clip 0.5 (V - G)^2.
    """
    error = (values - targets).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - targets).square())
    return 0.5 * error


def k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """exp(-k1) - 1 + k1 >= 0: as k1 unbiased for KL(pi || ref) on samples of pi, less noise.

    Source: Schulman, "Approximating KL divergence" (2020); GRPO's loss, arXiv:2402.03300 eq. 4.
    """
    log_ratio = k1(policy_logps, reference_logps)
    return torch.expm1(-log_ratio) + log_ratio


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v, in nats: (M, V) -> (M,)."""
    logps = logits.float().log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def clipped_share(logps: Tensor, old_logps: Tensor, clip: float) -> Tensor:
    """Share of tokens whose ratio is outside [1 - clip, 1 + clip]: a scalar."""
    return (((logps - old_logps).exp() - 1.0).abs() > clip).float().mean()


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """1 - var(G - V) / var(G) over tokens (M,): 1 is a perfect critic, 0 as good as a constant.

    0 where the targets do not vary.
    """
    values, targets = values.double(), targets.double()
    variance = float(targets.var(correction=0))
    if variance == 0.0:
        return 0.0
    return 1.0 - float((targets - values).var(correction=0)) / variance


def adapted_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon): arXiv:1909.08593 eq. 3.

    kl, target: nats per completion.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)
