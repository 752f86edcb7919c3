"""Fit the explicit reward on B pairs, with TRL's RewardTrainer and our pair losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from irl_align.data.columns import column
from irl_align.models.packing import PackedRows, can_pack, pack_rows, row_lengths, share_prompts
from irl_align.models.sharding import copy_back, to_train
from irl_align.models.trl import (
    LENGTH_GROUPS,
    Guarded,
    Training,
    as_dataset,
    inside_forward,
    run_trainer,
)
from irl_align.models.trl_options import training_args
from irl_align.reward.forward import whole_rewards
from irl_align.reward.losses import PairLoss, calibration_error, pair_logits, pair_metrics
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction
from irl_align.reward.settings import RewardSettings
from irl_align.utils import distributed
from irl_align.utils.statistics import clustered_share

SIDES = (("prompt_ids", "chosen_ids"), ("rejected_prompt_ids", "rejected_ids"))
"""Columns of prompt and completion, of the preferred and of the rejected side."""


def pair_columns(pairs: Dataset, weight: float = 1.0) -> dict[str, list[Any]]:
    """Columns that the trainer reads: token ids of both sides' prompts and completions, and the
    pairs' weight and offset."""
    columns: dict[str, list[Any]] = {name: list(pairs[name]) for side in SIDES for name in side}
    columns["weight"] = [weight] * len(columns["prompt_ids"])
    columns["offset"] = offsets_of(pairs).tolist()
    return columns


def offsets_of(pairs: Dataset) -> Tensor:
    """Offset that the logit of each pair subtracts: (B,), 0 without :mod:`reward.offset`."""
    if "offset" not in pairs.column_names:
        return torch.zeros(len(pairs))
    return torch.tensor(column(pairs, "offset"))


def bootstrap_weights(weights: Sequence[float], heads: int, seed: int) -> list[list[float]]:
    """Weights of pairs (B,) for each head of an ensemble, (B, k): times draws of Exp(1).

    The Bayesian bootstrap (Rubin 1981): heads of one backbone would otherwise see the same data,
    and no pair has weight 0, which a small batch would not survive.
    """
    draws = np.random.default_rng(seed).exponential(1.0, (len(weights), heads))
    drawn: list[list[float]] = (np.asarray(weights)[:, None] * draws).tolist()
    return drawn


_TOGETHER = 4  # most pairs of one prompt side by side; more would save little


def order_columns(columns: Mapping[str, list[Any]], share: bool) -> dict[str, list[int]]:
    """Columns that decide the order of the rows: each row's unit, and the unit's length in tokens.

    Rows of a unit stay side by side. A unit is a few pairs of one prompt that fit into one row of
    tokens; it is small, since a batch should have many prompts. A pair whose sides do not share a
    row (share=False, or two prompts) is a unit of its own, with the length of its longer side.
    """
    prompts, rejected_prompts = columns["prompt_ids"], columns["rejected_prompt_ids"]
    both = [a + b for a, b in zip(columns["chosen_ids"], columns["rejected_ids"], strict=True)]
    one_row = [share and a == b for a, b in zip(prompts, rejected_prompts, strict=True)]
    shared = [number for number, shares in enumerate(one_row) if shares]
    single = [number for number, shares in enumerate(one_row) if not shares]
    rows = share_prompts([prompts[i] for i in shared], [both[i] for i in shared], share)
    units = [
        [shared[i] for i in row[start : start + _TOGETHER]]
        for row in rows
        for start in range(0, len(row), _TOGETHER)
    ]
    lengths = row_lengths(prompts, both, units)
    units += [[number] for number in single]
    lengths += [max(len(columns[p][i]) + len(columns[c][i]) for p, c in SIDES) for i in single]
    unit, length = [0] * len(both), [0] * len(both)
    for number, (members, total) in enumerate(zip(units, lengths, strict=True)):
        for row in members:
            unit[row], length[row] = number, total
    return {"unit": unit, "length": length}


