"""The services of one run: stages, sampling, models on disk, training settings, the log.

Policy updates see it as :class:`irl_align.policy.UpdateContext`. What a run computes, and in which
order, is in :mod:`irl_align.training.loop`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.config.recipe import to_dict, to_yaml
from irl_align.config.schema import Recipe
from irl_align.errors import TryAgain, UserError
from irl_align.models.generation.backends import (
    LiveGenerator,
    resolve_backend,
    sampling_of,
    vllm_for,
)
from irl_align.models.generation.protocol import Completion, Generator, Sampling
from irl_align.models.generation.samples import Samples, StoredSamples, write_chosen, write_samples
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.generation.vllm_backend import VLLMGenerator
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import eos_ids, folder_eos_ids, load_model, seeded
from irl_align.models.lora import (
    DEFAULT_ADAPTER,
    add_adapter,
    base_of,
    has_adapter,
    quantization_config,
    require_bitsandbytes,
    train_only,
)
from irl_align.models.packing import context_length
from irl_align.models.trl import Training
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import Role, stage_key
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction
from irl_align.reward.ranking import rank_samples, sample_rewards
from irl_align.training.run_folder import FollowedRun, Run
from irl_align.training.store import Stage, Store
from irl_align.utils import distributed

logger = logging.getLogger(__name__)


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """The run folder of a recipe; of several processes the main one holds and writes it."""
    folder = Path(recipe.output_dir) / f"{recipe.name}-seed{recipe.seed}"
    if not distributed.is_main():
        yield FollowedRun(folder)
        return
    with Run.open(folder, to_dict(recipe), to_yaml(recipe)) as run:
        yield run


class RunContext:
    """One run's recipe, store, device and tokenizer, and what its stages share."""

    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]
    """Identity of a policy -> its name in the roles of stages: start, policy-0, policy-1, ..."""
    reward_from: Callable[[Reward], RewardFunction] | None = None
    """Loads an explicit reward that may be no RewardModel of ours."""

    def __init__(self, recipe: Recipe, store: Store, run: Run, device: torch.device) -> None:
        self.recipe = recipe
        self.store = store
        self.run = run
        self.device = device
        self.names = {}
        if recipe.model.quantization is None:
            self.backend = resolve_backend(recipe.generation, device)
        else:
            require_bitsandbytes("model.quantization")
            self.backend = "transformers"  # what samples a model of 4 bits
        if self.backend == "vllm" and distributed.count() > 1:
            raise UserError(
                f"generation.backend: found {recipe.generation.backend}, vLLM in the process that "
                f"trains, and {distributed.count()} processes; expected vllm-server or transformers"
            )
        self.vllm: VLLMGenerator | None = None
        if self.backend != "transformers":
            log = run.folder / "vllm-server.log"
            self.vllm = vllm_for(recipe, self.backend, device, log)

    def stage(
        self,
        role: Role,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
        alone: bool = False,
    ) -> Stage:
        """A stage of the store, linked and logged in this run; the seed is part of its settings.

        Of a run of several processes all build, and the main one writes; alone: it also builds
        alone, and the others wait.
        """

        def announced(work: Path) -> Mapping[str, Any] | None:
            logger.info("%s", role)
            return build(work)

        def ask(how: Build) -> Stage:
            return self.store.stage(name, {"seed": self.recipe.seed, **settings}, inputs, how)

        stage = shared_stage(ask, announced, alone)
        if stage.reused:
            logger.info("%s: reused", role)
        self.run.link(role, stage)
        costs: dict[str, Any] = {
            name: stage.record[name]
            for name in ("seconds", "peak_rss_mib", "peak_cuda_mib", "resumed")
            if name in stage.record
        }
        tokens = ("tokens_trained", "tokens_sampled")
        costs |= {name: stage.metrics[name] for name in tokens if name in stage.metrics}
        self.run.log(
            stage_key(role),
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
        return sampling_of(self.recipe.generation, self.backend, n, temperature)

    def load_policy(self, path: Path) -> PreTrainedModel:
        """A policy's language model on the run's device, in eval mode; its adapter merged."""
        return self._load(path, merge=True)

    def load_trainable(self, path: Path) -> PreTrainedModel:
        """A policy's language model to be trained: with model.lora its adapter alone is.

        A policy without one gets one, which leaves its function as it is.
        """
        lora = self.recipe.model.lora
        model = self._load(path, merge=lora is None)
        if has_adapter(model):
            train_only(model, DEFAULT_ADAPTER)
        elif lora is not None:
            with seeded(derive_seed(self.recipe.seed, "adapter") % 2**63):
                add_adapter(model, lora, base_of(path))
        return model

    def _load(self, path: Path, merge: bool) -> PreTrainedModel:
        options = self.recipe.model
        return load_model(
            path,
            self.device,
            merge=merge,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
            **self.quantization,
        )

    @property
    def quantization(self) -> dict[str, Any]:
        """What loads the recipe's models in 4 bits, where it asks for that."""
        options = self.recipe.model.quantization
        return {} if options is None else {"quantization_config": quantization_config(options)}

    @property
    def adapted(self) -> dict[str, Any]:
        """What of a policy is trained, for the settings of the stages that do; empty for all."""
        lora = self.recipe.model.lora
        return {} if lora is None else {"lora": lora.model_dump()}

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

    def load_reward(self, reward: Reward, merge: bool = True) -> RewardFunction:
        """The reward function of an artefact on the run's device, its adapter merged or apart."""
        if reward.kind == "explicit":
            if self.reward_from is not None:
                return self.reward_from(reward)
            return RewardModel.from_pretrained(reward.path, self.device, merge=merge)
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
            tokens = write_samples(work, self._sampler(policy), prompts, seeded)
            if self.vllm is not None:
                self.vllm.rest()
            samples = len(prompts) * sampling.n
            return {"prompts": len(prompts), "samples": samples, "tokens_sampled": tokens}

        stage = self.stage(
            Role.samples(role, self.name_of(policy), sampling.temperature),
            "samples",
            {"sampling": vars(seeded), "max_batch_tokens": max_batch_tokens},
            {"policy": policy.key, "prompts": checksum(prompts)},
            build,
            alone=self.vllm is not None,  # which spreads the work itself
        )
        return StoredSamples(stage.path, prompts)

    def _sampler(self, policy: Policy) -> Generator:
        """What samples a policy on disk."""
        if self.vllm is None:
            return self.generator(self.load_policy(policy.path))
        eos = folder_eos_ids(policy.path, self.tokenizer)
        self.vllm.sync(policy.path, policy.key, eos, lambda: self.load_policy(policy.path))
        return self.vllm

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
            Role.selected(role, self.name_of(policy)),
            "selected",
            {"sampling": vars(many), "of": ranking.n, "score": ranking.score, "role": role},
            {"policy": policy.identity, "prompts": checksum(prompts)},
            build,
            alone=True,
        )
        return StoredSamples(stage.path, prompts)

    def name_of(self, policy: Policy) -> str:
        """Name of a policy for people; of one that the loop does not know, its identity."""
        return self.names.get(policy.identity, policy.identity)

    def logprobs(
        self, policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per-token log-probs of completions under a policy's model, at temperature 1.

        Raises UserError where one is not finite.
        """
        model = self.load_policy(policy.path)
        progress = "log-probs" if distributed.is_main() else None
        found = distributed.over_sequences(
            lambda p, c: completion_logprobs(model, p, c, progress=progress),
            prompts,
            completions,
        )
        if bad := [row for row, values in enumerate(found) if not np.isfinite(values).all()]:
            raise UserError(
                f"{self.name_of(policy)}: the log-probs of completion {bad[0]} are not finite, "
                "expected finite ones; did training diverge?"
            )
        return found


Build = Callable[[Path], Mapping[str, Any] | None]


def shared_stage(ask: Callable[[Build], Stage], build: Build, alone: bool) -> Stage:
    """The stage that `ask` gives or has built, in every process: the main one asks the store.

    alone: only it builds.
    """
    if distributed.count() == 1:
        return ask(build)
    if distributed.is_main():

        def led(work: Path) -> Mapping[str, Any] | None:
            if alone:
                with distributed.alone():
                    return build(work)
            distributed.broadcast(work)
            metrics = build(work)
            distributed.barrier()  # what the others write is there
            return metrics

        return distributed.broadcast(ask(led))
    while isinstance(told := distributed.broadcast(None), Path):
        with suppress(TryAgain):  # raised by all of them: the next message is the next try
            build(told)
            distributed.barrier()
    assert isinstance(told, Stage)
    return told


def derive_seed(seed: int, role: str) -> int:
    """A seed of its own for every role, from the recipe's seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{role}".encode(), digest_size=8).digest())


def checksum(rows: Sequence[Sequence[int]]) -> str:
    """Checksum of rows of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
