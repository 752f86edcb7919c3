"""Measurements of rewards and policies on demonstrations only, each a stage.

The loop may act on these numbers: stop, or pick a policy. Gold metrics are in
:mod:`irl_align.training.evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.optimize import brentq

from irl_align.data.columns import column
from irl_align.data.splits import choose_prompts
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.logprobs import best_of_n_kl_bound
from irl_align.models.packing import Ids
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import PICK, Role
from irl_align.reward.audit import shortcut_audit, within_prompts
from irl_align.reward.composed import RewardEnsemble, part_scores
from irl_align.reward.distributed import spread
from irl_align.reward.fit import SIDES, margin_report, margins, offsets_of, side_rewards
from irl_align.reward.health import AUDITED
from irl_align.reward.losses import pair_logits
from irl_align.reward.model import RewardModel
from irl_align.reward.outliers import outlier_share
from irl_align.reward.protocol import RewardFunction
from irl_align.reward.two_sample import (
    BLOCKS,
    fresh_pairs,
    identical,
    pooled_states,
    text_features,
    two_sample_accuracy,
)
from irl_align.training.context import RunContext
from irl_align.training.iteration import Data, Iteration
from irl_align.training.pair_step import IterationPairs
from irl_align.training.sampler import PromptSamples
from irl_align.utils import distributed


def measure_reward(
    context: RunContext, iteration: Iteration, reward: Reward, pairs: Sequence[IterationPairs]
) -> dict[str, Any]:
    """Accuracy, loss and calibration of r_k on held-out pairs by source, and the shortcut audit.

    These are of what was fitted, without the user's functions. On the pairs of older iterations r_k
    is compared with r_{k-1}, which is iteration.reward.
    """
    k, initial, reward = iteration.k, iteration.initial, reward.learned
    before = None if iteration.reward is None else iteration.reward.learned

    def build(work: Path) -> dict[str, Any]:
        function = spread(context.models.load_reward(reward))
        latest = pairs[-1].held_out
        chosen, rejected = side_rewards(function, latest)
        margin = pair_logits(chosen, rejected, offsets_of(latest), reward.logit_beta)
        sources, keys = (np.asarray(latest[name]) for name in ("source", "prompt_key"))
        report: dict[str, Any] = {
            "held_out": margin_report(margin, keys.tolist()),
            "by_source": {
                str(source): margin_report(
                    margin[torch.as_tensor(sources == source)], keys[sources == source].tolist()
                )
                for source in sorted(set(sources))
            },
            **_older_report(context, function, reward, before, pairs[:-1]),
        }
        policy_only = latest.filter(lambda s: s == AUDITED, input_columns="source")
        audited = policy_only if len(policy_only) else latest
        logps = [
            context.models.logprobs(initial, audited[prompt], audited[completion])
            for prompt, completion in SIDES
        ]
        audit = shortcut_audit(audited, *logps)
        audit["length_correlation"] = length_correlation(latest, chosen.numpy(), rejected.numpy())
        return {**report, "audit": audit}

    inputs = {"reward": reward.key, "initial": initial.key}
    inputs |= {"before": before.key} if before is not None else {}
    inputs |= {f"pairs-{i}": p.key for i, p in enumerate(pairs)}
    role = Role.reward_report(k)
    stage = context.stage(role, "reward-report", {"iteration": k}, inputs, build)
    context.log(Role.reward(k), stage.metrics)
    return stage.metrics


def _older_report(
    context: RunContext,
    function: RewardFunction,
    reward: Reward,
    before: Reward | None,
    pairs: Sequence[IterationPairs],
) -> dict[str, Any]:
    """Reports on the held-out pairs of older iterations, of r_k (`function`) and of r_{k-1}."""
    older = {str(i): p.held_out for i, p in enumerate(pairs)}
    keys = {i: column(rows, "prompt_key") for i, rows in older.items()}
    own = {i: margins(function, rows, reward.logit_beta) for i, rows in older.items()}
    report: dict[str, Any] = {"older": {i: margin_report(own[i], keys[i]) for i in older}}
    if before is not None:
        function = spread(context.models.load_reward(before))
        past = {i: margins(function, rows, before.logit_beta) for i, rows in older.items()}
        report["older_before"] = {i: margin_report(past[i], keys[i]) for i in older}
        report["agreement"] = {i: _correlation(own[i], past[i]) for i in older}
    return report


def _correlation(one: torch.Tensor, two: torch.Tensor) -> float | None:
    """Pearson's correlation of (B,) numbers; None if one of them does not vary."""
    return within_prompts([""] * len(one), one.numpy(), two.numpy())


