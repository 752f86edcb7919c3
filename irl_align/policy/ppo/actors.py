"""The models and data of one PPO training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.models.generation.protocol import Generator, Sampling
from irl_align.policy import Demonstrations
from irl_align.policy.ppo.backbone import Backbone
from irl_align.policy.ppo.monitors import Judge
from irl_align.reward.protocol import RewardFunction


@dataclass(frozen=True)
class Actors:
    """Models on their devices, and data. Only `policy` changes during training."""

    policy: PreTrainedModel
    """Trained in place, in float32."""
    reference: PreTrainedModel
    """Reference policy of the KL penalty."""
    reward: RewardFunction
    """The reward of every rollout; it stays fixed."""
    generator: Generator
    """Samples `policy`."""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    """Distinct prompts of the rollouts."""
    held_out: Demonstrations
    """Demonstrations of other prompts, which decide the best policy."""
    sampling: Sampling
    starts_at_reference: bool
    """Whether policy and reference are equal at the start, so that their KL is 0."""
    judge: Judge | None = None
    """Gold metrics of rollouts, which are only reported."""
    backbone: Backbone | None = None
    """The shared model, if reference, reward and critic are adapters on the policy's."""
    dtype: torch.dtype = torch.float32
    """Precision of the weights that are saved."""

    def as_reference(self) -> AbstractContextManager[None]:
        """A block in which `reference` has the reference's adapter active."""
        if self.backbone is None:
            return nullcontext()
        return self.backbone.switch.on(self.backbone.reference)
