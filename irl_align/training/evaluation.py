"""Evaluation of policies with gold metrics, each a stage. The loop never acts on these numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from irl_align.data.cards import Card, import_object
from irl_align.data.columns import by_prompt_key, column, prompts_of
from irl_align.data.decoding import decode_answers
from irl_align.data.rows import Prompt, prompt_text
from irl_align.data.splits import choose_prompts, data_checksum
from irl_align.policy.roles import DEMONSTRATIONS, Role
from irl_align.reward.distributed import spread
from irl_align.tasks.bleu import reference_metrics
from irl_align.tasks.gold import GoldMetric
from irl_align.training.context import RunContext
from irl_align.training.diagnostics import (
    of_all_tokens,
    temperature_of_entropy,
    vital_signs,
    vitals,
)
from irl_align.training.iteration import Iteration
from irl_align.training.run_folder import REBUILD
from irl_align.training.sampler import MissingSamples, PromptSamples
from irl_align.training.store import Stage
from irl_align.utils import distributed
from irl_align.utils.files import atomic_write, read_lines, to_lines


@dataclass(frozen=True)
class _Prompts:
    """The evaluation prompts that are answered."""

    rows: Dataset
    checksum: str
    limit: int | None
    """evaluation.prompts."""
    gold: str | None
    """Import path of the gold metric."""
    seen: frozenset[str]
    """Keys of the prompts that are in the training data as well."""
    card: Card
    """Card of the data."""

    @cached_property
    def by_key(self) -> dict[str, Prompt]:
        """Prompt key -> the prompt as it is in the data."""
        return dict(zip(column(self.rows, "prompt_key"), prompts_of(self.rows), strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """Part of the settings of every stage that evaluates."""
        settings: dict[str, Any] = {"gold": self.gold, "prompts": self.limit}
        if self.seen:
            settings["seen"] = data_checksum([{"keys": sorted(self.seen)}])
        return settings


def evaluate_policy(context: RunContext, iteration: Iteration) -> None:
    """Answer the evaluation prompts at every temperature, and report gold metrics, length and KL.

    The answers are saved in the run folder, with their rewards if there are any.
    """
    options, k, policy = context.recipe.evaluation, iteration.k, iteration.policy
    data = iteration.data
    keys = choose_prompts(data.evaluation["prompt_key"], options.prompts, context.recipe.seed)
    rows = data.evaluation.filter(lambda key: key in keys, input_columns="prompt_key")
    gold = data.card.gold if options.gold else None
    seen = frozenset(key for key, known in by_prompt_key(rows, "seen").items() if known)
    prompts = _Prompts(rows, data.checksums["evaluation"], options.prompts, gold, seen, data.card)
    if k == 0:
        _evaluate_demonstrations(context, prompts)
    # A selecting policy samples at its own temperature only.
    temperatures = options.temperatures[: 1 if policy.ranking is not None else None]
    drawn = dict[float, PromptSamples]()
    stages = dict[float, Stage]()
    for temperature in temperatures:
        sampling = context.sampler.sampling(1, temperature)
        drawn[temperature] = context.sampler.sample_rows(policy, rows, sampling, "evaluation")
        stages[temperature] = _evaluate_samples(
            context, iteration, prompts, temperature, drawn[temperature]
        )
    rewards = _rewards_of_answers(context, iteration, prompts, drawn)
    for temperature, stage in stages.items():
        if stage.missing:
            continue
        lines = list(read_lines(stage.path / "samples.jsonl", REBUILD))
        scored = rewards.get(temperature, [{}] * len(lines))
        answers = [{**line, **score} for line, score in zip(lines, scored, strict=True)]
        context.run.save_answers(k, temperature, answers)
    # The log-probs of a selecting policy's samples are not known, and so its entropy is not.
    if options.match_entropy and k > 0 and policy.ranking is None:
        _evaluate_at_entropy(context, iteration, prompts, stages[1.0])


def _evaluate_samples(
    context: RunContext,
    iteration: Iteration,
    prompts: _Prompts,
    temperature: float,
    drawn: PromptSamples,
) -> Stage:
    """Report on a policy's samples at one temperature, as a stage and a record of the metrics."""
    policy, initial = iteration.policy, iteration.initial
    sampling = context.sampler.sampling(1, temperature)
    unchanged = drawn
    if temperature == 1.0:
        unchanged = of_all_tokens(context, policy, prompts.rows, sampling, "evaluation", drawn)

    def build(work: Path) -> dict[str, Any]:
        if temperature == 1.0:
            report = vital_signs(context, policy, initial, drawn, unchanged)
        else:
            report = vitals(drawn.flat()[1])
            report = {name: report[name] for name in ("length", "truncated")}
        return {**report, **_gold_of_samples(context, work, prompts, drawn)}

    role = Role.evaluation(iteration.k, temperature)
    stage = context.stage(
        role,
        "evaluation",
        {**prompts.settings, "sampling": vars(sampling)},
        {"policy": policy.identity, "initial": initial.key, "data": prompts.checksum},
        build,
    )
    names = {"policy": iteration.k, "temperature": temperature, "gold": prompts.gold}
    context.log(role, {**names, **stage.metrics})
    return stage


