"""What is measured of every reward and policy, each a stage.

measure_reward and measure_policy use demonstrations alone, so the loop may act on them;
evaluate_policy looks at gold and is for reporting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.data.cards import import_object
from irl_align.data.columns import by_prompt_key, column
from irl_align.data.pairs import policy_pairs
from irl_align.data.splits import choose_prompts
from irl_align.data.tokenizer import decode_batch
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.samples import SampleSet
from irl_align.models.logprobs import best_of_n_kl_bound
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import DEMONSTRATIONS, PICK, Role
from irl_align.reward.audit import shortcut_audit, within_prompts
from irl_align.reward.distributed import spread
from irl_align.reward.fit import SIDES, margin_report, margins
from irl_align.reward.health import AUDITED
from irl_align.reward.protocol import RewardFunction
from irl_align.tasks.bleu import reference_metrics
from irl_align.tasks.gold import GoldMetric
from irl_align.training.context import RunContext
from irl_align.training.diagnostics import temperature_of_entropy, vitals
from irl_align.training.pair_step import IterationPairs, samples_by_key
from irl_align.training.prepare import Data
from irl_align.training.run_folder import REBUILD
from irl_align.training.store import Stage
from irl_align.utils import distributed
from irl_align.utils.files import atomic_write, read_lines, to_lines


def measure_reward(
    context: RunContext,
    k: int,
    reward: Reward,
    before: Reward | None,
    initial: Policy,
    pairs: Sequence[IterationPairs],
) -> dict[str, Any]:
    """Held-out accuracy, loss and calibration of r_k by source, its accuracy on older iterates'
    samples beside r_{k-1}'s (`before`), and the shortcut audit on the same pairs."""

    def of_source(rows: Dataset, source: str) -> Dataset:
        return rows.filter(lambda s: s == source, input_columns="source")

    def build(work: Path) -> dict[str, Any]:
        function = spread(context.load_reward(reward))
        latest = pairs[-1].held_out
        chosen, rejected = scores(function, latest)
        margin = reward.scale * (chosen - rejected)
        sources = np.asarray(latest["source"])
        older = {str(i): p.held_out for i, p in enumerate(pairs[:-1])}
        own = {i: margins(function, rows, reward.scale) for i, rows in older.items()}
        report: dict[str, Any] = {
            "held_out": margin_report(margin),
            "by_source": {
                str(source): margin_report(margin[torch.as_tensor(sources == source)])
                for source in sorted(set(sources))
            },
            "older": {i: margin_report(found) for i, found in own.items()},
        }
        if before is not None:
            function = spread(context.load_reward(before))
            past = {i: margins(function, rows, before.scale) for i, rows in older.items()}
            report["older_before"] = {i: margin_report(found) for i, found in past.items()}
            report["agreement"] = {i: correlation(own[i], past[i]) for i in older}
        policy_only = of_source(latest, AUDITED)
        audited = policy_only if len(policy_only) else latest
        logps = [
            context.logprobs(initial, audited[prompt], audited[completion])
            for prompt, completion in SIDES
        ]
        audit: dict[str, float | None] = {**shortcut_audit(audited, *logps)}
        audit["length_correlation"] = length_correlation(latest, rejected.numpy())
        return {**report, "audit": audit}

    inputs = {"reward": reward.key, "initial": initial.key}
    inputs |= {"before": before.key} if before is not None else {}
    inputs |= {f"pairs-{i}": p.key for i, p in enumerate(pairs)}
    stage = context.stage(Role.reward_report(k), "reward-report", {"iteration": k}, inputs, build)
    context.run.log(str(Role.reward(k)), stage.metrics)
    return stage.metrics


def correlation(one: torch.Tensor, two: torch.Tensor) -> float | None:
    """Pearson's, of (B,) numbers; None where one of them does not vary."""
    return within_prompts([""] * len(one), one.numpy(), two.numpy())


def length_correlation(pairs: Dataset, rejected: np.ndarray) -> float | None:
    """Correlation of reward and length among the policy's samples of a prompt.

    rejected: (B,) rewards of the pairs' rejected sides; each distinct sample counts once.
    """
    columns = (pairs[name] for name in ("source", "prompt_key", "rejected_ids"))
    samples = {
        (key, tuple(ids)): (float(score), len(ids))
        for (source, key, ids), score in zip(zip(*columns, strict=True), rejected, strict=True)
        if source == "demonstration/policy"
    }
    if not samples:
        return None
    found, lengths = zip(*samples.values(), strict=True)
    return within_prompts([key for key, _ in samples], found, lengths)


