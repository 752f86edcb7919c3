"""The network that PPO trains: the policy, and the critic as a separate model or on its trunk.

Letters beyond the package's legend of shapes: M completion tokens of a micro-batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from irl_align.models.lm_head import LOGITS_AT_ONCE, has_plain_logits, lm_head_logits
from irl_align.models.lora import AdapterSwitch, adapter_weights
from irl_align.policy.ppo.losses import entropy as entropy_of
from irl_align.policy.ppo.micro_batches import MicroBatch
from irl_align.reward.forward import bounded_and_centred, head_values
from irl_align.reward.settings import DEFAULT_SETTINGS, RewardSettings

Entropy = Literal["none", "monitor", "loss"]
CRITIC = "critic"  # name of the critic's adapter on the policy's trunk


class Outputs(NamedTuple):
    """The network's outputs for the M completion tokens of a micro-batch, in float32."""

    logps: Tensor | None
    """(M,) log pi(y_t | s_t) at the temperature."""
    entropy: Tensor | None
    """(M,) entropy of pi(. | s_t) at the temperature."""
    values: Tensor | None
    """(M,) V(s_t)."""


class TokenOutputs(NamedTuple):
    """A language model's outputs for M tokens."""

    logps: Tensor | None
    """(M,)."""
    entropy: Tensor | None
    """(M,)."""
    hidden: Tensor | None
    """(M, H) last hidden states at the states s_t."""


class Critic(nn.Module):
    """V(s) = head(h_s) with the bound and mean of a reward's settings.

    h_s comes from `trunk`, or from the policy's trunk if that is None: with `switch` from the
    critic's adapter on it, otherwise from the policy itself.
    """

    def __init__(
        self,
        trunk: nn.Module | None,
        head: nn.Linear,
        settings: RewardSettings = DEFAULT_SETTINGS,
        switch: AdapterSwitch | None = None,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.trunk = trunk
        self.head = head
        self.settings = settings

    @property
    def on_policy(self) -> bool:
        """Whether it is a head on the policy's own states, and changes with the policy."""
        return self.trunk is None and self.switch is None

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (M,) of hidden states (M, H)."""
        return bounded_and_centred(head_values(self.head, hidden), self.settings)


class Network(nn.Module):
    """Policy and critic in one module, so that accelerate prepares, saves and loads both."""

    def __init__(self, policy: PreTrainedModel, critic: Critic | None, temperature: float) -> None:
        super().__init__()
        has_plain_logits(policy)  # measured here, before accelerate wraps the model
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trained weights of the policy, and of a critic that is a head on its trunk."""
        shared = self.critic is not None and self.critic.on_policy
        critic = {id(weight) for weight in self.critic_parameters()}
        weights = self.parameters() if shared else self.policy.parameters()
        return [weight for weight in weights if weight.requires_grad and id(weight) not in critic]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trained weights of a critic with a trunk or an adapter of its own."""
        if self.critic is None or self.critic.on_policy:
            return []
        switched = self.critic.switch is not None
        adapter = adapter_weights(self.policy, CRITIC).values() if switched else ()
        return [w for w in (*self.critic.parameters(), *adapter) if w.requires_grad]

    def forward(
        self, batch: MicroBatch, logps: bool = True, values: bool = True, entropy: Entropy = "none"
    ) -> Outputs:
        """Log-probs, entropies and values of the micro-batch's tokens, those that are requested."""
        critic = self.critic if values else None
        shared = critic is not None and critic.on_policy
        out = TokenOutputs(None, None, None)
        if logps or shared:
            out = token_outputs(
                self.policy, batch, self.temperature, entropy, logps=logps, hidden=shared
            )
        if critic is None:
            return Outputs(out.logps, out.entropy, None)
        if critic.switch is not None:
            with critic.switch.on(CRITIC):
                hidden: Tensor | None = hidden_before(self.policy.base_model, batch)
        else:
            hidden = out.hidden if critic.trunk is None else hidden_before(critic.trunk, batch)
        return Outputs(out.logps, out.entropy, critic(hidden))


def hidden_before(trunk: nn.Module, batch: MicroBatch) -> Tensor:
    """Last hidden states at the states s_t, before each token: (M, H)."""
    hidden: Tensor = trunk(**batch.inputs)[0]
    return hidden.flatten(0, 1).index_select(0, batch.state_index)


def token_outputs(
    model: PreTrainedModel,
    batch: MicroBatch,
    temperature: float,
    entropy: Entropy = "none",
    *,
    logps: bool = True,
    hidden: bool = False,
) -> TokenOutputs:
    """Log-probs, entropies and hidden states of a micro-batch's tokens, those that are requested.

    The output layer runs on completion positions only, in pieces that limit memory; log-softmax
    is always in float32.
    """
    if not has_plain_logits(model):  # scaled or capped logits need the model's own forward
        out = model(**batch.inputs, output_hidden_states=hidden)
        arrays: list[Tensor] = [out.logits, *([out.hidden_states[-1]] if hidden else [])]
        logits, *last = [x.flatten(0, 1).index_select(0, batch.state_index) for x in arrays]
        pair = _logps_and_entropy(logits, batch.targets, temperature, entropy)
        return TokenOutputs(*pair, last[0] if last else None)
    states = hidden_before(model.base_model, batch)
    if not logps:
        return TokenOutputs(None, None, states)
    head = model.get_output_embeddings()

    def outputs(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        return _logps_and_entropy(lm_head_logits(head, states), targets, temperature, entropy)

    size = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    pieces = list(zip(states.split(size), batch.targets.split(size), strict=True))
    if len(pieces) > 1 and torch.is_grad_enabled():  # keep the logits of one piece at a time
        parts = [checkpoint(outputs, *piece, use_reentrant=False) for piece in pieces]
    else:
        parts = [outputs(*piece) for piece in pieces]
    entropies = [part[1] for part in parts if part[1] is not None]
    return TokenOutputs(
        torch.cat([part[0] for part in parts]),
        torch.cat(entropies) if entropies else None,
        states if hidden else None,
    )


def _logps_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float, entropy: Entropy
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies (M,) of logits (M, V), in float32."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logps = -nn.functional.cross_entropy(logits, targets, reduction="none")
    if entropy == "none":
        return logps, None
    with torch.set_grad_enabled(entropy == "loss" and torch.is_grad_enabled()):
        return logps, entropy_of(logits)
