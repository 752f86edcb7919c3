"""Losses and metrics of the reward level: pure functions of rewards and log-probs.

Sources: "From Demonstrations to Rewards" (arXiv:2503.13538), SPIN (arXiv:2401.01335), DPO
(arXiv:2305.18290), IQLearn (arXiv:2409.01369). Every loss returns (loss, metrics), all scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Metrics = dict[str, Tensor]


def pair_logits(
    preferred: Tensor, rejected: Tensor, offset: Tensor | float = 0.0, beta: float = 1.0
) -> Tensor:
    """(r_E - r_hat) / beta - offset: (B,) in float32 or better, as half precision would round it.

    preferred, rejected: (B,) rewards of the two sides; offset: (B,), see :mod:`reward.offset`.
    """
    dtype = torch.promote_types(preferred.dtype, torch.float32)
    return (preferred.to(dtype) - rejected.to(dtype)) / beta - offset


def bradley_terry(
    logits: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Pair loss -log sigmoid(logit) of :func:`pair_logits`.

    logits: (B,); weight: (B,), or None for equal weights. smoothing: probability that a pair counts
    as the other way round, which makes log((1 - smoothing) / smoothing) the best logit.
    """
    loss = -F.logsigmoid(logits)  # arXiv:2503.13538 eq. 11
    if smoothing:  # (1 - s) -log sigmoid(z) + s -log sigmoid(-z), as in arXiv:2510.01857
        loss = loss + smoothing * logits
    return _weighted_mean(loss, weight), pair_metrics(logits.detach())


def linear(logits: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Exact IRL objective -(r_E - r_hat), without the paper's 1/beta, which is a step size.

    It has no lower limit: pass rewards through :func:`bound` first. Shapes as in bradley_terry.
    """
    return _weighted_mean(-logits, weight), pair_metrics(logits.detach())  # arXiv:2503.13538 eq. 10


PAIR_LOSSES = {"bradley_terry": bradley_terry, "linear": linear}


@dataclass(frozen=True)
class PairLoss:
    """A pair loss with its options."""

    name: str = "bradley_terry"
    beta: float = 1.0
    """Divisor of the reward in logits."""
    smoothing: float = 0.0
    """Label smoothing of bradley_terry."""
    cap: float | None = None
    """Pairs with a larger logit have no gradient."""

    def __call__(
        self, preferred: Tensor, rejected: Tensor, offset: Tensor, weight: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Weighted loss of B pairs and metrics of their logits; all arguments are (B,)."""
        logits = pair_logits(preferred, rejected, offset, self.beta)
        metrics = pair_metrics(logits.detach())
        if self.cap is not None:
            logits = logits.clamp(max=self.cap)
        if self.name == "linear":
            return linear(logits, weight)[0], metrics
        return bradley_terry(logits, weight, self.smoothing)[0], metrics


def bound(reward: Tensor, limit: float) -> Tensor:
    """limit * tanh(reward / limit): close to the identity at 0, within +-limit. Any shape."""
    return limit * torch.tanh(reward / limit)


def pessimistic(scores: Tensor, penalty: float) -> Tensor:
    """Mean minus `penalty` standard deviations over an ensemble's k members: (..., k) -> (...).

    The deviation divides by k. arXiv:2310.02743 (UWO) subtracts a multiple of its square instead.
    """
    return scores.mean(-1) - penalty * scores.std(-1, correction=0)


def implicit_reward(policy_logp: Tensor, reference_logp: Tensor, beta: float) -> Tensor:
    """r = beta log(pi_theta(y|x) / pi_ref(y|x)), up to beta log Z(x).

    policy_logp, reference_logp: (B,) summed log-probs of the completions; returns (B,).
    """
    return beta * (policy_logp - reference_logp)  # arXiv:2305.18290 eq. 5


def mixture_logp(logps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Log of prod_i pi_i^w_i, unnormalised: its Z(x) cancels in pairs of one prompt.

    logps: one tensor of any common shape per model; weights sum to 1 (alpha-SPIN's reference).
    """
    return torch.stack([w * logp for w, logp in zip(weights, logps, strict=True)]).sum(0)


def iq_learn(
    logp: Tensor,
    value: Tensor,
    mask: Tensor,
    coef: float,
    gamma: float = 1.0,
    tokens: Tensor | int | None = None,
) -> tuple[Tensor, Metrics]:
    """Offline IQLearn on demonstrations, logits as soft Q values (arXiv:2409.01369).

    The mean over tokens of coef * r_t^2 - log pi(a_t|s_t), where r_t = log pi(a_t|s_t) + V(s_t) -
    gamma V(s_{t+1}) is the reward that pi's logits imply, since log pi = Q - V. coef 0 is SFT.

    logp, value: (B, L) log-prob of the token at each place and log-sum-exp of the logits there;
    mask: (B, L), true on the completion's consecutive tokens; V after the last one is 0.
    tokens: the divisor of the sums, for a batch that is part of a larger one.
    """
    logp, value, mask = logp.float(), value.float(), mask.float()
    following = F.pad((value * mask)[:, 1:], (0, 1))  # V(s_{t+1}): (B, L)
    # arXiv:2409.01369: r = Q - gamma V' = log pi + V - gamma V'
    reward = (logp + value - gamma * following) * mask
    count = mask.sum() if tokens is None else torch.as_tensor(tokens, device=mask.device)
    nll, square = -(logp * mask).sum() / count, reward.square().sum() / count
    metrics = {"nll": nll.detach(), "reward": (reward.sum() / count).detach()}
    return nll + coef * square, {**metrics, "reward_square": square.detach()}


def pair_metrics(margin: Tensor) -> Metrics:
    """Accuracy (ties count half), mean margin, and Bradley-Terry loss of margins (B,)."""
    return {
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "margin": margin.mean(),
        "loss": -F.logsigmoid(margin).mean(),
    }


def calibration_error(margin: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(preferred wins) = sigmoid(margin), equal-count bins.

    Each pair counts as a prediction of its more probable side, so the confidence is in [1/2, 1],
    and the outcome is whether that side is the preferred one (ties count half). margin: (B,).
    Returns a number in [0, 1].
    """
    confidence, order = torch.sort(torch.sigmoid(margin.abs().double()))
    outcome = ((margin > 0).double() + 0.5 * (margin == 0).double())[order]
    gaps = [
        (c.mean() - o.mean()).abs().item() * len(c) / len(margin)
        for c, o in zip(confidence.chunk(bins), outcome.chunk(bins), strict=True)
    ]
    return math.fsum(gaps)


def _weighted_mean(loss: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (B,) losses, weighted if there are weights."""
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum()