def measure_policy(
    context: RunContext, k: int, policy: Policy, initial: Policy, reward: Reward | None, data: Data
) -> dict[str, Any]:
    """Vital signs of pi_k on held-out prompts: samples at temperature 1, the demonstrations'
    log-prob, and how well the last reward tells demonstrations from these fresh samples."""
    keys = choose_prompts(
        column(data.held_out, "prompt_key"),
        context.recipe.evaluation.held_out_prompts,
        context.recipe.seed,
    )
    rows = data.held_out.filter(lambda key: key in keys, input_columns="prompt_key")
    sampling = context.sampling(context.recipe.generation.samples_per_prompt, 1.0)
    samples = samples_by_key(context, policy, rows, sampling, "held_out")

    def build(work: Path) -> dict[str, Any]:
        report = vital_signs(context, policy, initial, rows, samples)
        logps = context.logprobs(policy, column(rows, "prompt_ids"), column(rows, "completion_ids"))
        if policy.ranking is None:
            report["demonstration_logp"] = float(np.mean([logp.sum() for logp in logps]))
        # An implicit reward is pi_k's own log-ratio, which its own samples raise by construction.
        if reward is not None and reward.kind == "explicit":
            report |= fresh_report(context, reward, rows, samples)
            # The proxy's gain over pi_0 on the same prompts, in its own unit: a demonstration's
            # standard deviation.
            first = samples_by_key(context, initial, rows, sampling, "held_out")
            report["reward_gain"] = report["reward_score"] - mean_score(
                context, reward, rows, first
            )
        return report

    inputs = {"policy": policy.identity, "initial": initial.key, "data": data.checksums["held_out"]}
    inputs |= {"reward": reward.key} if reward is not None else {}
    settings = {"prompts": len(keys), "sampling": vars(sampling)}
    stage = context.stage(Role.vitals(k), "vitals", settings, inputs, build)
    context.run.log(str(Role.vitals(k)), stage.metrics)
    return stage.metrics


def vital_signs(
    context: RunContext,
    policy: Policy,
    initial: Policy,
    rows: Dataset,
    samples: dict[str, list[Completion]],
) -> dict[str, Any]:
    """evaluate.vitals of samples by prompt key; for a selecting policy KL is its upper bound."""
    prompts = by_prompt_key(rows, "prompt_ids")
    sample_set = SampleSet([list(prompts[key]) for key in samples], list(samples.values()))
    if policy.ranking is not None:
        # The log-prob of a selected sample is not known; KL(best-of-n || pi) has a bound.
        report = {
            name: value
            for name, value in vitals(sample_set, None).items()
            if name not in ("entropy", "kl")
        }
        if policy.key == initial.key:
            report["kl_bound"] = best_of_n_kl_bound(policy.ranking.n)
        return report
    flat_prompts, completions = sample_set.flat()
    ids = [completion.token_ids for completion in completions]
    own = None if context.sampling(1, 1.0).plain else context.logprobs(policy, flat_prompts, ids)
    return vitals(sample_set, context.logprobs(initial, flat_prompts, ids), own)


def fresh_report(
    context: RunContext, reward: Reward, rows: Dataset, samples: dict[str, list[Completion]]
) -> dict[str, float]:
    """Share of held-out pairs (demonstration, fresh sample) that the reward gets right, and the
    samples' mean reward."""
    pairs = policy_pairs(
        rows,
        samples,
        iteration=0,
        generator="",
        sampling=context.sampling(1, 1.0),
        truncated="keep",
    )
    chosen, rejected = scores(spread(context.load_reward(reward)), pairs.rows)
    accuracy = margin_report(reward.scale * (chosen - rejected))["accuracy"]
    return {"fresh_accuracy": accuracy, "reward_score": float(rejected.double().mean())}


def mean_score(
    context: RunContext, reward: Reward, rows: Dataset, samples: dict[str, list[Completion]]
) -> float:
    """Mean reward of samples by prompt key."""
    prompts = by_prompt_key(rows, "prompt_ids")
    flat = [(list(prompts[key]), c.token_ids) for key, group in samples.items() for c in group]
    found = spread(context.load_reward(reward)).score_ids(
        [p for p, _ in flat], [ids for _, ids in flat]
    )
    return float(found.double().mean())


