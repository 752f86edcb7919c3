"""Rewards beta log(pi_a / pi_b) of two language models, and the fit of pi_a on pairs.

The fit, by TRL's DPOTrainer, is SPIN's whole step and the pairwise use of Best-of-N. Reference
log-probs are computed once, before training: no second model stays in memory, and a mixture
reference is a plain sum.
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
from irl_align.data.encoding import Templated
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.packing import Ids, pad_right
from irl_align.models.sharding import copy_back, to_train
from irl_align.models.trl import (
    LENGTH_GROUPS,
    Guarded,
    Training,
    as_dataset,
    run_trainer,
)
from irl_align.models.trl_options import training_args
from irl_align.reward.fit import SIDES
from irl_align.reward.losses import implicit_reward, mixture_logp
from irl_align.reward.protocol import TextFormat, TextScoring, require_finite
from irl_align.reward.settings import DEFAULT_SETTINGS
from irl_align.utils import distributed

LN2 = math.log(2.0)
FIRST_LOSS = {"sigmoid": LN2, "bco_pair": 2.0 * LN2, "nca_pair": 2.0 * LN2}
"""TRL's loss of a pair while pi_theta is the reference, so that all log-ratios are 0."""


class ImplicitReward(TextScoring):
    """r(x, y) = beta log(pi(y|x) / pi_ref(y|x)), the sum of a reward r_t for each token.

    This is the reward that SPIN and DPO fit, up to beta log Z(x), which cancels in pairs of one
    prompt. The reference is one model, or the geometric mixture of several with weights that sum to
    1, up to its own Z(x); without one it counts as 1. Rewards of prefixes are partial sums, so that
    credit `red` gives each token its own r_t.

    endogenous: add beta (V(s_t) - V(s_(t+1))), see :func:`token_rewards`. mean: divide the sum of a
    text or prefix by its number of tokens. tokenizer and template are needed to score texts; token
    ids need neither.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        references: Sequence[tuple[float, PreTrainedModel]],
        beta: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: Templated = DEFAULT_SETTINGS,
        *,
        endogenous: bool = False,
        mean: bool = False,
    ) -> None:
        self.policy = policy
        self.references = references
        self.beta = beta
        self.tokenizer = tokenizer
        self.template = template
        self.endogenous = endogenous
        self.mean = mean

    def text_format(self) -> TextFormat:
        """How texts are read. Raises UserError: there is no tokenizer."""
        if self.tokenizer is None:
            raise UserError(
                "reward: an implicit reward needs a tokenizer to score texts, found none"
            )
        return TextFormat(self.tokenizer, self.template)

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Rewards of whole completions: (B,). Raises UserError: a reward is not finite."""
        scores = torch.tensor([float(s[-1]) for s in self.prefix_scores_ids(prompts, completions)])
        require_finite("rewards", scores)
        return scores

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Rewards of all prefixes: (T + 1,) per row, 0 for the empty completion."""
        policy = completion_logprobs(
            self.policy, prompts, completions, progress="rewards", values=self.endogenous
        )
        parts = [
            completion_logprobs(model, prompts, completions, progress="rewards of the reference")
            for _, model in self.references
        ]
        weights = [weight for weight, _ in self.references]
        out = []
        for row, array in enumerate(map(torch.from_numpy, policy)):
            logps, values = array.unbind(1) if self.endogenous else (array, None)
            reference = torch.zeros_like(logps)
            if parts:
                reference = mixture_logp([torch.from_numpy(part[row]) for part in parts], weights)
            sums = token_rewards(logps, reference, self.beta, values).cumsum(0)
            if self.mean:
                sums = sums / torch.arange(1, len(sums) + 1)
            out.append(torch.nn.functional.pad(sums, (1, 0)))
        return out


def token_rewards(
    logp: Tensor, reference_logp: Tensor, beta: float, values: Tensor | None = None
) -> Tensor:
    """Rewards (T,) of a completion's tokens: r_t = beta (log pi(a_t|s_t) - log pi_ref(a_t|s_t)).

    values: V(s_t) = log-sum-exp of pi's logits, (T,). With them the reward is endogenous
    (arXiv:2506.23235): logits are soft Q values, whose inverse Bellman operator gives
    r_t = beta (log pi(a_t|s_t) + V(s_t) - V(s_(t+1))), with V = 0 after the last token, as IQLearn
    has it. The V terms are potential-based shaping with Phi = -beta V (Ng et al. 1999): they sum to
    beta V(s_0), so without discount they change neither the ranking of a prompt's completions nor
    the expected policy gradient, but its variance.
    """
    rewards = implicit_reward(logp, reference_logp, beta)
    if values is None:
        return rewards
    return rewards + beta * (values - torch.nn.functional.pad(values[1:], (0, 1)))


def reference_logps(
    references: Sequence[tuple[float, PreTrainedModel]], pairs: Dataset, generator: str = ""
) -> np.ndarray:
    """Summed log-probs of both sides under a reference: (2, B) float32, preferred first.

    references: models with weights that sum to 1; several are a geometric mixture. Equal
    sequences (one demonstration in several pairs) are scored once. generator: key of a single
    reference; the pairs hold the log-probs of its samples, which are not scored again.
    Raises UserError: a log-prob is not finite.
    """
    rows = [
        key
        for side in SIDES
        for key in zip(*(map(tuple, column(pairs, name)) for name in side), strict=True)
    ]
    known = {}
    if generator and "rejected_logp" in pairs.column_names:
        names = column(pairs, "generator")
        sampled = zip(rows[len(pairs) :], names, column(pairs, "rejected_logp"), strict=True)
        known = {key: logp for key, name, logp in sampled if name == generator and logp is not None}
    missing = [key for key in dict.fromkeys(rows) if key not in known]
    sums = [_summed_logps(model, missing) for _, model in references]
    total = mixture_logp(sums, [weight for weight, _ in references])
    known |= dict(zip(missing, total.tolist(), strict=True))
    logps = np.asarray([known[key] for key in rows], np.float32).reshape(2, -1)
    if not np.isfinite(logps).all():
        raise UserError(
            "reference log-probs: found NaN or infinite ones, expected finite ones: look at the "
            "reference's weights, or load it in float32"
        )
    return logps


def _summed_logps(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """Summed log-prob of each (prompt, completion): (B,) in float64."""
    progress = "reference log-probs" if distributed.is_main() else None
    logps = distributed.over_sequences(
        partial(completion_logprobs, model, progress=progress),
        [prompt for prompt, _ in rows],
        [completion for _, completion in rows],
    )
    return torch.tensor([float(row.sum(dtype=np.float64)) for row in logps], dtype=torch.float64)


@dataclass(frozen=True)
class ImplicitCollator:
    """Turns pairs into TRL's DPO batch; the two sides may have different prompts."""

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
    """Values (N, ...) of all processes, concatenated; N may differ, and () counts as (1,)."""
    parts = distributed.gather(values.detach().cpu())
    return torch.cat([torch.atleast_1d(part) for part in parts]).to(values.device)


