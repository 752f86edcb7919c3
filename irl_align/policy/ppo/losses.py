"""PPO's losses and monitors: pure functions of tensors, per token.

The caller takes the mean over a minibatch's M tokens. Functions without a shape take any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irl_align.models.logprobs import k1


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate loss of the ratio rho = pi / pi_old, for advantages A."""
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    # arXiv:1707.06347 eq. 7: max(-A rho, -A clamp(rho, 1 - clip, 1 + clip))
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def truncated_weights(logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of the learner pi, before its update, over the sampler q.

    They multiply policy_loss and carry no gradient. Source: Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training" (2025).
    """
    return (logps - sampler_logps).exp().clamp(max=cap)  # min(pi / q, cap)


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None) -> Tensor:
    """Clipped squared error of values V against targets G; without clip 0.5 (V - G)^2."""
    error = (values - targets).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        # arXiv:2403.17031 sec. 3: 0.5 max((V - G)^2, (V_clip - G)^2)
        error = torch.maximum(error, (near - targets).square())
    return 0.5 * error


def k3(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimator of KL(pi || ref) on samples of pi: unbiased as k1, never negative, less noisy.

    As a loss it has another gradient, that of KL(ref || pi): see exact_kl. Source: Schulman,
    "Approximating KL divergence" (2020).
    """
    log_ratio = k1(policy_logps, reference_logps)
    return torch.expm1(-log_ratio) + log_ratio  # exp(-k1) - 1 + k1: arXiv:2402.03300 eq. 4


def exact_kl(logps: Tensor, old_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimator of KL(pi || ref) on samples of pi_old, with the gradient of that KL in every epoch.

    E_old[rho k3] = sum_v pi_v k3_v = KL(pi || ref), and its gradient goes through rho = pi / pi_old
    too. Source: DeepSeek-V3.2 (arXiv:2512.02556) sec. 3.1, "unbiased KL estimate".
    """
    return (logps - old_logps).exp() * k3(logps, reference_logps)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distributions of logits, in nats: (M, V) -> (M,)."""
    logps = logits.float().log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)  # -sum_v p_v log p_v


def clipped_share(logps: Tensor, old_logps: Tensor, clip: float) -> Tensor:
    """Share of tokens whose ratio is outside [1 - clip, 1 + clip]: a scalar."""
    return (((logps - old_logps).exp() - 1.0).abs() > clip).float().mean()


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """Share of the variance of targets G (M,) that values V (M,) explain: 1 for a perfect critic, 0
    for a constant one, and 0 if the targets do not vary."""
    values, targets = values.double(), targets.double()
    variance = float(targets.var(correction=0))
    if variance == 0.0:
        return 0.0
    return 1.0 - float((targets - values).var(correction=0)) / variance  # 1 - var(G - V) / var(G)


def adapted_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL's next coefficient, which moves the KL towards the target (nats per completion).

    It changes by at most a fifth, also after more episodes than a horizon has: above five horizons
    the equation itself would make it negative.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * min(episodes / horizon, 1.0))  # arXiv:1909.08593 sec. 2.2