@dataclass(frozen=True)
class PairCollator:
    """Turns pairs into one batch of packed rows that holds every distinct sequence once.

    Pairs of one prompt share its tokens (if `share`), and pairs of one demonstration share it.
    """

    pad_token_id: int
    share: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Fields of PackedRows for the distinct sequences; slot (2B,); weight and offset (B,).

        slot: number of the sequence of each side, all preferred sides first, then all rejected.
        """
        sides = [(tuple(row[p]), tuple(row[c])) for p, c in SIDES for row in rows]
        unique = list(dict.fromkeys(sides))
        prompts, completions = [p for p, _ in unique], [c for _, c in unique]
        packed_rows = share_prompts(prompts, completions, self.share)
        order = {unique[i]: slot for slot, i in enumerate(i for row in packed_rows for i in row)}
        return {
            **vars(pack_rows(prompts, completions, packed_rows, self.pad_token_id)),
            "slot": torch.tensor([order[side] for side in sides]),
            **{
                name: torch.tensor([row[name] for row in rows], dtype=torch.float32)
                for name in ("weight", "offset")
            },
        }


class PairRewardTrainer(Guarded, RewardTrainer):
    """TRL's RewardTrainer with this project's losses, weights and reward head."""

    def __init__(self, *args: Any, settings: RewardSettings, loss: PairLoss, **kwargs: Any) -> None:
        config = kwargs["model"].config
        heads, config.num_labels = config.num_labels, 1  # TRL refuses an ensemble of heads
        super().__init__(*args, **kwargs)
        config.num_labels = heads
        self.reward_settings = replace(settings, penalty=None)
        self.pair_loss = loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Weighted pair loss of one batch, plus TRL's centring term if args set it."""
        packed = PackedRows(**{field.name: inputs[field.name] for field in fields(PackedRows)})
        inner = self.accelerator.unwrap_model(model)
        rewards = inside_forward(
            model, inner, lambda: whole_rewards(inner, self.reward_settings, packed)
        )
        preferred, rejected = rewards[inputs["slot"]].chunk(2)  # of k heads: (B, k)
        weight, offset = inputs["weight"], inputs["offset"]
        if preferred.ndim == 2:  # the mean of the heads' losses
            offset = offset[:, None].expand_as(preferred)
            sides = (preferred, rejected, weight, offset)
            preferred, rejected, weight, offset = (each.flatten() for each in sides)
        loss, metrics = self.pair_loss(preferred, rejected, offset, weight)
        args: Any = self.args
        if args.center_rewards_coefficient is not None:
            loss = loss + args.center_rewards_coefficient * (preferred + rejected).pow(2).mean()
        for name in ("accuracy", "margin"):
            mean = distributed.total(metrics[name] / distributed.count())
            self._metrics["train"][name].append(mean.item())
        return loss


def fit_reward(
    reward: RewardModel,
    columns: Mapping[str, list[Any]],
    loss: PairLoss,
    options: Mapping[str, Any],
    training: Training,
) -> dict[str, Any]:
    """Train `reward` in place on pairs (see :func:`pair_columns`); returns training metrics."""
    args = training_args(RewardConfig, {**LENGTH_GROUPS, **options}, training)
    columns = {**columns, **{y: list(reward.as_read(columns[x], columns[y])) for x, y in SIDES}}
    longest = max(
        (len(p) + len(c) for a, b in SIDES for p, c in zip(columns[a], columns[b], strict=True)),
        default=0,
    )
    # With echo sharing a row saves little of its length, and its attention costs more than that.
    share = can_pack(reward.model, longest) and not reward.settings.echo
    trained = to_train(reward.model)
    trainer = PairRewardTrainer(
        model=trained,
        args=args,
        data_collator=PairCollator(reward.tokenizer.pad_token_id, share),
        train_dataset=as_dataset({**columns, **order_columns(columns, share)}, training.label),
        processing_class=reward.tokenizer,
        settings=reward.settings,
        loss=loss,
    )
    metrics = run_trainer(trainer, training)
    copy_back(trained, reward.model)
    reward.model.eval()
    return metrics


def side_rewards(reward: RewardFunction, pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Rewards of the preferred and of the rejected sides: (B,) each."""
    chosen, rejected = (reward.score_ids(column(pairs, p), column(pairs, c)) for p, c in SIDES)
    return chosen, rejected


def margins(reward: RewardFunction, pairs: Dataset, beta: float = 1.0) -> Tensor:
    """Logit of each pair, whose sigmoid is the probability that the preferred side wins: (B,)."""
    return pair_logits(*side_rewards(reward, pairs), offsets_of(pairs), beta)


def margin_report(margin: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
    """Held-out accuracy, mean margin, Bradley-Terry loss and calibration of margins (B,).

    prompts: (B,) keys of the pairs' prompts, the clusters of the accuracy's interval.
    """
    if not len(margin):
        return {"pairs": 0}
    report = {name: float(value) for name, value in pair_metrics(margin).items()}
    share = clustered_share((0.5 * (1.0 + margin.double().sign())).tolist(), prompts)
    return {
        "pairs": len(margin),
        "prompts": share.clusters,
        **report,
        "accuracy_interval": [share.low, share.high],
        "calibration_error": calibration_error(margin),
    }
