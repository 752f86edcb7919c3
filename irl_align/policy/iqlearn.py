"""Offline IQLearn on the demonstrations: a baseline of inverse RL without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irl_align.config.policy_update import IQLearnOptions
from irl_align.models.loading import save_model
from irl_align.models.sft import GuardedSFTTrainer, fit_sft, sft_columns
from irl_align.policy import Policy, UpdateContext, UpdateRequest
from irl_align.reward.losses import iq_learn
from irl_align.utils import distributed


@dataclass(frozen=True)
class IQLearn:
    """pi_{k+1} is pi_k after further training on the demonstrations by IQLearn's loss."""

    options: IQLearnOptions

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """Train further; a reward is ignored."""
        options = self.options

        def build(work: Path) -> dict[str, Any]:
            model = context.models.load_trainable(request.policy.path)
            metrics = fit_sft(
                model,
                context.tokenizer,
                sft_columns(request.demonstrations.prompts, request.demonstrations.completions),
                options.args,
                context.training(work, f"IQLearn {request.iteration}"),
                partial(IQLearnTrainer, coef=options.coef, gamma=options.gamma),
            )
            save_model(model, context.tokenizer, work / "model")
            return metrics

        stage = context.stage(
            request.role,
            "iqlearn",
            {
                **options.model_dump(exclude={"kind"}),
                "iteration": request.iteration,
                **context.models.adapted,
            },
            {"policy": request.policy.key, "demonstrations": request.demonstrations.checksum},
            build,
        )
        return Policy(stage.path / "model", stage.key)


class IQLearnTrainer(GuardedSFTTrainer):
    """TRL's SFTTrainer with IQLearn's loss."""

    def __init__(self, *args: Any, coef: float, gamma: float, **kwargs: Any) -> None:
        self.coef = coef
        self.gamma = gamma
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean over the tokens of a step, all its accumulated batches together."""
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        labels = inputs["labels"][:, 1:]  # (B, L - 1): the token that each place predicts
        mask = labels != -100
        logits = outputs.logits[:, :-1].float()
        value = logits.logsumexp(-1)
        logp = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - value
        loss, metrics = iq_learn(logp, value, mask, self.coef, self.gamma, num_items_in_batch)
        for name, number in metrics.items():
            self._metrics["train"][name].append(number.item())
        # Tokens are counted over all processes, whose gradients are averaged.
        return loss * distributed.count()