def _evaluate_at_entropy(
    context: RunContext, iteration: Iteration, prompts: _Prompts, evaluated: Stage
) -> None:
    """Gold metrics of pi_0 at the temperature at which its entropy is that of pi_k at 1.

    evaluated: the evaluation of pi_k at temperature 1. The temperature is not known if it or the
    samples of pi_0 were only looked up and are missing; then 1 stands for it.
    """
    initial, sampler = iteration.initial, context.sampler

    def draw(temperature: float) -> PromptSamples:
        sampling = sampler.sampling(1, temperature)
        return sampler.sample_rows(initial, prompts.rows, sampling, "evaluation")

    def entropy_at(temperature: float) -> float:
        return vitals(draw(temperature).flat()[1])["entropy"]

    temperature = 1.0
    if not evaluated.missing:
        with suppress(MissingSamples):
            temperature = temperature_of_entropy(entropy_at, evaluated.metrics["entropy"])
    drawn = draw(temperature)
    stage = context.stage(
        Role.matched_entropy(iteration.k),
        "evaluation",
        {
            **prompts.settings,
            "sampling": vars(sampler.sampling(1, temperature)),
            "of": "initial",
        },
        {"initial": initial.key, "data": prompts.checksum},
        lambda work: _gold_of_samples(context, work, prompts, drawn),
    )
    if not stage.missing:
        matched = {"temperature": temperature, "entropy": entropy_at(temperature)}
        context.log(Role.matched_entropy(iteration.k), {**matched, **stage.metrics})


def _rewards_of_answers(
    context: RunContext,
    iteration: Iteration,
    prompts: _Prompts,
    drawn: Mapping[float, PromptSamples],
) -> dict[float, list[dict[str, float]]]:
    """Temperature -> {"reward": r} of each answer, in nats if the reward was made here.

    Empty without a reward, or if the reward is the policy's own log-ratio (SPIN).
    """
    reward = iteration.reward
    if reward is None or reward.kind == "implicit":
        return {}
    ids_of = by_prompt_key(prompts.rows, "prompt_ids")

    def build(work: Path) -> dict[str, Any]:
        flat = [
            (list(ids_of[key]), group[0].token_ids)
            for samples in drawn.values()
            for key, group in samples.by_key.items()
        ]
        scores = spread(context.models.load_reward(reward)).score_ids(
            [prompt for prompt, _ in flat], [ids for _, ids in flat]
        )
        return {"rewards": scores.tolist()}

    stage = context.stage(
        Role.evaluation_rewards(iteration.k),
        "evaluation-rewards",
        {
            "prompts": prompts.limit,
            "sampling": [vars(context.sampler.sampling(1, temperature)) for temperature in drawn],
        },
        {"policy": iteration.policy.identity, "reward": reward.key, "data": prompts.checksum},
        build,
    )
    if stage.missing:
        return {}
    values = iter(stage.metrics["rewards"])
    return {
        temperature: [{"reward": next(values)} for _ in samples.prompts]
        for temperature, samples in drawn.items()
    }