def scores(reward: RewardFunction, pairs: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the preferred and of the rejected sides: (B,) each."""
    chosen, rejected = (reward.score_ids(pairs[p], pairs[c]) for p, c in SIDES)
    return chosen, rejected


def nearest_policy(
    context: RunContext, policies: Sequence[Policy], reward: Reward, data: Data
) -> Policy:
    """The iterate whose held-out samples the last reward tells least from demonstrations."""
    sampling = context.sampling(context.recipe.generation.samples_per_prompt, 1.0)
    rows = data.held_out
    drawn = [samples_by_key(context, policy, rows, sampling, "held_out") for policy in policies]

    def build(work: Path) -> dict[str, Any]:
        found = [fresh_report(context, reward, rows, samples) for samples in drawn]
        return {"accuracy": [one["fresh_accuracy"] for one in found]}

    inputs = {f"policy-{i}": policy.identity for i, policy in enumerate(policies)}
    stage = context.stage(PICK, "pick", {}, {**inputs, "reward": reward.key}, build)
    context.run.log(str(PICK), stage.metrics)
    distance = [abs(accuracy - 0.5) for accuracy in stage.metrics["accuracy"]]
    return policies[int(np.argmin(distance))]


def evaluate_policy(
    context: RunContext, k: int, policy: Policy, initial: Policy, reward: Reward | None, data: Data
) -> None:
    """Answer the evaluation prompts at every temperature; gold, length and KL, for reporting.

    Of a policy that came of an explicit reward, the reward of every answer is kept beside it.
    """
    options = context.recipe.evaluation
    rows = _evaluation_rows(context, data)
    gold_path = data.card.gold if options.gold else None
    if k == 0:
        _evaluate_demonstrations(context, rows, gold_path, data)
    found: dict[float, dict[str, Any]] = {}
    drawn: dict[float, dict[str, list[Completion]]] = {}
    told: dict[float, list[dict[str, Any]]] = {}
    for temperature in options.temperatures:
        if policy.ranking is not None and temperature != options.temperatures[0]:
            continue  # a selecting policy samples at its own temperature
        sampling = context.sampling(1, temperature)
        drawn[temperature] = samples_by_key(context, policy, rows, sampling, "evaluation")
        stage = _evaluate_samples(
            context, k, policy, initial, rows, sampling, drawn[temperature], gold_path, data
        )
        found[temperature] = stage.metrics
        told[temperature] = list(read_lines(stage.path / "samples.jsonl", REBUILD))
    rewards = _rewards_of_answers(context, k, policy, reward, rows, drawn, data)
    for temperature, lines in told.items():
        known = rewards.get(temperature, [{}] * len(lines))
        both = [{**line, **value} for line, value in zip(lines, known, strict=True)]
        context.run.save_answers(k, temperature, both)
    # What a selecting policy gives a sample is not known, so neither is its entropy.
    if options.match_entropy and k > 0 and policy.ranking is None:
        _evaluate_at_entropy(context, k, found[1.0]["entropy"], initial, rows, data)


def _evaluate_samples(
    context: RunContext,
    k: int,
    policy: Policy,
    initial: Policy,
    rows: Dataset,
    sampling: Sampling,
    samples: dict[str, list[Completion]],
    gold_path: str | None,
    data: Data,
) -> Stage:
    """What a policy's samples at one temperature come to, as a stage and a line of the metrics."""
    temperature = sampling.temperature

    def build(work: Path) -> dict[str, Any]:
        if temperature == 1.0:
            report = vital_signs(context, policy, initial, rows, samples)
        else:
            flat = [group[0] for group in samples.values()]
            report = {
                "length": float(np.mean([len(c.token_ids) for c in flat])),
                "truncated": float(np.mean([c.truncated for c in flat])),
            }
        texts = decode_batch(context.tokenizer, [group[0].token_ids for group in samples.values()])
        gold = distributed.on_main(lambda: _gold(work, gold_path, rows, list(samples), texts))
        return {**report, **gold}

    role = Role.evaluation(k, temperature)
    stage = context.stage(
        role,
        "evaluation",
        {
            "gold": gold_path,
            "sampling": vars(sampling),
            "prompts": context.recipe.evaluation.prompts,
        },
        {
            "policy": policy.identity,
            "initial": initial.key,
            "data": data.checksums["evaluation"],
        },
        build,
    )
    record = {"policy": k, "temperature": temperature, "gold": gold_path, **stage.metrics}
    context.run.log(str(role), record)
    return stage


def _evaluate_at_entropy(
    context: RunContext, k: int, entropy: float, initial: Policy, rows: Dataset, data: Data
) -> None:
    """Gold of pi_0 at the temperature at which its samples' entropy is that of pi_k's at 1."""

    def draw(temperature: float) -> dict[str, list[Completion]]:
        return samples_by_key(
            context, initial, rows, context.sampling(1, temperature), "evaluation"
        )

    def entropy_at(temperature: float) -> float:
        groups = draw(temperature)
        return vitals(SampleSet([[]] * len(groups), list(groups.values())), None)["entropy"]

    temperature = temperature_of_entropy(entropy_at, entropy)
    samples = draw(temperature)
    gold_path = data.card.gold

    def build(work: Path) -> dict[str, Any]:
        texts = decode_batch(context.tokenizer, [group[0].token_ids for group in samples.values()])
        return distributed.on_main(lambda: _gold(work, gold_path, rows, list(samples), texts))

    stage = context.stage(
        Role.matched_entropy(k),
        "evaluation",
        {
            "gold": gold_path,
            "sampling": vars(context.sampling(1, temperature)),
            "prompts": context.recipe.evaluation.prompts,
            "of": "initial",
        },
        {"initial": initial.key, "data": data.checksums["evaluation"]},
        build,
    )
    found = {"temperature": temperature, "entropy": entropy_at(temperature)}
    context.run.log(str(Role.matched_entropy(k)), {**found, **stage.metrics})


def _rewards_of_answers(
    context: RunContext,
    k: int,
    policy: Policy,
    reward: Reward | None,
    rows: Dataset,
    drawn: Mapping[float, dict[str, list[Completion]]],
    data: Data,
) -> dict[float, list[dict[str, float]]]:
    """Temperature -> {"reward": r} of each answer, by an explicit reward (one fitted here has the
    units of a demonstration's deviation); empty without."""
    if reward is None or reward.kind != "explicit":
        return {}
    prompts = by_prompt_key(rows, "prompt_ids")

    def build(work: Path) -> dict[str, Any]:
        flat = [(list(prompts[key]), group[0]) for d in drawn.values() for key, group in d.items()]
        ids = [completion.token_ids for _, completion in flat]
        found = spread(context.load_reward(reward)).score_ids([prompt for prompt, _ in flat], ids)
        return {"rewards": found.tolist()}

    stage = context.stage(
        Role.evaluation_rewards(k),
        "evaluation-rewards",
        {
            "prompts": context.recipe.evaluation.prompts,
            "sampling": [vars(context.sampling(1, temperature)) for temperature in drawn],
        },
        {"policy": policy.identity, "reward": reward.key, "data": data.checksums["evaluation"]},
        build,
    )
    values = iter(stage.metrics["rewards"])
    return {
        temperature: [{"reward": next(values)} for _ in by_key]
        for temperature, by_key in drawn.items()
    }


def _evaluation_rows(context: RunContext, data: Data) -> Dataset:
    """The rows of the prompts that are answered."""
    options = context.recipe.evaluation
    keys = choose_prompts(data.evaluation["prompt_key"], options.prompts, context.recipe.seed)
    return data.evaluation.filter(lambda key: key in keys, input_columns="prompt_key")


def _evaluate_demonstrations(
    context: RunContext, rows: Dataset, gold_path: str | None, data: Data
) -> None:
    """The demonstrations of the evaluation split judged by the same gold, as a row to compare."""

    def build(work: Path) -> dict[str, Any]:
        texts, keys = column(rows, "completion"), column(rows, "prompt_key")
        length = float(np.mean([len(ids) for ids in column(rows, "completion_ids")]))
        # A demonstration is its own reference: BLEU against itself says nothing.
        report = _gold(work, gold_path, rows, keys, texts, references=False)
        return {"length": length, "truncated": 0.0, **report}

    stage = context.stage(
        DEMONSTRATIONS,
        "evaluation",
        {"gold": gold_path, "of": "demonstrations", "prompts": context.recipe.evaluation.prompts},
        {"data": data.checksums["evaluation"]},
        build,
        alone=True,
    )
    context.run.log(str(DEMONSTRATIONS), {"gold": gold_path, **stage.metrics})


def _gold(
    work: Path,
    gold_path: str | None,
    rows: Dataset,
    keys: Sequence[str],
    texts: Sequence[str],
    references: bool = True,
) -> dict[str, Any]:
    """Gold metrics of completions (one text per prompt key), BLEU and chrF, the demonstrations
    being the references; the texts are written to work/samples.jsonl."""
    by_key: dict[str, list[str]] = {}
    prompts = by_prompt_key(rows, "prompt")
    for key, completion in zip(column(rows, "prompt_key"), column(rows, "completion"), strict=True):
        by_key.setdefault(key, []).append(completion)
    lines: list[dict[str, Any]] = [
        {"prompt": prompts[key], "completion": text, "demonstrations": by_key[key]}
        for key, text in zip(keys, texts, strict=True)
    ]
    report: dict[str, Any] = {}
    if gold_path is not None:
        metric: GoldMetric = import_object(gold_path, "gold")
        result = metric(
            [prompts[key] for key in keys],
            texts,
            [by_key[key] for key in keys] if references else [],
        )
        report = {
            "headline": metric.headline,
            "lower_is_better": metric.lower_is_better,
            "metrics": result.corpus,
        }
        lines = [{**line, **row} for line, row in zip(lines, result.rows, strict=True)]
    if references:  # BLEU and chrF, also where a card names no gold
        known = report.get("metrics", {})
        found = reference_metrics(texts, [by_key[key] for key in keys], known)
        report["metrics"] = {**known, **found}
    atomic_write(work / "samples.jsonl", to_lines(lines))
    return report
