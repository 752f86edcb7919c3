"""The models of one run: loaded from the folders of stages, named, and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_model, load_tokenizer, seeded
from irl_align.models.lora import (
    DEFAULT_ADAPTER,
    add_adapter,
    base_of,
    has_adapter,
    quantization_config,
    train_only,
)
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import START
from irl_align.reward.composed import FunctionInputs, composed, load_fitted
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.protocol import RewardFunction
from irl_align.training.keys import derive_seed
from irl_align.utils import distributed


class ModelLoader:
    """Loads policies and rewards of a run on its device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._start: Path | None = None
        self._names: dict[str, str] = {}
        self._load_explicit: Callable[[Reward], RewardFunction] | None = None
        self._inputs: Callable[[], FunctionInputs]

    def start_from(self, start: Policy) -> None:
        """Use the tokenizer of the start model."""
        self._start = start.path
        self.name(start, str(START))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the start model, loaded when it is first needed."""
        if self._tokenizer is None:
            assert self._start is not None, "start_from comes first"
            self._tokenizer = load_tokenizer(self._start)
        return self._tokenizer

    def name(self, policy: Policy, name: str) -> None:
        """Name a policy for people and for roles; its first name stays."""
        self._names.setdefault(policy.identity, name)

    def name_of(self, policy: Policy) -> str:
        """Name of a policy: start, policy-0, policy-1, ...; its identity if it has none."""
        return self._names.get(policy.identity, policy.identity)

    def load_rewards_with(self, load: Callable[[Reward], RewardFunction]) -> None:
        """Load explicit rewards with a function: they may be reward models of other projects."""
        self._load_explicit = load

    def read_functions_with(self, inputs: Callable[[], FunctionInputs]) -> None:
        """Give functions that are added to rewards the texts and columns of a run's prompts."""
        self._inputs = functools.cache(inputs)

    def load_policy(self, path: Path) -> PreTrainedModel:
        """A policy's language model in eval mode, with its adapter merged."""
        return self._load(path, merge=True)

    def load_trainable(self, path: Path) -> PreTrainedModel:
        """A policy's language model for training: all weights, or with model.lora its adapter.

        A model without an adapter gets one that does not change its function.
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
        """Keyword arguments that load models in 4 bits; empty without model.quantization."""
        options = self.recipe.model.quantization
        return {} if options is None else {"quantization_config": quantization_config(options)}

    @property
    def adapted(self) -> dict[str, Any]:
        """model.lora, for the settings of the stages that train a policy."""
        lora = self.recipe.model.lora
        return {"lora": None if lora is None else lora.model_dump()}

    def load_reward(self, reward: Reward, merge: bool = True) -> RewardFunction:
        """The reward function of an artefact; merge: an adapter is merged into the weights."""
        if reward.functions:
            alone = reward.kind == "functions"
            learned = None if alone else self.load_reward(reward.learned, merge)
            return composed(learned, reward.functions, self._inputs())
        if reward.kind == "explicit":
            if self._load_explicit is not None:
                return self._load_explicit(reward)
            return load_fitted(reward.path, self.device, merge=merge)
        references = [(weight, self.load_policy(path)) for weight, path in reward.references]
        return ImplicitReward(
            self.load_policy(reward.path),
            references,
            reward.beta,
            endogenous=reward.endogenous,
            mean=reward.mean,
        )

    def logprobs(
        self, policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per-token log-probs of completions under a policy's model, at temperature 1.

        Raises UserError: a log-prob is not finite.
        """
        model = self.load_policy(policy.path)
        progress = "log-probs" if distributed.is_main() else None
        logprobs = distributed.over_sequences(
            lambda p, c: completion_logprobs(model, p, c, progress=progress),
            prompts,
            completions,
        )
        for row, values in enumerate(logprobs):
            if not np.isfinite(values).all():
                raise UserError(
                    f"{self.name_of(policy)}: the log-probs of completion {row} are not finite, "
                    "expected finite ones; did training diverge?"
                )
        return logprobs
