"""The loop's pairs: every demonstration beside samples of pi_k, as a stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from irl_align.config.reward import PairSource
from irl_align.data.cards import import_object
from irl_align.data.columns import by_prompt_key
from irl_align.data.contrast import contrast_pairs
from irl_align.data.encoding import encode_prompts
from irl_align.data.pairs import Pairs, load_pairs, policy_pairs, sample_pairs, save_pairs, stats
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.policy import Policy
from irl_align.policy.roles import Role
from irl_align.training.context import RunContext
from irl_align.training.prepare import Data

logger = logging.getLogger(__name__)
USES = {"train": "reward", "held_out": "held_out"}
"""Part of a set of pairs -> the demonstrations that it is made of."""


@dataclass(frozen=True)
class IterationPairs:
    """Pairs of one iteration: what the reward is fitted on, and held-out ones to judge it by."""

    key: str
    train: Dataset
    held_out: Dataset


def make_pairs(
    context: RunContext, k: int, policy: Policy, initial: Policy, start: Policy, data: Data
) -> IterationPairs:
    """Sample y_hat ~ pi_k and pair every demonstration with a sample (and the recipe's extras)."""
    options = context.recipe.pairs
    generation = context.recipe.generation
    if generation.temperature == 0:
        logger.warning("generation.temperature is 0: greedy negatives, all the same per prompt")
    sampling = context.sampling(generation.samples_per_prompt, generation.temperature)
    used = {side for source in options.sources for side in source.split("/")}
    samplers = {"policy": policy, "init": start, "sft": initial}
    samplers = {name: samplers[name] for name in sorted(used & set(samplers))}
    drawn = {
        part: {
            name: samples_by_key(context, sampler, getattr(data, use), sampling, part)
            for name, sampler in samplers.items()
        }
        for part, use in USES.items()
    }

    alike = {"window"}
    # An option that came later and is left alone: stages from before it are still the same.
    alike |= {"contrast_edits"} if options.contrast_edits == 1 else set()
    alike |= set() if options.contrast_crossed else {"contrast_crossed"}

    def build(work: Path) -> dict[str, Any]:
        metrics = {}
        for part in USES:
            making = _Making(context, k, data, part, samplers, drawn[part], sampling)
            made = [making.pairs(source) for source in options.sources]
            dropped: Counter[str] = Counter()
            for some in made:
                dropped.update(some.dropped)
            rows = concatenate_datasets([some.rows for some in made])
            save_pairs(rows, work / f"{part}.parquet")
            metrics[part] = stats(rows, dropped)
        return metrics

    edit, role = context.recipe.data.edit, Role.pairs(k)
    stage = context.stage(
        role,
        "pairs",
        {
            "iteration": k,
            "pairs": options.model_dump(exclude=alike),
            "sampling": vars(sampling),
            **({"edit": edit} if edit is not None else {}),
        },
        {
            **{part: data.checksums[use] for part, use in USES.items()},
            **{name: sampler.identity for name, sampler in samplers.items()},
        },
        build,
        alone=True,
    )
    context.run.log(str(role), stage.metrics)
    train, held_out = (load_pairs(stage.path / f"{part}.parquet") for part in USES)
    return IterationPairs(stage.key, train, held_out)


@dataclass(frozen=True)
class _Making:
    """What pairs of one part (train or held_out) are made of."""

    context: RunContext
    k: int
    data: Data
    part: str
    samplers: Mapping[str, Policy]
    drawn: Mapping[str, Mapping[str, list[Completion]]]
    sampling: Sampling

    def pairs(self, source: PairSource) -> Pairs:
        """Pairs of one source of the recipe, as "demonstration/policy"."""
        chosen, rejected = source.split("/")
        rows: Dataset = getattr(self.data, USES[self.part])
        if rejected == "contrast":
            return self._contrast(rows)
        options = self.context.recipe.pairs
        common: dict[str, Any] = {
            "iteration": self.k,
            "seed": self.context.recipe.seed,
            "source": source,
            "generator": self.samplers[rejected].identity,
            "sampling": drawn_as(self.samplers[rejected], self.sampling),
            "truncated": options.truncated,
        }
        samples = self.drawn[rejected]
        if chosen == "demonstration":
            limit = options.demonstrations_per_prompt
            return policy_pairs(rows, samples, demonstrations_per_prompt=limit, **common)
        prompts = by_prompt_key(rows, "prompt_ids")
        return sample_pairs(prompts, self.drawn[chosen], samples, **common)

    def _contrast(self, rows: Dataset) -> Pairs:
        options, card = self.context.recipe.pairs, self.data.card
        return contrast_pairs(
            rows,
            options.contrast,
            per_demonstration=options.contrast_per_demonstration,
            edits=options.contrast_edits,
            crossed=options.contrast_crossed,
            iteration=self.k,
            seed=self.context.recipe.seed,
            edit=import_object(card.edit, "edit") if card.edit else None,
            encode=lambda texts: encode_prompts(texts, self.context.tokenizer, card),
            context=self.data.context,
        )


@dataclass(frozen=True)
class Selected:
    """How the samples of a selecting policy were drawn; what it gives them is not known."""

    temperature: float
    plain: bool = False


def drawn_as(sampler: Policy, sampling: Sampling) -> Sampling | Selected:
    """What a policy's samples are of: a selecting one draws at its own temperature."""
    return sampling if sampler.ranking is None else Selected(sampler.ranking.temperature)


def samples_by_key(
    context: RunContext, policy: Policy, rows: Dataset, sampling: Sampling, role: str
) -> dict[str, list[Completion]]:
    """Samples of every distinct prompt of these rows, by prompt key."""
    prompts = by_prompt_key(rows, "prompt_ids")
    samples = context.sample(policy, list(prompts.values()), sampling, role)
    return dict(zip(prompts, samples.completions, strict=True))
