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
    """Models on their devices, and data. Of these only `policy` changes."""

    policy: PreTrainedModel
    """Trained in place, in float32."""
    reference: PreTrainedModel
    """The leash's other end."""
    reward: RewardFunction
    """One snapshot, for every rollout of this training."""
    generator: Generator
    """Samples `policy`."""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    """Distinct prompts of the rollouts."""
    held_out: Demonstrations
    """Demonstrations that no rollout sees, to choose the best policy by."""
    sampling: Sampling
    starts_at_reference: bool
    """Whether policy and reference are the same at first, so that their KL is 0."""
    judge: Judge | None = None
    """Gold metrics of rollouts, for reporting."""
    backbone: Backbone | None = None
    """Of a policy whose model is that of reference, reward and critic too."""
    dtype: torch.dtype = torch.float32
    """Of the weights that are saved."""

    def as_reference(self) -> AbstractContextManager[None]:
        """A block in which `reference` is the reference, and not another adapter on its model."""
        if self.backbone is None:
            return nullcontext()
        return self.backbone.switch.on(self.backbone.reference)
