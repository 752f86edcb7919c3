"""The offset of a cumulative reward: what the policy that drew a sample already has.

Pairs (y_E, y_hat ~ pi_k) have logits r(x, y) / beta - o_k(x, y). With o_k = log pi_k / pi_0 their
minimiser is r = beta log pi_E / pi_0 + c(x) for every k, since that of the logits is
log pi_E / pi_k. So pairs of all iterations fit one reward, whose policy at KL weight beta is pi_E.
o_0 is 0: the first iteration is the paper's. AIRL's discriminator (arXiv:1710.11248) on sequences.

With o_k = r_(k-1) / beta the reward is the sum of what each iteration adds. That is the same if
pi_k is the exact optimum of r_(k-1), pi_0 exp(r_(k-1) / beta) / Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from irl_align.data.columns import column

POLICY_PAIRS = "demonstration/policy"
"""Source of the pairs that have an offset: their rejected sides are samples of pi_k."""


@dataclass(frozen=True)
class OffsetShape:
    """How a log-ratio or an earlier reward becomes an offset."""

    coef: float = 1.0
    """Factor."""
    clip: float | None = None
    """Largest |offset| of a text, in nats."""
    per_token: bool = False
    """Whether a text's log-ratio is divided by its number of tokens."""

    def __call__(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Offsets of texts with these values and lengths, both (B,)."""
        values = self.coef * (values / lengths.clamp(min=1) if self.per_token else values)
        return values if self.clip is None else values.clamp(-self.clip, self.clip)


def pair_offsets(pairs: Dataset, values: Tensor, shape: OffsetShape) -> Tensor:
    """Offset of the preferred side less that of the rejected side: (B,), 0 without a sampler.

    values: (2, B) log-ratios or rewards of both sides, preferred first.
    """
    lengths = torch.tensor(
        [[len(ids) for ids in column(pairs, f"{side}_ids")] for side in ("chosen", "rejected")]
    )
    preferred, rejected = shape(values, lengths)
    drawn = torch.tensor([source == POLICY_PAIRS for source in column(pairs, "source")])
    return torch.where(drawn, preferred - rejected, torch.zeros(()))
