"""Samples of a run's policies, each a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from irl_align.config.schema import Recipe
from irl_align.data.columns import by_prompt_key
from irl_align.errors import UserError
from irl_align.models.generation.backends import (
    LiveGenerator,
    resolve_backend,
    sampling_of,
    vllm_for,
)
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.models.generation.samples import (
    Samples,
    SampleSet,
    StoredSamples,
    write_chosen,
    write_samples,
)
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.loading import eos_ids, folder_eos_ids
from irl_align.models.lora import require_bitsandbytes
from irl_align.policy import Policy
from irl_align.policy.roles import Role
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.training.keys import checksum, derive_seed
from irl_align.training.model_loader import ModelLoader
from irl_align.training.stages import Stages
from irl_align.training.store import Stage
from irl_align.utils import distributed


@dataclass(frozen=True)
class PromptSamples:
    """Samples of the distinct prompts of some rows; they are read when they are first used."""

    prompts: dict[str, Sequence[int]]
    """Prompt key -> token ids."""
    samples: Samples

    @cached_property
    def by_key(self) -> dict[str, list[Completion]]:
        """Prompt key -> its samples. Raises MissingSamples: their stage was only looked up."""
        if len(self.samples.completions) != len(self.prompts):
            raise MissingSamples
        return dict(zip(self.prompts, self.samples.completions, strict=True))

    def flat(self) -> tuple[list[list[int]], list[Completion]]:
        """Prompt ids and completion of every sample. Raises MissingSamples: see by_key."""
        prompts = [list(self.prompts[key]) for key in self.by_key]
        return SampleSet(prompts, list(self.by_key.values())).flat()


class MissingSamples(Exception):
    """Samples were looked up, and the store does not have them."""


class Sampler:
    """Samples policies with the recipe's backend: transformers, or vLLM that it starts."""

    def __init__(
        self, recipe: Recipe, stages: Stages, models: ModelLoader, run_folder: Path
    ) -> None:
        """Raises UserError: the backend is not installed, or not possible with this recipe."""
        self.recipe, self.stages, self.models, self.run_folder = recipe, stages, models, run_folder
        if recipe.model.quantization is None:
            self.backend = resolve_backend(recipe.generation, models.device)
        else:
            require_bitsandbytes("model.quantization")
            self.backend = "transformers"  # vLLM cannot sample a 4-bit model of this run
        if self.backend == "vllm" and distributed.count() > 1:
            raise UserError(
                f"generation.backend: found {recipe.generation.backend}, vLLM in the process that "
                f"trains, and {distributed.count()} processes; expected vllm-server or transformers"
            )
        self.vllm: VLLMGenerator | None = None
        if self.backend != "transformers":
            log = run_folder / "vllm-server.log"
            self.vllm = vllm_for(recipe, self.backend, models.device, log)

    def sampling(self, n: int, temperature: float) -> Sampling:
        """The recipe's sampling settings with n samples per prompt at a temperature.

        ``sample`` sets the seed.
        """
        return sampling_of(self.recipe.generation, self.backend, n, temperature)

    def generator(self, model: PreTrainedModel) -> Generator:
        """A generator that samples this model within the recipe's limits while it is trained."""
        tokenizer = self.models.tokenizer
        if self.vllm is not None:
            shared = self.run_folder if self.recipe.generation.server.urls else None
            return LiveGenerator(self.vllm, model, eos_ids(model, tokenizer), shared)
        return TransformersGenerator(
            model,
            eos_token_ids=eos_ids(model, tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            max_batch_tokens=self.recipe.generation.max_batch_tokens,
        )

    def sample_rows(
        self, policy: Policy, rows: Dataset, sampling: Sampling, use: str
    ) -> PromptSamples:
        """Samples of every distinct prompt of these rows."""
        prompts = by_prompt_key(rows, "prompt_ids")
        samples = self.sample(policy, list(prompts.values()), sampling, use)
        return PromptSamples(prompts, samples)

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, use: str
    ) -> Samples:
        """Samples of a policy as a stage; the best of n candidates each for a selecting policy.

        use: what the samples are for, such as train or evaluation; the seed depends on it. Samples
        for measurements have common random numbers for all policies, which makes comparisons
        precise. Samples to train on have other numbers for every policy, since the negatives of
        two iterations would else be the same texts in many rows.
        """
        if policy.ranking is not None:
            return self._sample_best(policy, prompts, sampling, use)
        common = use.startswith(("held_out", "evaluation"))
        name = use if common else f"{use} {self.models.name_of(policy)}"
        seeded = replace(sampling, seed=derive_seed(self.recipe.seed, name) % 2**63)

        def build(work: Path) -> dict[str, Any]:
            tokens = write_samples(work, self._generator_of(policy), prompts, seeded)
            if self.vllm is not None:
                self.vllm.rest()
            samples = len(prompts) * sampling.n
            return {"prompts": len(prompts), "samples": samples, "tokens_sampled": tokens}

        stage = self.stages.stage(
            Role.samples(use, self.models.name_of(policy), sampling.temperature),
            "samples",
            {
                "sampling": vars(seeded),
                "max_batch_tokens": self.recipe.generation.max_batch_tokens,
            },
            {"policy": policy.key, "prompts": checksum(prompts)},
            build,
            main_only=self.vllm is not None,  # vLLM shares the work itself
        )
        return _read(stage, prompts)

    def _generator_of(self, policy: Policy) -> Generator:
        """A generator that samples a policy's folder."""
        path, load = policy.path, self.models.load_policy
        if self.vllm is None:
            return self.generator(load(path))
        eos = folder_eos_ids(path, self.models.tokenizer)
        self.vllm.sync(path, policy.key, eos, lambda: load(path))
        return self.vllm

    def _sample_best(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, use: str
    ) -> Samples:
        """n samples per prompt of best-of-N selection: the best of n separate groups of N."""
        ranking = policy.ranking
        assert ranking is not None
        base = Policy(policy.path, policy.key)
        many = self.sampling(sampling.n * ranking.n, ranking.temperature)
        candidates = self.sample(base, prompts, many, f"{use}-candidates")

        def build(work: Path) -> dict[str, Any]:
            rewards = None
            if ranking.score != "logprob":
                rewards = sample_rewards(candidates, self.models.load_reward(ranking.reward))
            own = None if many.plain else partial(self.models.logprobs, base)
            scores = rank_samples(candidates, rewards, ranking.score, own)
            best = scores.reshape(len(prompts), sampling.n, ranking.n).argmax(2)
            chosen: dict[int, list[Completion]] = {
                i: [group[g * ranking.n + int(j)] for g, j in enumerate(best[i])]
                for i, group in candidates.groups()
            }
            write_chosen(work, [chosen[i] for i in range(len(prompts))])
            return {"samples": len(prompts) * sampling.n}

        stage = self.stages.stage(
            Role.selected(use, self.models.name_of(policy)),
            "selected",
            {"sampling": vars(many), "of": ranking.n, "score": ranking.score, "role": use},
            {"policy": policy.identity, "prompts": checksum(prompts)},
            build,
            main_only=True,
        )
        return _read(stage, prompts)

    def close(self) -> None:
        """Stop vLLM if this run started it."""
        if self.vllm is not None:
            self.vllm.close()


def _read(stage: Stage, prompts: Sequence[Sequence[int]]) -> Samples:
    return SampleSet([], []) if stage.missing else StoredSamples(stage.path, prompts)