def length_correlation(pairs: Dataset, chosen: np.ndarray, rejected: np.ndarray) -> float | None:
    """Correlation of reward and length among the policy's samples of a prompt.

    chosen, rejected: (B,) rewards of the pairs' sides. Each distinct sample counts once. If no
    prompt has two, it is Pearson's correlation of the differences demonstration - sample in reward
    and length over pairs: with r = a(prompt) + g(side) + b length + noise the difference removes a,
    and subtracting the mean difference removes g(demonstration) - g(sample).
    """
    columns = (pairs[name] for name in ("source", "prompt_key", "chosen_ids", "rejected_ids"))
    samples, differences = dict[Any, Any](), dict[Any, Any]()
    for (source, key, one, two), high, low in zip(
        zip(*columns, strict=True), chosen, rejected, strict=True
    ):
        if source == AUDITED:
            samples[key, tuple(two)] = float(low), len(two)
            pair = key, tuple(one), tuple(two)
            differences[pair] = float(high - low), len(one) - len(two)
    if not samples:
        return None
    own = within_prompts([key for key, _ in samples], *zip(*samples.values(), strict=True))
    if own is not None:
        return own
    return within_prompts([""] * len(differences), *zip(*differences.values(), strict=True))


def measure_policy(context: RunContext, iteration: Iteration) -> dict[str, Any]:
    """Vital signs of pi_k on held-out prompts, sampled at temperature 1.

    Also how well a fresh discriminator distinguishes demonstrations from these samples, and, unless
    the reward is the policy itself, how well the reward does, its mean by part, and the share of
    samples that are outliers to it.
    """
    policy, initial, reward = iteration.policy, iteration.initial, iteration.reward
    data, models = iteration.data, context.models
    keys = choose_prompts(
        column(data.held_out, "prompt_key"),
        context.recipe.evaluation.held_out_prompts,
        context.recipe.seed,
    )
    rows = data.held_out.filter(lambda key: key in keys, input_columns="prompt_key")
    sampling = context.sampler.sampling(context.recipe.generation.samples_per_prompt, 1.0)
    drawn = context.sampler.sample_rows(policy, rows, sampling, "held_out")
    unchanged = of_all_tokens(context, policy, rows, sampling, "held_out", drawn)
    # An implicit reward is pi_k's own log-ratio, which its own samples raise by construction.
    judge = reward if reward is not None and reward.kind != "implicit" else None
    if judge is not None:  # asked for here, so that a run links them also where it reuses this
        drawn_first = context.sampler.sample_rows(initial, rows, sampling, "held_out")

    def build(work: Path) -> dict[str, Any]:
        report = vital_signs(context, policy, initial, drawn, unchanged)
        logps = models.logprobs(policy, column(rows, "prompt_ids"), column(rows, "completion_ids"))
        if policy.ranking is None:
            report["demonstration_logp"] = float(np.mean([logp.sum() for logp in logps]))
        pairs = fresh_pairs(rows, drawn.by_key, sampling.max_new_tokens)
        report["two_sample"] = _two_sample_report(context, initial, pairs)
        if judge is not None:
            if judge.kind != "functions":  # which need not prefer demonstrations
                report |= _fresh_report(context, judge, pairs)
            # The proxy's gain over pi_0 on the same prompts, in nats.
            score, start = (_mean_scores(context, judge, s) for s in (drawn, drawn_first))
            gain = score["reward"] - start["reward"]
            report |= {"reward_score": score.pop("reward"), "reward_gain": gain}
            report |= {"reward_parts": score} if score else {}
            report |= _outliers(context, judge, drawn_first, drawn)
        return report

    inputs = {"policy": policy.identity, "initial": initial.key, "data": data.checksums["held_out"]}
    inputs |= {"reward": reward.key} if reward is not None else {}
    settings = {"prompts": len(keys), "sampling": vars(sampling), "two_sample": BLOCKS}
    role = Role.vitals(iteration.k)
    stage = context.stage(role, "vitals", settings, inputs, build)
    context.log(role, stage.metrics)
    return stage.metrics


