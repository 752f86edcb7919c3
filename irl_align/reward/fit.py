"""Fit the explicit reward on pairs, with TRL's RewardTrainer and our pair losses.

Legend of shapes: B pairs, L padded length (prompt and completion).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from irl_align.maths.losses import PAIR_LOSSES, calibration_error, pair_metrics
from irl_align.models import pad_right
from irl_align.reward.model import RewardFunction, RewardModel, RewardSettings, prefix_rewards
from irl_align.trainers import (
    LENGTH_GROUPS,
    Guarded,
    Training,
    as_dataset,
    run_trainer,
    training_args,
)


def pair_columns(pairs: Dataset, weight: float = 1.0) -> dict[str, list[Any]]:
    """Columns that the trainer reads: whole sequences of both sides, prompt lengths, weight.

    pairs has prompt_ids, chosen_ids, rejected_prompt_ids and rejected_ids (token ids).
    """
    sides = {
        "chosen": (pairs["prompt_ids"], pairs["chosen_ids"]),
        "rejected": (pairs["rejected_prompt_ids"], pairs["rejected_ids"]),
    }
    columns: dict[str, list[Any]] = {}
    for side, (prompts, completions) in sides.items():
        prompts = list(prompts)
        columns[f"{side}_ids"] = [p + c for p, c in zip(prompts, completions, strict=True)]
        columns[f"{side}_prompt"] = [len(p) for p in prompts]
    columns["length"] = [
        max(len(a), len(b))
        for a, b in zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)
    ]
    columns["weight"] = [weight] * len(columns["length"])
    return columns


@dataclass(frozen=True)
class PairCollator:
    """Rows to one right-padded batch of 2B sequences: preferred first, rejected after."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask (2B, L); prompts (2B,) prompt lengths; weight (B,)."""
        sequences = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        prompts = [row["chosen_prompt"] for row in rows] + [row["rejected_prompt"] for row in rows]
        ids, mask = pad_right(sequences, self.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "prompts": torch.tensor(prompts),
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float32),
        }


class PairRewardTrainer(Guarded, RewardTrainer):
    """TRL's RewardTrainer with this project's losses, weights and reward head."""

    def __init__(self, *args: Any, settings: RewardSettings, loss: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reward_settings = settings
        self.pair_loss = PAIR_LOSSES[loss]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Weighted pair loss of one batch, plus TRL's centring term when it is asked for."""
        mask = inputs["attention_mask"]
        rewards = prefix_rewards(
            self.accelerator.unwrap_model(model),
            self.reward_settings,
            inputs["input_ids"],
            mask,
            inputs["prompts"],
        )
        last = rewards.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        preferred, rejected = last.chunk(2)
        loss, metrics = self.pair_loss(preferred, rejected, inputs["weight"])
        args: Any = self.args
        if args.center_rewards_coefficient is not None:
            loss = loss + args.center_rewards_coefficient * (preferred + rejected).pow(2).mean()
        for name in ("accuracy", "margin"):
            self._metrics["train"][name].append(metrics[name].item())
        return loss


def fit_reward(
    reward: RewardModel,
    columns: Mapping[str, list[Any]],
    loss: str,
    options: Mapping[str, Any],
    training: Training,
) -> dict[str, Any]:
    """Train `reward` in place on pairs (see :func:`pair_columns`); returns training metrics."""
    args = training_args(RewardConfig, {**LENGTH_GROUPS, **options}, training)
    trainer = PairRewardTrainer(
        model=reward.model,
        args=args,
        data_collator=PairCollator(reward.tokenizer.pad_token_id),
        train_dataset=as_dataset(columns, training.label),
        processing_class=reward.tokenizer,
        settings=reward.settings,
        loss=loss,
    )
    metrics = run_trainer(trainer, training)
    reward.model.eval()
    return metrics


def margins(reward: RewardFunction, pairs: Dataset, scale: float = 1.0) -> Tensor:
    """scale * (r(preferred) - r(rejected)) for each pair: (B,)."""
    chosen = reward.score_ids(pairs["prompt_ids"], pairs["chosen_ids"])
    rejected = reward.score_ids(pairs["rejected_prompt_ids"], pairs["rejected_ids"])
    return scale * (chosen - rejected)


def margin_report(margin: Tensor) -> dict[str, float]:
    """Held-out accuracy, mean margin, Bradley-Terry loss and calibration of margins (B,)."""
    if not len(margin):
        return {"pairs": 0}
    report = {name: float(value) for name, value in pair_metrics(margin).items()}
    return {"pairs": len(margin), **report, "calibration_error": calibration_error(margin)}
