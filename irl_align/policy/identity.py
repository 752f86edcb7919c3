"""The identity: with an implicit reward the reward level has moved the policy already (SPIN)."""

from __future__ import annotations

from dataclasses import dataclass

from irl_align.errors import UserError
from irl_align.policy import Policy, UpdateContext, UpdateRequest


@dataclass(frozen=True)
class Identity:
    """pi_{k+1} is the model inside the implicit reward beta log(pi_theta / pi_ref)."""

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """The model that the fit of the reward has trained."""
        reward = request.reward
        if reward is None or reward.kind != "implicit":
            raise UserError("policy_update.kind: identity needs reward.kind: implicit")
        return Policy(reward.path, reward.key)
