"""The services of one run: stages, sampling, models on disk, training settings, the log.

Policy updates see it as :class:`irl_align.policy.Workshop`. What a run computes, and in which
order, is in :mod:`irl_align.loop`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.backends import BackendSampling, LiveGenerator, VLLMSampler, resolve_backend
from irl_align.config import Recipe
from irl_align.files import read_json
from irl_align.generate import Completion, Generator, Sampling, TransformersGenerator
from irl_align.models import completion_logprobs, context_length, load_model
from irl_align.policy import Policy, Reward
from irl_align.ranking import rank_samples, sample_rewards
from irl_align.reward.model import ImplicitReward, RewardFunction, RewardModel
from irl_align.samples import Samples, StoredSamples, write_chosen, write_samples
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
        backend = resolve_backend(recipe, device)
        self.vllm: VLLMSampler | None = None
        if backend != "transformers":
            self.vllm = VLLMSampler(recipe, backend, device, run.folder / "vllm-server.log")

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

    def log(self, key: str, record: Mapping[str, Any]) -> None:
        """Set a line of the run's metrics."""
        self.run.log(key, record)

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
        settings: dict[str, Any] = {
            "n": n,
            "temperature": temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "max_new_tokens": options.max_new_tokens,
        }
        if self.vllm is None:
            return Sampling(**settings)
        engine = json.dumps(options.engine, sort_keys=True)
        return BackendSampling(**settings, backend=self.vllm.backend, engine=engine)

    def load_policy(self, path: Path) -> PreTrainedModel:
        """A policy's language model on the run's device, in eval mode."""
        options = self.recipe.model
        return load_model(
            path,
            self.device,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
        )

    def generator(self, model: PreTrainedModel) -> Generator:
        """What samples this model within the recipe's limits, whatever its weights become."""
        if self.vllm is not None:
            shared = self.run.folder if self.recipe.generation.server.urls else None
            return LiveGenerator(self.vllm, model, eos_ids(model, self.tokenizer), shared)
        return TransformersGenerator(
            model,
            eos_token_ids=eos_ids(model, self.tokenizer),
            pad_token_id=int(self.tokenizer.pad_token_id),
            max_batch_tokens=self.recipe.generation.max_batch_tokens,
            context_length=context_length(model),
        )

    def load_reward(self, reward: Reward) -> RewardFunction:
        """The reward function of an artefact on the run's device."""
        if reward.kind == "explicit":
            return RewardModel.from_pretrained(reward.path, self.device)
        references = [(weight, self.load_policy(path)) for weight, path in reward.references]
        return ImplicitReward(self.load_policy(reward.path), references, reward.beta)

    def sample(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, role: str
    ) -> Samples:
        """Samples of a policy as a stage; for a selecting policy the best of n candidates each."""
        if policy.ranking is not None:
            return self._sample_best(policy, prompts, sampling, role)
        seeded = replace(sampling, seed=derive_seed(self.recipe.seed, role) % 2**63)
        max_batch_tokens = self.recipe.generation.max_batch_tokens

        def build(work: Path) -> dict[str, Any]:
            write_samples(work, self._sampler(policy), prompts, seeded)
            if self.vllm is not None:
                self.vllm.rest()
            return {"prompts": len(prompts), "samples": len(prompts) * sampling.n}

        stage = self.stage(
            f"samples/{role}/{self.name_of(policy)}/t{sampling.temperature:g}",
            "samples",
            {"sampling": vars(seeded), "max_batch_tokens": max_batch_tokens},
            {"policy": policy.key, "prompts": checksum(prompts)},
            build,
        )
        return StoredSamples(stage.path, prompts)

    def _sampler(self, policy: Policy) -> Generator:
        """What samples a policy on disk."""
        if self.vllm is None:
            return self.generator(self.load_policy(policy.path))
        eos = folder_eos_ids(policy.path, self.tokenizer)
        return self.vllm.synced(policy.path, policy.key, eos, lambda: self.load_policy(policy.path))

    def close(self) -> None:
        """End what the run started: vLLM."""
        if self.vllm is not None:
            self.vllm.close()

    def _sample_best(
        self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, role: str
    ) -> Samples:
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
            chosen: dict[int, list[Completion]] = {
                i: [group[g * ranking.n + int(j)] for g, j in enumerate(best[i])]
                for i, group in candidates.groups()
            }
            write_chosen(work, [chosen[i] for i in range(len(prompts))])
            return {"samples": len(prompts) * sampling.n}

        stage = self.stage(
            f"selected/{role}/{self.name_of(policy)}",
            "selected",
            {"sampling": vars(many), "of": ranking.n, "score": ranking.score, "role": role},
            {"policy": policy.identity, "prompts": checksum(prompts)},
            build,
        )
        return StoredSamples(stage.path, prompts)

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
    return _all_eos(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def folder_eos_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """:func:`eos_ids` of the model in a folder."""
    file = path / "generation_config.json"
    configured = read_json(file, "a generation config", "delete it") if file.exists() else {}
    return _all_eos(configured.get("eos_token_id"), tokenizer)


def _all_eos(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(tokenizer.eos_token_id), *(int(i) for i in listed if i is not None)})
