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


def make_critic(
    options: PPOOptions,
    policy: PreTrainedModel,
    reward: RewardFunction,
    tokenizer: PreTrainedTokenizerBase,
) -> Critic | None:
    """The critic of the recipe, on the policy's device in float32; None if none is needed.

    From the reward it starts as the reward of prefixes, its mean included; otherwise at 0. If the
    reward has an adapter, the critic trains a copy of that adapter and the head.
    Raises UserError: the reward cannot be a critic of this policy.
    """
    if options.advantage != "gae":
        return None
    if options.critic == "shared":
        return Critic(None, zero_head(policy))
    if options.critic_init == "zero":
        return Critic(copy.deepcopy(policy.base_model), zero_head(policy))
    start = require_critic_start(reward, tokenizer)
    model = copy.deepcopy(start.model)
    if has_adapter(model):
        train_only(model, DEFAULT_ADAPTER)
    else:
        model = model.float().requires_grad_(True)
    trunk = model.base_model.to(policy.device)
    return Critic(trunk, head_copy(model, policy.device), start.settings)


def require_critic_start(reward: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """The reward, if a critic of a policy with this tokenizer can start as it; else a UserError."""
    option = "policy_update.critic_init: reward"
    if not isinstance(reward, RewardModel):
        raise UserError(
            f"{option}: found {type(reward).__name__}, expected an explicit reward model with the "
            "policy's tokenizer; use zero"
        )
    if reward.settings.lm_coef:
        raise UserError(
            f"{option}: the reward has lm_coef {reward.settings.lm_coef:g}, which a critic cannot "
            "start from; use zero"
        )
    if not same_tokenizer(reward.tokenizer, tokenizer):
        raise UserError(
            f"{option}: the reward's tokenizer ({len(reward.tokenizer)} tokens) differs from the "
            f"policy's ({len(tokenizer)} tokens); use zero"
        )
    return reward


def head_copy(model: PreTrainedModel, device: torch.device) -> nn.Linear:
    """A copy of a reward's head, with a bias, to be trained."""
    head = zeroed_linear(score_head(model).in_features, device)
    head.load_state_dict(score_head(model).state_dict(), strict=False)
    return head


def zero_head(policy: PreTrainedModel) -> nn.Linear:
    """A scalar head that gives 0 for hidden states of this policy."""
    return zeroed_linear(policy.config.get_text_config().hidden_size, policy.device)


def zeroed_linear(width: int, device: torch.device) -> nn.Linear:
    """A scalar head (1, H) of zeros."""
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