def of_all_tokens(
    context: RunContext,
    policy: Policy,
    rows: Dataset,
    sampling: Sampling,
    use: str,
    drawn: PromptSamples,
) -> PromptSamples:
    """Samples of the policy's own distribution: `drawn` unless top-p or top-k changed it.

    A KL is a mean over them, and their log-probs are the policy's.
    """
    if policy.ranking is not None or sampling == sampling.all_tokens:
        return drawn
    return context.sampler.sample_rows(policy, rows, sampling.all_tokens, f"{use}-all-tokens")


def vital_signs(
    context: RunContext,
    policy: Policy,
    initial: Policy,
    drawn: PromptSamples,
    unchanged: PromptSamples,
) -> dict[str, Any]:
    """``vitals`` of samples drawn at temperature 1; KL of a selecting policy is an upper bound.

    unchanged: samples from :func:`of_all_tokens`, for the KL.
    """
    report: dict[str, Any] = vitals(drawn.flat()[1])
    if policy.ranking is not None:
        # The log-prob of a selected sample is not known; KL(best-of-n || pi) has a bound.
        del report["entropy"]
        if policy.key == initial.key:
            report["kl_bound"] = best_of_n_kl_bound(policy.ranking.n)
        return report
    prompts, completions = unchanged.flat()
    ids = [completion.sampled_ids for completion in completions]
    reference = context.models.logprobs(initial, prompts, ids)
    return report | kl_report([c.logprobs for c in completions], reference)


def _fresh_report(context: RunContext, reward: Reward, pairs: Dataset) -> dict[str, Any]:
    """Report of the reward on pairs (held-out demonstration, fresh sample), and its accuracy."""
    function = spread(context.models.load_reward(reward))
    margin = margins(function, pairs, reward.logit_beta)
    margin[torch.as_tensor(identical(pairs))] = 0.0  # also where batches round differently
    report = margin_report(margin, column(pairs, "prompt_key"))
    return {"fresh": report, "fresh_accuracy": report["accuracy"]}


def _two_sample_report(context: RunContext, initial: Policy, pairs: Dataset) -> dict[str, Any]:
    """Accuracy of a discriminator on features of pi_0, on pairs (demonstration, fresh sample)."""
    model = context.models.load_policy(initial.path)
    sides = []
    for side in SIDES:
        prompts, completions = (column(pairs, name) for name in side)
        states = distributed.over_sequences(
            lambda p, c: pooled_states(model, p, c), prompts, completions
        )
        logps = context.models.logprobs(initial, prompts, completions)
        sides.append(text_features(states, logps))
    same = identical(pairs)
    differences = np.where(same[:, None], 0.0, sides[0] - sides[1])
    counts = {
        "identical": int(same.sum()),
        "truncated": int(np.sum(column(pairs, "rejected_truncated"))),
    }
    share = two_sample_accuracy(differences, column(pairs, "prompt_key"))
    if share is None:
        return counts
    report = {"pairs": share.n, "prompts": share.clusters, "accuracy": share.mean}
    return {**counts, **report, "accuracy_interval": [share.low, share.high]}


def _mean_scores(context: RunContext, reward: Reward, drawn: PromptSamples) -> dict[str, float]:
    """Mean `reward` of samples, and of its parts: see `part_scores`."""
    function = context.models.load_reward(reward)

    def work(prompts: Ids, completions: Ids) -> list[dict[str, float]]:
        parts = part_scores(function, prompts, completions)
        rows = torch.stack(list(parts.values()), 1).tolist()
        return [dict(zip(parts, row, strict=True)) for row in rows]

    prompts, completions = drawn.flat()
    scores = distributed.over_sequences(work, prompts, [c.token_ids for c in completions])
    return {name: math.fsum(row[name] for row in scores) / len(scores) for name in scores[0]}


