"""Critics: a model of its own that starts at the reward or at zero, or a head on the policy."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.config.policy_update import PPOOptions
from irl_align.errors import UserError
from irl_align.models.lora import DEFAULT_ADAPTER, has_adapter, train_only
from irl_align.policy.ppo.network import Critic
from irl_align.reward.alignment import same_tokenizer
from irl_align.reward.forward import score_head
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction
from irl_align.reward.settings import RewardSettings


def make_critic(
    options: PPOOptions,
    policy: PreTrainedModel,
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
) -> Critic | None:
    """The critic of the recipe, on the policy's device in float32; None where none is needed.

    From the reward it starts as its prefix scores, normaliser included; otherwise at 0 everywhere.
    Of a trunk with an adapter that is trained.
    Raises UserError where the reward cannot be a critic of this policy.
    """
    if options.advantage != "gae":
        return None
    if options.critic == "shared":
        return Critic(None, zero_head(policy))
    if options.critic_init == "zero":
        return Critic(copy.deepcopy(policy.base_model), zero_head(policy))
    model, settings = reward_for_critic(reward, tokenizer)
    own = copy.deepcopy(model)
    if has_adapter(own):
        train_only(own, DEFAULT_ADAPTER)
    else:
        own = own.float().requires_grad_(True)
    trunk = own.base_model.to(policy.device)
    head = reward_head(own, policy.device)
    return Critic(trunk, head, settings.bound, settings.mean, settings.std)


def reward_head(model: PreTrainedModel, device: torch.device) -> nn.Linear:
    """A copy of a reward's head, with a bias, to be trained."""
    fresh = score_head(model)
    head = nn.Linear(fresh.in_features, 1, device=device)
    with torch.no_grad():
        head.weight.copy_(fresh.weight)
        head.bias.copy_(fresh.bias if fresh.bias is not None else torch.zeros(1))
    return head


def reward_for_critic(
    reward: RewardFunction, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, RewardSettings]:
    """Model and settings of a reward that can be a critic of a policy with this tokenizer."""
    asked = "policy_update.critic_init: reward"
    if not isinstance(reward, RewardModel):
        raise UserError(
            f"{asked}: found {type(reward).__name__}, expected an explicit reward model with the "
            "policy's tokenizer; use zero"
        )
    if reward.settings.lm_coef:
        raise UserError(
            f"{asked}: the reward has lm_coef {reward.settings.lm_coef:g}, which a critic cannot "
            "start from; use zero"
        )
    if not same_tokenizer(reward.tokenizer, tokenizer):
        raise UserError(
            f"{asked}: the reward's tokenizer ({len(reward.tokenizer)} tokens) is not the policy's "
            f"({len(tokenizer)} tokens); use zero"
        )
    return reward.model, reward.settings


def zero_head(policy: PreTrainedModel) -> nn.Linear:
    """A scalar head that gives 0 for hidden states of this policy."""
    width = policy.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