class PairDPOTrainer(Guarded, DPOTrainer):
    """TRL's DPOTrainer on token ids, with precomputed reference log-probs."""

    def __init__(self, *args: Any, first_loss: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A mixture of experts may add its own loss, which balances them.
        self.first_loss = None if self.aux_loss_enabled else first_loss
        if distributed.count() > 1:  # TRL's monitors gather rows, whose number may differ
            self.accelerator.gather = gather_rows

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it holds token ids already

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it holds the columns already

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """DPO's loss. Raises UserError: it is known for the first step, and differs."""
        trainer: Any = super()
        loss = trainer.compute_loss(model, inputs, *args, **kwargs)
        expected, self.first_loss = self.first_loss, None
        if expected is not None and self.state.global_step == 0:  # a resumed fit has it already
            self._check_first_loss(model, loss.item(), expected)
        return loss

    def _check_first_loss(self, model: torch.nn.Module, first: float, expected: float) -> None:
        """Raise UserError unless the loss is what it must be while pi_theta = pi_ref."""
        # The reference's log-probs are float32; half precision rounds the policy's. The loss
        # multiplies a difference of log-probs by beta, so the limit in nats is the same for any.
        weights = next(model.parameters()).dtype
        half = self.args.bf16 or self.args.fp16 or weights.itemsize < 4
        nats = 0.2 if half else 0.01
        if abs(first - expected) > nats * max(self.beta, 0.1):
            raise UserError(
                f"{self.args.run_name}: the first loss is {first:.6f}, expected "
                f"{expected / LN2:g} ln 2 = {expected:.6f}: reference and policy differ (another "
                "model, dropout, or dtype)"
            )
        self.state.log_history.append({"first_loss": first, "step": 0})


def fit_implicit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    ref_logps: np.ndarray,
    options: Mapping[str, Any],
    training: Training,
    *,
    at_reference: bool,
) -> dict[str, Any]:
    """Train `model` in place on pairs; returns training metrics.

    ref_logps: (2, B) from :func:`reference_logps`. at_reference: whether the reference is
    the model itself; then the first loss must be that of FIRST_LOSS, if it has the loss.
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
    changed = args.label_smoothing or args.loss_weights or args.neftune_noise_alpha
    plain = at_reference and len(args.loss_type) == 1
    plain &= not (changed or args.use_weighting)
    trained = to_train(model)
    trainer = PairDPOTrainer(
        model=trained,
        args=args,
        data_collator=ImplicitCollator(tokenizer.pad_token_id),
        train_dataset=as_dataset(columns, training.label),
        processing_class=tokenizer,
        first_loss=FIRST_LOSS.get(args.loss_type[0]) if plain else None,
    )
    metrics = run_trainer(trainer, training)
    if first := [r["first_loss"] for r in metrics["history"] if "first_loss" in r]:
        metrics["first_loss"] = first[0]
        metrics["history"] = [r for r in metrics["history"] if "first_loss" not in r]
    copy_back(trained, model)
    model.eval()
    return metrics
