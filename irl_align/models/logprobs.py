"""Log-probabilities of tokens and sequences, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chosen_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-prob of each token under the logits at its place: (..., V), (...) -> (...)."""
    logits = logits.float()
    picked = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return picked - torch.logsumexp(logits, dim=-1)


def logprobs_and_values(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-prob of each token, and V = log-sum-exp of the logits at its place.

    (..., V), (...) -> (..., 2). With logits as soft Q values, V is the soft value of the place.
    """
    values = torch.logsumexp(logits.float(), dim=-1)
    return torch.stack([chosen_logprobs(logits, token_ids), values], dim=-1)


def k1(policy_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Unbiased estimate of KL(pi || ref) from samples of pi: log pi - log ref. Any shape."""
    return policy_logp - reference_logp


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound of KL(best-of-n || pi) in nats: log n - (n - 1)/n (arXiv:2204.05862 sec. 4)."""
    return math.log(n) - (n - 1) / n
