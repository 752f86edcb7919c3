"""Faults that end a PPO training: divergence, and log-probs that differ by more than rounding."""

from __future__ import annotations

from typing import NamedTuple


class Diverged(Exception):
    """Training cannot continue; the message is one line for the user."""


class LogProbGap(NamedTuple):
    """|log pi - log pi'| over the tokens of a rollout or a minibatch, in nats."""

    mean: float
    largest: float

    def beyond_rounding(self, bf16: bool) -> str | None:
        """How far two computations of one function differ, or None if rounding explains it."""
        limit = _ROUNDING[bf16]
        if self.mean > limit.mean:
            return f"by {self.mean:.2g} per token, expected at most {limit.mean:g}"
        if self.largest > limit.largest:  # the mean over many tokens hides a wrong one
            return f"by {self.largest:.2g} at a token, expected at most {limit.largest:g}"
        return None


# By bf16, which rounds a logit of 16 to 0.125; rare tokens have the largest errors.
_ROUNDING = {False: LogProbGap(1e-3, 5e-2), True: LogProbGap(5e-2, 1.0)}
