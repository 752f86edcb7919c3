"""More SFT on the demonstrations: the control that uses no reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.models.loading import save_model
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.policy import Demonstrations, Policy, Reward, UpdateContext
from irl_align.policy.roles import Role


@dataclass(frozen=True)
class MoreSFT:
    """pi_{k+1} is pi_k after further supervised training on the demonstrations."""

    args: Mapping[str, Any]

    def __call__(
        self,
        context: UpdateContext,
        iteration: int,
        policy: Policy,
        initial: Policy,
        reward: Reward | None,
        demonstrations: Demonstrations,
    ) -> Policy:
        """Train on; the reward, if there is one, is not looked at."""

        def build(work: Path) -> dict[str, Any]:
            model = context.load_trainable(policy.path)
            columns = sft_columns(demonstrations.prompts, demonstrations.completions)
            training = context.training(work, f"more SFT {iteration}")
            metrics = fit_sft(model, context.tokenizer, columns, self.args, training)
            save_model(model, context.tokenizer, work / "model")
            return metrics

        stage = context.stage(
            Role.policy(iteration + 1),
            "more-sft",
            {"args": dict(self.args), "iteration": iteration, **context.adapted},
            {"policy": policy.key, "demonstrations": demonstrations.checksum},
            build,
        )
        return Policy(stage.path / "model", stage.key)
