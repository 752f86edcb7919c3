"""The services of one run: stages, sampling, models on disk, training settings, the log.

Policy updates see it as :class:`irl_align.policy.Workshop`. What a run computes, and in which
order, is in :mod:`irl_align.loop`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.config import Recipe
from irl_align.generate import Completion, Sampling, TransformersGenerator
from irl_align.models import completion_logprobs, context_length, load_model
from irl_align.policy import Policy, Reward
from irl_align.ranking import rank_samples, sample_rewards
from irl_align.reward.model import ImplicitReward, RewardFunction, RewardModel
from irl_align.samples import SampleSet, read_samples, write_chosen, write_samples
from irl_align.stages import Run, Stage, Store
from irl_align.trainers import Training

logger = logging.getLogger(__name__)


class Lab:
    """One run's recipe, store, device and tokenizer, and what its stages share."""

    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]
    """Identity of a policy -> its name in the roles of stages: start, policy-0, policy-1, ..."""

    def __init__(self, recipe: Recipe, store: Store, run: Run, device: torch.device) -> None:
        self.recipe = recipe
        self.store = store
        self.run = run
        self.device = device
        self.names = {}

    def stage(
        self,
        role: str,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
    ) -> Stage:
        """A stage of the store, linked and logged in this run; the seed is part of its settings."""

        def announced(work: Path) -> Mapping[str, Any] | None:
            logger.info(role)
            return build(work)

        stage = self.store.stage(name, {"seed": self.recipe.seed, **settings}, inputs, announced)
        if stage.reused:
            logger.info("%s: reused", role)
        self.run.link(role, stage)
        costs: dict[str, Any] = {
            name: stage.record[name]
            for name in ("seconds", "peak_rss_mib", "peak_cuda_mib", "resumed")
            if name in stage.record
        }
        self.run.log(
            f"stage/{role}",
            {"stage": stage.name, "stage_key": stage.key, "reused": stage.reused, **costs},
        )
        return stage

    def training(self, work: Path, label: str) -> Training:
        """Settings of a trainer working in a stage's folder, with a seed of its own."""
        if "tensorboard" in self.recipe.report_to:
            # transformers' own switch; by default events go beside the checkpoints, which are
            # thrown away.
            events = self.run.folder / "tensorboard" / label.replace(" ", "-")
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(events)
        return Training(
            work=work,
            seed=derive_seed(self.recipe.seed, label) % 2**31,
            device=self.device,
            report_to=tuple(self.recipe.report_to),
            run_name=f"{self.recipe.name}-seed{self.recipe.seed}-{label.replace(' ', '-')}",
            label=label,
        )

    def sampling(self, n: int, temperature: float) -> Sampling:
        """The recipe's sampling settings with this n and temperature; the seed comes by role."""
        options = self.recipe.generation
        return Sampling(
            n=n,
            temperature=temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            max_new_tokens=options.max_new_tokens,
        )

    def load_policy(self, path: Path) -> PreTrainedModel:
        """A policy's language model on the run's device, in eval mode."""
        options = self.recipe.model
        return load_model(
            path,
            self.device,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
        )

    def load_reward(self, reward: Reward) -> RewardFunction:
        """The reward function of an artefact on the run's device."""
        if reward.kind == "explicit":
            return RewardModel.from_pretrained(reward.path, self.device)
        references = [(weight, self.load_policy(path)) for weight, path in reward.references]
        return ImplicitReward(self.load_policy(reward.path), references, reward.beta)

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, role: str
    ) -> SampleSet:
        """Samples of a policy as a stage; for a selecting policy the best of n candidates each."""
        if policy.ranking is not None:
            return self._sample_best(policy, prompts, sampling, role)
        seeded = Sampling(**{**vars(sampling), "seed": derive_seed(self.recipe.seed, role) % 2**63})
        max_batch_tokens = self.recipe.generation.max_batch_tokens

        def build(work: Path) -> dict[str, Any]:
            model = self.load_policy(policy.path)
            generator = TransformersGenerator(
                model,
                eos_token_ids=eos_ids(model, self.tokenizer),
                pad_token_id=int(self.tokenizer.pad_token_id),
                max_batch_tokens=max_batch_tokens,
                context_length=context_length(model),
            )
            write_samples(work, generator, prompts, seeded)
            return {"prompts": len(prompts), "samples": len(prompts) * sampling.n}

        stage = self.stage(
            f"samples/{role}/{self.name_of(policy)}/t{sampling.temperature:g}",
            "samples",
            {"sampling": vars(seeded), "max_batch_tokens": max_batch_tokens},
            {"policy": policy.key, "prompts": checksum(prompts)},
            build,
        )
        return read_samples(stage.path, prompts)

    def _sample_best(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, role: str
    ) -> SampleSet:
        """n samples per prompt of best-of-N selection: the best of n separate groups of N."""
        ranking = policy.ranking
        assert ranking is not None
        base = Policy(policy.path, policy.key)
        many = self.sampling(sampling.n * ranking.n, ranking.temperature)
        candidates = self.sample(base, prompts, many, f"{role}-candidates")

        def build(work: Path) -> dict[str, Any]:
            rewards = None
            if ranking.score != "logprob":
                rewards = sample_rewards(candidates, self.load_reward(ranking.reward))
            scores = rank_samples(candidates, rewards, ranking.score)
            best = scores.reshape(len(prompts), sampling.n, ranking.n).argmax(2)
            chosen: list[list[Completion]] = [
                [group[g * ranking.n + int(j)] for g, j in enumerate(row)]
                for group, row in zip(candidates.completions, best, strict=True)
            ]
            write_chosen(work, chosen)
            return {"samples": len(prompts) * sampling.n}

        stage = self.stage(
            f"selected/{role}/{self.name_of(policy)}",
            "selected",
            {"sampling": vars(many), "of": ranking.n, "score": ranking.score, "role": role},
            {"policy": policy.identity, "prompts": checksum(prompts)},
            build,
        )
        return read_samples(stage.path, prompts)

    def name_of(self, policy: Policy) -> str:
        """Name of a policy for people; of one that the loop does not know, its identity."""
        return self.names.get(policy.identity, policy.identity)

    def logprobs(
        self, policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per-token log-probs of completions under a policy's model, at temperature 1."""
        return completion_logprobs(
            self.load_policy(policy.path), prompts, completions, progress="log-probs"
        )


def derive_seed(seed: int, role: str) -> int:
    """A seed of its own for every role, from the recipe's seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{role}".encode(), digest_size=8).digest())


def checksum(rows: Sequence[Sequence[int]]) -> str:
    """Checksum of rows of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(tokenizer.eos_token_id), *(int(i) for i in listed if i is not None)})
