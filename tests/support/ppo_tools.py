"""Small PPO trainings for tests: a Llama of a few tokens, rewards given by a Python function."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from irl_align.config.policy_update import PPOOptions
from irl_align.models.generation.protocol import Sampling
from irl_align.models.generation.transformers_backend import TransformersGenerator
from irl_align.models.trl import Training
from irl_align.policy import Demonstrations
from irl_align.policy.ppo.actors import Actors
from irl_align.policy.ppo.monitors import Judge
from irl_align.policy.ppo.update import train_ppo

PAD, BOS, EOS = 0, 1, 2  # as in the tests' tokenizer

Ids = Sequence[Sequence[int]]


class Scripted:
    """A reward function from one of a prompt and a completion; prefixes are scored alike."""

    def __init__(self, of: Callable[[list[int], list[int]], float]) -> None:
        self.of = of
        self.calls = 0

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        self.calls += 1
        return torch.tensor(
            [self.of(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)]
        )

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        return [
            torch.tensor([self.of(list(p), list(c[:t])) for t in range(len(c) + 1)])
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
    return Training(work, seed, torch.device("cpu"), label="PPO")


def train(work: Path, cast: Actors, chosen: PPOOptions, seed: int = 0) -> dict[str, Any]:
    return train_ppo(cast, chosen, training(work, seed))