def _outliers(
    context: RunContext, reward: Reward, first: PromptSamples, now: PromptSamples
) -> dict[str, Any]:
    """Share of a policy's samples that are outliers among pi_0's to a reward; {} if too few.

    Only of a learned reward of this project, whose hidden states are read; of an ensemble of
    models, those of the first.
    """
    if reward.kind == "functions":
        return {}
    function = context.models.load_reward(reward.learned)
    function = function.members[0] if isinstance(function, RewardEnsemble) else function
    if not isinstance(function, RewardModel):
        return {}

    def pooled(prompts: Ids, completions: Ids) -> Sequence[np.ndarray]:
        return list(function.pooled_ids(prompts, completions).numpy())

    states, keys = [], []
    for drawn in (first, now):
        prompts, completions = drawn.flat()
        ids = [completion.token_ids for completion in completions]
        rows = distributed.over_sequences(pooled, prompts, ids)
        states.append(np.stack(rows))
        keys.append([key for key, group in drawn.by_key.items() for _ in group])
    share = outlier_share(states[0], states[1], keys[0], keys[1])
    if share is None:
        return {}
    return {"outliers": share.mean, "outliers_interval": [share.low, share.high]}


def nearest_policy(
    context: RunContext, reward: Reward, policies: Sequence[Policy], data: Data
) -> Policy:
    """The policy whose held-out samples the last reward tells least from demonstrations."""
    sampler, rows = context.sampler, data.held_out
    sampling = sampler.sampling(context.recipe.generation.samples_per_prompt, 1.0)
    drawn = [sampler.sample_rows(policy, rows, sampling, "held_out") for policy in policies]

    def build(work: Path) -> dict[str, Any]:
        most = sampling.max_new_tokens
        pairs = [fresh_pairs(rows, samples.by_key, most) for samples in drawn]
        reports = [_fresh_report(context, reward, own) for own in pairs]
        return {"accuracy": [report["fresh_accuracy"] for report in reports]}

    inputs = {f"policy-{i}": policy.identity for i, policy in enumerate(policies)}
    stage = context.stage(PICK, "pick", {"ties": "half"}, {**inputs, "reward": reward.key}, build)
    context.log(PICK, stage.metrics)
    if stage.missing:
        return policies[-1]
    distance = [abs(accuracy - 0.5) for accuracy in stage.metrics["accuracy"]]
    return policies[int(np.argmin(distance))]


def vitals(completions: Sequence[Completion]) -> dict[str, float]:
    """Number, length, truncation and entropy of samples.

    Entropy is the mean of -log q per token, in nats, of the distribution q that was sampled from,
    top-p and top-k included.
    """
    tokens = sum(len(c.token_ids) for c in completions)
    return {
        "samples": float(len(completions)),
        "length": tokens / len(completions),
        "truncated": float(np.mean([c.truncated for c in completions])),
        "entropy": -math.fsum(float(c.logprobs.sum(dtype=np.float64)) for c in completions)
        / tokens,
    }


def kl_report(own: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, float]:
    """KL(pi || pi_0) per completion in nats, with its standard error, from samples of pi.

    own, reference: log-probs of their tokens under pi and pi_0, an array (T,) per sample. The KL is
    the mean of log pi(y) / pi_0(y) (k1), which is unbiased only for samples of pi itself.
    """
    ratio = np.array(
        [
            mine.sum(dtype=np.float64) - theirs.sum(dtype=np.float64)
            for mine, theirs in zip(own, reference, strict=True)
        ]
    )
    error = ratio.std(ddof=1) / math.sqrt(len(ratio)) if len(ratio) > 1 else 0.0
    return {"kl": float(ratio.mean()), "kl_se": float(error)}


def temperature_of_entropy(
    entropy_at: Callable[[float], float],
    entropy: float,
    between: tuple[float, float] = (0.1, 2.0),
    to: float = 0.01,
) -> float:
    """The temperature at which samples have this entropy per token, rounded to a multiple of `to`.

    entropy_at: entropy of the sampling distribution at a temperature; it rises with the
    temperature. An entropy outside the range gets the nearer end of `between`. Rounding lets runs
    with nearly the same entropy share their samples.
    """
    low, high = between
    if entropy_at(1.0) >= entropy:
        high = 1.0
    else:
        low = 1.0
    if entropy_at(low) >= entropy:
        return low
    if entropy_at(high) <= entropy:
        return high
    steps = {"xtol": to / 2, "rtol": 1e-3}
    root = brentq(lambda t: entropy_at(round(round(t / to) * to, 6)) - entropy, low, high, **steps)
    return round(round(float(root) / to) * to, 6)
