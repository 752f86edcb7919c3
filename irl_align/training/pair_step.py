"""The loop's pairs: every demonstration with samples of pi_k, as a stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from irl_align.config.reward import PairSource
from irl_align.data.cards import import_object
from irl_align.data.columns import by_prompt_key, column
from irl_align.data.contrast import contrast_pairs
from irl_align.data.encoding import encode_prompts
from irl_align.data.pairs import (
    Pairs,
    in_shares,
    load_pairs,
    policy_pairs,
    sample_pairs,
    save_pairs,
    stats,
)
from irl_align.models.generation.protocol import Sampling
from irl_align.policy import Policy
from irl_align.policy.roles import Role
from irl_align.training.context import RunContext
from irl_align.training.iteration import Data, Iteration
from irl_align.training.keys import derive_seed
from irl_align.training.offset_step import pair_offset_stage
from irl_align.training.sampler import PromptSamples

logger = logging.getLogger(__name__)
USES = {"train": "reward", "held_out": "held_out"}
"""Part of a set of pairs -> the use of its demonstrations."""


@dataclass(frozen=True)
class IterationPairs:
    """Pairs of one iteration; they are read when they are first used."""

    key: str
    path: Path
    offsets: Path | None = None
    """Folder of the pairs' offsets, if the reward is cumulative."""

    @cached_property
    def train(self) -> Dataset:
        """Pairs that the reward is fitted on."""
        return self._load("train")

    @cached_property
    def held_out(self) -> Dataset:
        """Pairs of held-out prompts, which measure the reward."""
        return self._load("held_out")

    def _load(self, part: str) -> Dataset:
        pairs = load_pairs(self.path / f"{part}.parquet")
        if self.offsets is None:
            offsets = np.zeros(len(pairs), np.float32)
        else:
            offsets = np.load(self.offsets / f"{part}.npy")
        return pairs.add_column("offset", offsets)


def make_pairs(context: RunContext, iteration: Iteration, start: Policy) -> IterationPairs:
    """Sample y_hat ~ pi_k and pair every demonstration with a sample (and the recipe's extras)."""
    options, data = context.recipe.pairs, iteration.data
    generation = context.recipe.generation
    if generation.temperature == 0:
        logger.warning("generation.temperature is 0: all samples of a prompt are the same")
    if iteration.k == 0:
        _warn_of_long_demonstrations(data, generation.max_new_tokens)
    sampling = context.sampler.sampling(generation.samples_per_prompt, generation.temperature)
    # In iteration 0 the policy is pi_0, whose samples are not preferred to its own.
    sources = [source for source in options.sources if iteration.k or source[:7] != "policy/"]
    used = {side for source in sources for side in source.split("/")}
    samplers = {"policy": iteration.policy, "init": start, "sft": iteration.initial}
    if iteration.k:
        samplers["older"] = iteration.earlier[-1]
    samplers = {name: samplers[name] for name in sorted(used & set(samplers))}
    parts = {}
    for part, use in USES.items():
        rows = getattr(data, use)
        samples = {
            name: context.sampler.sample_rows(sampler, rows, sampling, part)
            for name, sampler in samplers.items()
        }
        parts[part] = _Part(context, iteration.k, data, rows, samplers, samples, sampling)

    def build(work: Path) -> dict[str, Any]:
        metrics = {}
        for name, part in parts.items():
            by_source = {source: part.pairs(source) for source in sources}
            dropped: Counter[str] = Counter()
            for pairs in by_source.values():
                dropped.update(pairs.dropped)
            chosen = [pairs.rows for pairs in by_source.values()]
            if options.shares is not None:
                shares = dict(zip(options.sources, options.shares, strict=True))
                seed = derive_seed(context.recipe.seed, f"shares of {iteration.k}") % 2**32
                chosen = in_shares(chosen, [shares[source] for source in by_source], seed)
            rows = concatenate_datasets(chosen)
            save_pairs(rows, work / f"{name}.parquet")
            metrics[name] = stats(rows, dropped)
        return metrics

    role = Role.pairs(iteration.k)
    stage = context.stage(
        role,
        "pairs",
        {
            "iteration": iteration.k,
            "pairs": options.model_dump(exclude={"window"}),
            "sampling": vars(sampling),
            "edit": context.recipe.data.edit,
        },
        {
            **{part: data.checksums[use] for part, use in USES.items()},
            **{name: sampler.identity for name, sampler in samplers.items()},
        },
        build,
        main_only=True,
    )
    context.log(role, stage.metrics)
    offsets = pair_offset_stage(context, iteration, stage)
    if offsets is None:
        return IterationPairs(stage.key, stage.path)
    return IterationPairs(offsets.key, stage.path, offsets.path)


def _warn_of_long_demonstrations(data: Data, limit: int) -> None:
    lengths = [
        len(ids) for use in USES.values() for ids in column(getattr(data, use), "completion_ids")
    ]
    if long := sum(length > limit for length in lengths):
        logger.warning(
            "%d of %d demonstrations (%.0f%%) are longer than generation.max_new_tokens, %d: they "
            "make no pairs with samples. The longest has %d tokens.",
            long,
            len(lengths),
            100 * long / len(lengths),
            limit,
            max(lengths),
        )


@dataclass(frozen=True)
class _Part:
    """What the pairs of one part (train or held_out) are made of."""

    context: RunContext
    k: int
    data: Data
    rows: Dataset
    samplers: Mapping[str, Policy]
    samples: Mapping[str, PromptSamples]
    sampling: Sampling

    def pairs(self, source: PairSource) -> Pairs:
        """Pairs of one source of the recipe, such as "demonstration/policy"."""
        chosen, rejected = source.split("/")
        if rejected == "contrast":
            return self._contrast()
        options = self.context.recipe.pairs
        common: dict[str, Any] = {
            "iteration": self.k,
            "seed": self.context.recipe.seed,
            "source": source,
            "generator": self.samplers[rejected].identity,
            "sampling": drawn_as(self.samplers[rejected], self.sampling),
            "truncated": options.truncated,
        }
        samples = self.samples[rejected].by_key
        if chosen == "demonstration":
            return policy_pairs(
                self.rows,
                samples,
                max_tokens=self.sampling.max_new_tokens,
                demonstrations_per_prompt=options.demonstrations_per_prompt,
                **common,
            )
        prompts = by_prompt_key(self.rows, "prompt_ids")
        return sample_pairs(prompts, self.samples[chosen].by_key, samples, **common)

    def _contrast(self) -> Pairs:
        options, card = self.context.recipe.pairs, self.data.card
        return contrast_pairs(
            self.rows,
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
    """Sampling of a selecting policy: the log-probs of its samples are not known."""

    temperature: float
    plain: bool = False


def drawn_as(sampler: Policy, sampling: Sampling) -> Sampling | Selected:
    """How a policy's samples were drawn: a selecting one uses its own temperature."""
    return sampling if sampler.ranking is None else Selected(sampler.ranking.temperature)
