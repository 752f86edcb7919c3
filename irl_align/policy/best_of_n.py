"""Best-of-N: sample N completions per prompt, score them, and use the best.

select  no training: a sample of the new policy is the best of N samples of pi_k;
sft     fine-tune on the best `keep` samples of each prompt (rejection sampling, distillation);
dpo     train the best `keep` against as many of the worst with the implicit reward's loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from irl_align.config.policy_update import PROMPT_OPTIONS, BestOfNOptions
from irl_align.data.columns import column
from irl_align.errors import UserError
from irl_align.models.generation.protocol import Completion
from irl_align.models.generation.samples import Samples
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import save_model
from irl_align.models.sft import fit_sft, sft_columns
from irl_align.models.trl import Training
from irl_align.policy import Policy, Ranking, Stage, UpdateContext, UpdateRequest
from irl_align.policy.roles import Role
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.ranking import Logprobs, rank_samples, sample_lengths, sample_rewards
from irl_align.utils import distributed


@dataclass(frozen=True)
class BestOfN:
    """pi_{k+1} from the best of N samples of pi_k under r_phi."""

    options: BestOfNOptions

    def __call__(self, context: UpdateContext, request: UpdateRequest) -> Policy:
        """Select, or sample the candidates and train on them."""
        options, policy, reward = self.options, request.policy, request.reward
        if reward is None:
            raise UserError("policy_update.kind: best_of_n needs a reward")
        if options.use == "select":
            ranking = Ranking(reward, options.n, options.score, options.temperature)
            return Policy(policy.path, policy.key, ranking)
        prompts = choose_prompts(request.demonstrations.distinct_prompts(), options.prompts)
        sampling = context.sampler.sampling(options.n, options.temperature)
        base = Policy(policy.path, policy.key)
        candidates = context.sampler.sample(base, prompts, sampling, "candidates")
        start = policy if options.start == "current" else request.initial

        inputs = {"policy": policy.key, "demonstrations": request.demonstrations.checksum}
        rewards: Stage | None = None
        if options.score != "logprob":
            inputs["reward"] = reward.key
            settings: dict[str, Any] = {"sampling": vars(sampling), "prompts": options.prompts}
            if (offset := request.offset) is not None:
                inputs["offset"] = offset.of.key
                settings |= {"offset": vars(offset.shape), "beta": reward.logit_beta}
            rewards = score_candidates(context, request, candidates, settings, inputs)

        def build(work: Path) -> dict[str, Any]:
            stored = None if rewards is None else np.load(rewards.path / "rewards.npy")
            logprobs: Logprobs | None = None
            if options.score != "reward" and not sampling.plain:
                of_policy = partial(completion_logprobs, context.models.load_policy(policy.path))
                logprobs = partial(distributed.over_sequences, of_policy)
            scores = rank_samples(candidates, stored, options.score, logprobs)
            model = context.models.load_trainable(start.path)
            label = f"best of {options.n} ({options.use}) {request.iteration}"
            own = start == policy and sampling.plain
            metrics = self._fit(
                context, model, candidates, scores, training=context.training(work, label), own=own
            )
            save_model(model, context.tokenizer, work / "model")
            return {**score_report(scores), **metrics}

        stage = context.stage(
            request.role,
            f"best-of-n-{options.use}",
            {
                "sampling": vars(sampling),
                "options": options.model_dump(exclude=PROMPT_OPTIONS),
                "iteration": request.iteration,
                **context.models.adapted,
            },
            {**inputs, "start": start.key},
            build,
        )
        return Policy(stage.path / "model", stage.key)

    def _fit(
        self,
        context: UpdateContext,
        model: PreTrainedModel,
        candidates: Samples,
        scores: np.ndarray,
        *,
        training: Training,
        own: bool,
    ) -> dict[str, Any]:
        """Train the model in place; own: it is the sampler itself, without top-p or top-k."""
        options, tokenizer = self.options, context.tokenizer
        if options.use == "sft":
            columns = best_columns(candidates, scores, options.keep)
            return fit_sft(model, tokenizer, columns, options.args, training)
        pairs = best_against_worst(candidates, scores, options.keep)
        if own:  # the reference is the sampler, whose log-probs are stored with the samples
            logps = np.array(
                [column(pairs, f"{side}_logp") for side in ("chosen", "rejected")], np.float32
            )
        else:
            logps = reference_logps([(1.0, model)], pairs)
        return fit_implicit(
            model, tokenizer, pairs, logps, options.args, training, at_reference=True
        )


def score_candidates(
    context: UpdateContext,
    request: UpdateRequest,
    candidates: Samples,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> Stage:
    """Rewards (M * N,) of candidates as a stage, which all uses of the same candidates share.

    Of a cumulative reward it is what pi_k lacks of it, r_k / beta - o_k, since pi_k has o_k.
    """
    reward = request.reward
    assert reward is not None

    def build(work: Path) -> dict[str, Any]:
        rewards = sample_rewards(candidates, context.models.load_reward(reward))
        if (offset := request.offset) is not None:
            own = sample_rewards(candidates, context.models.load_reward(offset.of))
            lengths = torch.from_numpy(sample_lengths(candidates))
            had = offset.shape(torch.from_numpy(own) / offset.of.logit_beta, lengths)
            rewards = rewards / reward.logit_beta - had.numpy()
        if distributed.is_main():
            np.save(work / "rewards.npy", rewards)
        return {"samples": len(rewards)}

    role = Role.candidate_rewards(request.iteration)
    return context.stage(role, "candidate-rewards", settings, inputs, build)


def choose_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> list[list[int]]:
    """At most `limit` prompts, chosen by a hash of their ids, in their order."""

    def name(prompt: Sequence[int]) -> bytes:
        return hashlib.blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=8).digest()

    if limit is None or limit >= len(prompts):
        return [list(prompt) for prompt in prompts]
    chosen = set(sorted(range(len(prompts)), key=lambda i: name(prompts[i]))[:limit])
    return [list(prompts[i]) for i in sorted(chosen)]


def best_columns(samples: Samples, scores: np.ndarray, keep: int) -> dict[str, list[Any]]:
    """SFT rows of the best `keep` distinct finished samples of each prompt; scores (M, N)."""
    best: dict[int, list[list[int]]] = {}
    for index, group in samples.groups():
        taken: dict[tuple[int, ...], None] = {}
        for j in np.argsort(-scores[index], kind="stable"):
            if len(taken) == keep or not np.isfinite(scores[index, j]):
                break
            taken.setdefault(tuple(group[j].token_ids))
        best[index] = [list(ids) for ids in taken]
    rows = [(samples.prompts[index], ids) for index in sorted(best) for ids in best[index]]
    return sft_columns([prompt for prompt, _ in rows], [ids for _, ids in rows])


def best_against_worst(samples: Samples, scores: np.ndarray, keep: int = 1) -> Dataset:
    """Pairs of each prompt's finished samples: best over worst, second over second last, and so on.

    At most `keep` pairs a prompt, and none of two equal samples; scores (M, N). chosen_logp and
    rejected_logp are the sampler's summed log-probs.
    """
    rows: dict[int, list[dict[str, Any]]] = {}
    for index, group in samples.groups():
        row = scores[index]
        finished = [int(j) for j in np.argsort(-row, kind="stable") if np.isfinite(row[j])]
        half = min(keep, len(finished) // 2)
        rows[index] = [
            _pair(samples.prompts[index], group[better], group[worse])
            for better, worse in zip(finished[:half], finished[::-1][:half], strict=True)
            if group[better].token_ids != group[worse].token_ids
        ]
    pairs = [pair for index in sorted(rows) for pair in rows[index]]
    if not pairs:
        raise UserError(
            "policy_update.use: dpo: no prompt has two different finished samples; raise "
            "temperature or generation.max_new_tokens"
        )
    return Dataset.from_list(pairs)


def _pair(prompt: list[int], better: Completion, worse: Completion) -> dict[str, Any]:
    return {
        "prompt_ids": prompt,
        "chosen_ids": better.token_ids,
        "rejected_prompt_ids": prompt,
        "rejected_ids": worse.token_ids,
        "chosen_logp": float(better.logprobs.sum(dtype=np.float64)),
        "rejected_logp": float(worse.logprobs.sum(dtype=np.float64)),
    }


def score_report(scores: np.ndarray) -> dict[str, float]:
    """Mean score of a random and of the best finished sample, and the share left unscored."""
    finite = np.isfinite(scores)
    scored = finite.any(axis=1)
    best = np.where(finite, scores, -np.inf).max(axis=1)[scored]
    return {
        "score_mean": float(scores[finite].mean()) if finite.any() else 0.0,
        "score_best": float(best.mean()) if scored.any() else 0.0,
        "truncated": float(1.0 - finite.mean()),
    }
