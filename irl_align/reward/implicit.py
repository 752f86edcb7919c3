"""Fit the implicit reward beta log(pi_theta/pi_ref) on pairs, with TRL's DPOTrainer.

This is SPIN's whole step and the pairwise use of Best-of-N. Reference log-probs are computed once,
before training, so that no second model is held, and so that a mixture reference is one sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from irl_align.data.columns import column
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.packing import pad_right
from irl_align.models.sharding import copy_back, to_train
from irl_align.models.trl import (
    LENGTH_GROUPS,
    Guarded,
    Training,
    as_dataset,
    run_trainer,
    training_args,
)
from irl_align.reward.fit import SIDES
from irl_align.reward.losses import mixture_logp
from irl_align.utils import distributed

LN2 = math.log(2.0)


def reference_logps(
    references: Sequence[tuple[float, PreTrainedModel]], pairs: Dataset, generator: str = ""
) -> np.ndarray:
    """Summed log-probs of both sides under a reference: (2, B) float32, preferred first.

    references: models with weights that sum to 1; several are a geometric mixture. Equal
    sequences (one demonstration in several pairs) are scored once. generator: the key of a single
    reference, whose own samples have brought their log-probs along and are not scored again.
    """
    rows = [
        key
        for side in SIDES
        for key in zip(*(map(tuple, column(pairs, name)) for name in side), strict=True)
    ]
    known = {}
    if generator and "rejected_logp" in pairs.column_names:
        by = column(pairs, "generator")
        of = zip(rows[len(pairs) :], by, column(pairs, "rejected_logp"), strict=True)
        known = {key: logp for key, by, logp in of if by == generator and logp is not None}
    missing = [key for key in dict.fromkeys(rows) if key not in known]
    prompts, completions = [prompt for prompt, _ in missing], [ids for _, ids in missing]
    totals = [
        torch.tensor(
            [
                float(logps.sum(dtype=np.float64))
                for logps in distributed.over_sequences(
                    partial(_logprobs, model), prompts, completions
                )
            ],
            dtype=torch.float64,
        )
        for _, model in references
    ]
    total = mixture_logp(totals, [weight for weight, _ in references])
    known |= dict(zip(missing, total.tolist(), strict=True))
    logps = np.asarray([known[key] for key in rows], np.float32).reshape(2, -1)
    if not np.isfinite(logps).all():
        raise UserError(
            "reference log-probs: found NaN or infinite ones, expected finite ones: look at the "
            "reference's weights, or load it in float32"
        )
    return logps


def _logprobs(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> list[np.ndarray]:
    progress = "reference log-probs" if distributed.is_main() else None
    return completion_logprobs(model, prompts, completions, progress=progress)


@dataclass(frozen=True)
class ImplicitCollator:
    """Rows to TRL's DPO batch; the two sides may have different prompts (prompt contrast)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask, completion_mask (2B, L); reference log-probs (B,) twice."""
        sides = [(row[p], row[c]) for p, c in SIDES for row in rows]
        ids, mask = pad_right(
            [prompt + completion for prompt, completion in sides], self.pad_token_id
        )
        prompts = torch.tensor([len(prompt) for prompt, _ in sides])
        completion_mask = mask * (torch.arange(ids.shape[1]) >= prompts[:, None])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "completion_mask": completion_mask,
            "ref_chosen_logps": torch.tensor([row["ref_chosen_logps"] for row in rows]),
            "ref_rejected_logps": torch.tensor([row["ref_rejected_logps"] for row in rows]),
        }


def gather_rows(values: Tensor) -> Tensor:
    """Values (N, ...) of all processes in a row, N of each its own; numbers () as (processes,)."""
    parts = distributed.gather(values.detach().cpu())
    return torch.cat([torch.atleast_1d(part) for part in parts]).to(values.device)


class PairDPOTrainer(Guarded, DPOTrainer):
    """TRL's DPOTrainer on token ids, with reference log-probs given."""

    def __init__(self, *args: Any, expect_ln2: bool, **kwargs: Any) -> None:
        self.expect_ln2 = expect_ln2
        super().__init__(*args, **kwargs)
        if (
            distributed.count() > 1
        ):  # TRL's monitors gather a piece's rows, and pieces differ in them
            self.accelerator.gather = gather_rows

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # token ids already

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # the columns are there already

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """DPO's loss; at the first step of a fit it must be ln 2, since pi_theta = pi_ref."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.expect_ln2:
            self.expect_ln2 = False
            first = loss.item()
            # The reference's log-probs are float32; half precision, of products or of weights,
            # rounds the policy's own. The loss magnifies a difference of log-probs by beta: the
            # same nats whatever it is.
            weights = next(model.parameters()).dtype
            half = self.args.bf16 or self.args.fp16 or weights.itemsize < 4
            nats = 0.2 if half else 0.01
            slack = nats * max(self.beta, 0.1)
            if self.state.global_step > 0:
                return loss  # resumed: the checkpoint's history has it
            if abs(first - LN2) > slack:
                raise UserError(
                    f"{self.args.run_name}: the first loss is {first:.6f}, expected ln 2 "
                    f"= {LN2:.6f}: reference and policy differ (another model, dropout, or dtype)"
                )
            self.state.log_history.append({"first_loss": first, "step": 0})
        return loss


def fit_implicit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    ref_logps: np.ndarray,
    options: Mapping[str, Any],
    training: Training,
    expect_ln2: bool,
) -> dict[str, Any]:
    """Train `model` in place on pairs; returns training metrics.

    ref_logps: (2, B) from :func:`reference_logps`; expect_ln2: the reference is the model itself,
    so that the first loss must be ln 2 (with the sigmoid loss and no label smoothing).
    """
    lengths = [
        max(len(p) + len(c), len(q) + len(d))
        for p, c, q, d in zip(*(pairs[name] for side in SIDES for name in side), strict=True)
    ]
    columns = {name: list(pairs[name]) for side in SIDES for name in side}
    columns["ref_chosen_logps"], columns["ref_rejected_logps"] = ref_logps.tolist()
    columns["length"] = lengths
    args = training_args(
        DPOConfig, {**LENGTH_GROUPS, **options, "precompute_ref_log_probs": True}, training
    )
    plain = args.loss_type == ["sigmoid"] and not args.label_smoothing
    trained = to_train(model)
    trainer = PairDPOTrainer(
        model=trained,
        args=args,
        data_collator=ImplicitCollator(tokenizer.pad_token_id),
        train_dataset=as_dataset(columns, training.label),
        processing_class=tokenizer,
        expect_ln2=expect_ln2 and plain,
    )
    metrics = run_trainer(trainer, training)
    if first := [r["first_loss"] for r in metrics["history"] if "first_loss" in r]:
        metrics["first_loss"] = first[0]
        metrics["history"] = [r for r in metrics["history"] if "first_loss" not in r]
    copy_back(trained, model)
    model.eval()
    return metrics
