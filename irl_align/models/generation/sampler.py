"""The draw of one decoding step: logits and uniform numbers in, tokens and log-probs out.

Dimensions: B rows in a batch, V vocabulary.
"""

import numpy as np
import torch

from irl_align.models.generation.protocol import Sampling


def sample_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting its cumulative distribution.

    Args:
        logits: (B, V) float32. A row with NaN or +inf gives a log-probability that is not finite.
        uniforms: (B, 1) float64 in [0, 1); not read by greedy sampling.
        sampling: temperature, top-k and top-p.

    Returns:
        Tokens (B,) int64 and their log-probabilities (B,) float32 under the distribution that was
        drawn from; for greedy sampling, under the model's own at temperature 1.
    """
    if sampling.greedy:
        tokens = logits.argmax(dim=-1, keepdim=True)
        logprobs = logits.gather(1, tokens) - logits.logsumexp(dim=-1, keepdim=True)
        return tokens[:, 0], logprobs[:, 0]
    probs = warp(logits, sampling).softmax(dim=-1)  # (B, V)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    # In float64 u * total < total for each u < 1, so a token of probability 0 is never drawn.
    target = uniforms * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    tokens = tokens.clamp_(max=logits.shape[1] - 1)  # only a row of NaN needs it
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def warp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Apply temperature, then top-k, then top-p to logits (B, V), as transformers' warpers do.

    Excluded tokens get -inf. Tokens that tie with the last included one are included as well, so
    that the result does not depend on the order of a sort.
    """
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(logits < _nucleus_floor(logits, sampling.top_p), -torch.inf)
    return logits


def _nucleus_floor(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Lowest logit (B, 1) in the smallest set of most likely tokens that reaches ``top_p``."""
    ordered = _sort_descending(logits)
    reach = ordered.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # A token is in the nucleus where the mass before it is below top_p: one token more than those
    # whose cumulative mass is below top_p.
    last = (reach < top_p).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return ordered.gather(1, last)


def _sort_descending(logits: torch.Tensor) -> torch.Tensor:
    if logits.device.type == "cpu":  # numpy's vectorised sort takes a tenth of torch's time
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values
