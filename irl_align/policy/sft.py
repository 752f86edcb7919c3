"""More SFT on the demonstrations: the control that uses no reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.models.loading import save_model
from irl_align.models.sft import conversation_columns, fit_sft
from irl_align.policy import Policy, UpdateContext, UpdateRequest


@dataclass(frozen=True)
class MoreSFT:
    """pi_{k+1} is pi_k after further supervised training on the request.demonstrations."""

    args: Mapping[str, Any]

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """Train further; a reward is ignored."""

        def build(work: Path) -> dict[str, Any]:
            model = context.models.load_trainable(request.policy.path)
            columns = conversation_columns(
                request.demonstrations.prompts, request.demonstrations.completions
            )
            training = context.training(work, f"more SFT {request.iteration}")
            metrics = fit_sft(model, context.tokenizer, columns, self.args, training)
            save_model(model, context.tokenizer, work / "model")
            return metrics

        stage = context.stage(
            request.role,
            "more-sft",
            {"args": dict(self.args), "iteration": request.iteration, **context.models.adapted},
            {"policy": request.policy.key, "demonstrations": request.demonstrations.checksum},
            build,
        )
        return Policy(stage.path / "model", stage.key)