def _evaluate_demonstrations(context: RunContext, prompts: _Prompts) -> None:
    """Gold metrics of the evaluation split's demonstrations, for comparison."""
    rows = prompts.rows

    def build(work: Path) -> dict[str, Any]:
        texts, keys = column(rows, "completion"), column(rows, "prompt_key")
        length = float(np.mean([len(ids) for ids in column(rows, "completion_ids")]))
        # A demonstration is its own reference, so BLEU against itself would mean nothing.
        report = _gold(work, prompts, keys, texts, references=False)
        return {"length": length, "truncated": 0.0, **report}

    stage = context.stage(
        DEMONSTRATIONS,
        "evaluation",
        {**prompts.settings, "of": "demonstrations"},
        {"data": prompts.checksum},
        build,
        main_only=True,
    )
    context.log(DEMONSTRATIONS, {"gold": prompts.gold, **stage.metrics})


def _gold_of_samples(
    context: RunContext, work: Path, prompts: _Prompts, drawn: PromptSamples
) -> dict[str, Any]:
    """Gold metrics of the first sample of every prompt; only the main process computes them."""
    samples = drawn.by_key
    prompt_of = prompts.by_key
    answers = decode_answers(
        [prompt_of[key] for key in samples],
        [group[0].token_ids for group in samples.values()],
        context.tokenizer,
        prompts.card,
    )
    texts = [answer.text for answer in answers]
    return distributed.on_main(lambda: _gold(work, prompts, list(samples), texts))


def _gold(
    work: Path,
    prompts: _Prompts,
    keys: Sequence[str],
    texts: Sequence[str],
    references: bool = True,
) -> dict[str, Any]:
    """Gold metrics of one text per prompt key; the texts are written to work/samples.jsonl.

    references: the demonstrations are references; adds BLEU and chrF, also without a gold metric.
    If training has seen some of the prompts, `seen` and `unseen` have the metrics of each kind.
    """
    report, lines = _measured(prompts, keys, texts, references)
    if prompts.seen:
        lines = [
            {**line, "seen": key in prompts.seen} for key, line in zip(keys, lines, strict=True)
        ]
        for part, wanted in (("seen", True), ("unseen", False)):
            at = [i for i, key in enumerate(keys) if (key in prompts.seen) == wanted]
            if at:
                own, _ = _measured(
                    prompts, [keys[i] for i in at], [texts[i] for i in at], references
                )
                report[part] = {"prompts": len(at), "metrics": own.get("metrics", {})}
    atomic_write(work / "samples.jsonl", to_lines(lines))
    return report


def _measured(
    prompts: _Prompts, keys: Sequence[str], texts: Sequence[str], references: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gold metrics of one text per prompt key, and a line for each text with its own numbers."""
    rows = prompts.rows
    by_key: dict[str, list[str]] = {}
    prompt_of = prompts.by_key
    for key, completion in zip(column(rows, "prompt_key"), column(rows, "completion"), strict=True):
        by_key.setdefault(key, []).append(completion)
    lines: list[dict[str, Any]] = [
        {"prompt": prompt_of[key], "completion": text, "demonstrations": by_key[key]}
        for key, text in zip(keys, texts, strict=True)
    ]
    report: dict[str, Any] = {}
    if prompts.gold is not None:
        metric: GoldMetric = import_object(prompts.gold, "gold")
        result = metric(
            [prompt_text(prompt_of[key]) for key in keys],
            texts,
            [by_key[key] for key in keys] if references else [],
        )
        report = {
            "headline": metric.headline,
            "lower_is_better": metric.lower_is_better,
            "metrics": result.corpus,
        }
        lines = [{**line, **row} for line, row in zip(lines, result.rows, strict=True)]
    if references:
        gold = report.get("metrics", {})
        report["metrics"] = {**gold, **reference_metrics(texts, [by_key[k] for k in keys], gold)}
    return report, lines
