"""One model in memory for policy, reference, reward and critic of PPO, each an adapter on it.

The policy's adapter is active by default; forward passes of another role run inside a block that
switches to its adapter. The reference is the base without adapters, or an adapter of its own if SFT
trained one. Scalar heads stay outside the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.loading import empty_classifier, load_tokenizer
from irl_align.models.lora import (
    DEFAULT_ADAPTER,
    AdapterSwitch,
    base_of,
    copy_adapter,
    is_adapter,
    load_adapter,
    train_only,
)
from irl_align.models.packing import Ids
from irl_align.policy.ppo.critic import head_copy, require_critic_start, zero_head
from irl_align.policy.ppo.network import CRITIC, Critic
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest, TokenScores
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import read_settings

REFERENCE, REWARD = "reference", "reward"


class AdapterReward:
    """A reward that is an adapter on the policy's backbone; a RewardFunction and a TokenScorer."""

    def __init__(self, reward: RewardModel, switch: AdapterSwitch) -> None:
        self.reward = reward
        self.switch = switch

    def score_ids(self, prompts: Ids, completions: Ids) -> Tensor:
        """Reward of whole completions: (B,)."""
        with self._active():
            return self.reward.score_ids(prompts, completions, None)

    def prefix_scores_ids(self, prompts: Ids, completions: Ids) -> list[Tensor]:
        """Reward of every prefix of each completion, the empty one first: (T + 1,) per row."""
        with self._active():
            return self.reward.prefix_scores_ids(prompts, completions)

    def score_tokens(self, request: ScoreRequest) -> TokenScores:
        """As :func:`irl_align.reward.scoring.score_tokens`."""
        with self._active():
            return score_tokens(self.reward, request)

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        model = self.reward.model
        model.training = model.base_model.training  # the mode that scoring restores at its end
        with self.switch.on(REWARD):
            yield


@dataclass(frozen=True)
class Backbone:
    """The other roles in the policy's model."""

    switch: AdapterSwitch
    reference: str | None
    """Name of the reference's adapter; None means the base."""
    reward: AdapterReward


def share_backbone(policy: PreTrainedModel, start: Path, reference: Path, reward: Path) -> Backbone:
    """Put the adapters of reference and reward into the policy's model.

    policy: the model in the folder `start`; only its own adapter is trained. Raises UserError: the
    reward is not an adapter, or the three folders have different bases.
    """
    if not is_adapter(reward):
        raise UserError(
            f"PPO: backbone shared: found a whole reward model in {reward}, expected an adapter on "
            "the policy's base: fit it with reward.lora, or use backbone separate"
        )
    base = base_of(start)
    for role, folder in (("reference", reference), ("reward", reward)):
        if (own := base_of(folder)) != base:
            raise UserError(
                f"PPO: backbone shared: the {role}'s base is {own}, expected the policy's, {base}"
            )
    name = None
    if is_adapter(reference):
        load_adapter(policy, reference, REFERENCE)
        name = REFERENCE
    head = load_adapter(policy, reward, REWARD)
    train_only(policy, DEFAULT_ADAPTER)
    switch = AdapterSwitch(policy)
    model = RewardModel(_scorer(policy, head), load_tokenizer(reward), read_settings(reward))
    return Backbone(switch, name, AdapterReward(model, switch))


def _scorer(policy: PreTrainedModel, head: dict[str, Tensor]) -> PreTrainedModel:
    """A sequence classifier of the policy's architecture whose backbone is the policy's own."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = empty_classifier(config)
    setattr(model, model.base_model_prefix, policy.base_model)
    width = head["weight"].shape[1]
    score = nn.Linear(width, 1, bias="bias" in head)
    score.load_state_dict(head)
    model.score = score.to(policy.device).requires_grad_(False)
    if not config.tie_word_embeddings:  # for a reward with lm_coef
        model.lm_head = policy.get_output_embeddings()
    model.config = policy.config  # one object, so that a change of attention reaches all layers
    return model


def adapter_critic(
    options: PPOOptions, policy: PreTrainedModel, backbone: Backbone
) -> Critic | None:
    """The critic of the recipe as an adapter on the policy's backbone; see make_critic."""
    if options.advantage != "gae":
        return None
    if options.critic == "shared":
        return Critic(None, zero_head(policy))
    if options.critic_init == "zero":
        source = DEFAULT_ADAPTER
        critic = Critic(None, zero_head(policy), switch=backbone.switch)
    else:
        source = REWARD
        start = require_critic_start(backbone.reward.reward, backbone.reward.reward.tokenizer)
        head = head_copy(start.model, policy.device)
        critic = Critic(None, head, start.settings, backbone.switch)
    copy_adapter(policy, source, CRITIC)
    train_only(policy, DEFAULT_ADAPTER, CRITIC)
    backbone.switch.reset()
    return critic
