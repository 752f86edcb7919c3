"""Small PPO trainings for tests: a Llama of a few tokens, rewards given by a Python function."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import TryAgain
from irl_align.models.generation.protocol import Completion, Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.critic import make_critic
from irl_align.policy.ppo.distributed import make_accelerator
from irl_align.policy.ppo.learner import Learner
from irl_align.policy.ppo.micro_batches import PackedRollout
from irl_align.policy.ppo.monitors import Judge
from irl_align.policy.ppo.network import Critic, Network
from irl_align.policy.ppo.rollout import RolloutBatch, collate
from irl_align.policy.ppo.update import train_ppo
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from support.rows import random_ids, save

PAD, BOS, EOS = 0, 1, 2  # as in the tests' tokenizer
CPU = torch.device("cpu")

Ids = Sequence[Sequence[int]]


class Scripted:
    """A reward function from a Python function of a prompt and a completion; also for prefixes."""

    def __init__(self, score: Callable[[list[int], list[int]], float]) -> None:
        self.score = score
        self.calls = 0

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        self.calls += 1
        return torch.tensor(
            [self.score(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)]
        )

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        return [
            torch.tensor([self.score(list(p), list(c[:t])) for t in range(len(c) + 1)])
            for p, c in zip(prompts, completions, strict=True)
        ]


def small_llama(vocabulary: int, width: int = 32, layers: int = 1, seed: int = 0) -> Any:
    """A random Llama in eval mode, float32."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def options(**values: Any) -> PPOOptions:
    """PPO options for something small; given ones replace these."""
    small = {
        "batch_size": 16,
        "episodes": 64,
        "epochs": 2,
        "learning_rate": 1e-2,
        "kl_coef": 0.05,
        "keep": "last",
        "missing_eos": "ignore",
        "checkpoint_every": 1000,
        "held_out_prompts": 4,
    }
    return PPOOptions.model_validate({"kind": "ppo", **small, **values})


def actors(
    policy: PreTrainedModel,
    reward: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    chosen: PPOOptions,
    *,
    max_new_tokens: int = 6,
    judge: Judge | None = None,
) -> Actors:
    """A copy of the policy and its untouched self as the reference."""
    own = copy.deepcopy(policy)
    demonstrations = Demonstrations(
        prompts[:4], [[BOS + 2, EOS] for _ in prompts[:4]], checksum="held out"
    )
    return Actors(
        policy=own,
        reference=copy.deepcopy(policy).requires_grad_(False),
        reward=reward,
        generator=TransformersGenerator(own, [EOS], PAD),
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=demonstrations,
        sampling=Sampling(
            n=chosen.n, temperature=chosen.temperature, max_new_tokens=max_new_tokens
        ),
        starts_at_reference=True,
        judge=judge,
    )


def training(work: Path, seed: int = 0) -> Training:
    work.mkdir(parents=True, exist_ok=True)
    return Training(work, seed, CPU, label="PPO")


def train(work: Path, cast: Actors, chosen: PPOOptions, seed: int = 0) -> dict[str, Any]:
    return train_ppo(cast, chosen, training(work, seed))


PROMPTS = random_ids(16, 2, 5, 0, vocabulary=12)  # as many as a rollout of options() has samples
REWARD = Scripted(lambda prompt, completion: completion.count(5) - 0.1 * len(completion))


def cast_of(tokenizer: PreTrainedTokenizerFast, chosen: PPOOptions, reward: Any = REWARD) -> Actors:
    """Actors of a small Llama on PROMPTS."""
    return actors(small_llama(12), reward, tokenizer, PROMPTS, chosen)


def reward_model(folder: Path, tokenizer: PreTrainedTokenizerFast, model: Any) -> RewardModel:
    """A fresh reward on a policy, which is saved in the folder."""
    save(model, tokenizer, folder)
    return RewardModel.from_policy(folder, tokenizer, RewardSettings(mean=0.3), seed=3)


def learner_of(
    model: PreTrainedModel,
    chosen: PPOOptions,
    critic: Critic | None = None,
    bf16: bool = False,
) -> Learner:
    """A learner on the CPU; with advantage gae and no critic given, one that starts at 0."""
    critic = critic or make_critic(chosen, model, REWARD, None)  # type: ignore[arg-type]
    network = Network(model, critic, chosen.temperature)
    return Learner(network, chosen, CPU, 0, PAD, make_accelerator(CPU, bf16))


def samples_of(*rows: tuple[list[int], list[int], bool]) -> RolloutBatch:
    """Samples from (prompt, completion, truncated), with log-probs of 0."""
    zeros = [Completion(c, np.zeros(len(c), np.float32), cut) for _, c, cut in rows]
    return collate([prompt for prompt, _, _ in rows], zeros)


def pack(learner: Learner, samples: RolloutBatch) -> PackedRollout:
    return learner.pack(samples.prompts, samples.completions)


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its start and without seconds."""
    history = [
        {name: value for name, value in record.items() if not name.startswith("seconds")}
        for record in report["history"]
    ]
    return {**{k: v for k, v in report.items() if k != "start"}, "history": history}


class Stop(Exception):
    """In place of a kill."""


def before_each_draw(cast: Actors, act: Callable[[int], None]) -> Actors:
    """Call act(n) before the generator's n-th draw, counted from 1; evaluations draw too."""
    stream, drawn = cast.generator.stream, 0

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal drawn
        drawn += 1
        act(drawn)
        return stream(*arguments)

    cast.generator.stream = counted  # type: ignore[method-assign]
    return cast


def stop_after(cast: Actors, draws: int) -> Actors:
    """Have the generator raise Stop after so many draws."""

    def act(number: int) -> None:
        if number > draws:
            raise Stop

    return before_each_draw(cast, act)


def train_until_stopped(work: Path, cast: Actors, chosen: PPOOptions, draws: int) -> None:
    """Train until the generator is asked for one more draw than this, as if killed there."""
    with pytest.raises(Stop):
        train(work, stop_after(cast, draws), chosen)


def train_through(work: Path, make: Callable[[], Actors], chosen: PPOOptions) -> dict[str, Any]:
    """Train as a stage does: again from the last checkpoint after the first fault since it."""
    with pytest.raises(TryAgain):
        train(work, make(), chosen)
    return train(work, make(), chosen)


def broken_after(calls: int, value: float) -> Scripted:
    """A reward that gives `value` after so many passes; the first scores the demonstrations."""
    reward = Scripted(lambda prompt, completion: float(completion.count(5)))
    whole = reward.score_ids

    def score_ids(prompts: Any, completions: Any) -> Tensor:
        scores = whole(prompts, completions)
        return scores if reward.calls <= calls else torch.full_like(scores, value)

    reward.score_ids = score_ids  # type: ignore[method-assign]
    return reward
