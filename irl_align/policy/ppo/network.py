"""The network that PPO trains: the policy, and the critic beside it or on its trunk.

Legend of shapes: B completions, R rows, P prompt tokens, T completion tokens, L columns of a row,
M completion tokens of a micro-batch, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from irl_align.models.lm_head import LOGITS_AT_ONCE, has_plain_logits, lm_head_logits
from irl_align.models.lora import AdapterSwitch, adapter_weights
from irl_align.models.packing import PackedRows, model_inputs, pack_rows
from irl_align.policy.ppo.losses import entropy as entropy_of
from irl_align.reward.losses import bound

Ids = Sequence[Sequence[int]]
Entropy = Literal["none", "monitor", "loss"]
CRITIC = "critic"  # name of its adapter, where it is one of the policy's trunk


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows on the device, and where their completion tokens are."""

    inputs: dict[str, Any]
    """Of the models' forward."""
    flat: Tensor
    """(M,) place of the state s_t in (R * L): the token before y_t."""
    targets: Tensor
    """(M,) y_t."""
    index: Tensor
    """(M,) place of y_t in the rollout's (B, T), flattened."""
    slots: int
    """R * L, padding included."""
    counted: bool = True
    """False: another process's, passed through here too since all must take part in every pass."""


def micro_batch(
    prompts: Ids,
    completions: Ids,
    rows: Sequence[Sequence[int]],
    pad: int,
    longest: int,
    device: torch.device,
) -> MicroBatch:
    """Pack these rows of completion numbers; longest: T of the rollout's arrays."""
    packed = pack_rows(prompts, completions, rows, pad)
    places = packed.places()  # (b, T + 1)
    step = torch.arange(places.shape[1] - 1)
    real = step < packed.length[:, None]
    row = packed.row[:, None].expand_as(real)[real]
    numbers = torch.tensor([number for chosen in rows for number in chosen])
    columns = packed.input_ids.shape[1]
    return MicroBatch(
        {name: _to(value, device) for name, value in _inputs(packed).items()},
        (row * columns + places[:, :-1][real]).to(device),
        packed.input_ids[row, places[:, 1:][real]].to(device),
        (numbers[:, None] * longest + step)[real].to(device),
        packed.input_ids.numel(),
    )


def _inputs(packed: PackedRows) -> dict[str, Any]:
    """What the models take. Padding comes last and attention is causal, so where every row has one
    completion no mask is needed, and torch's causal attention is the faster for it."""
    inputs = model_inputs(packed)
    if packed.position_ids is None:
        del inputs["attention_mask"]
    return inputs


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


class Outputs(NamedTuple):
    """What the network says of the M completion tokens of a micro-batch, in float32."""

    logps: Tensor | None
    """(M,) log pi(y_t | s_t) at the temperature."""
    entropy: Tensor | None
    """(M,) of pi(. | s_t) at the temperature."""
    values: Tensor | None
    """(M,) V(s_t)."""


class Critic(nn.Module):
    """V(s) = (bound(head(h_s)) - mean) / std on a trunk of its own, or (trunk None) the policy's.

    switch: of the policy's trunk, on which the critic is then an adapter.
    """

    def __init__(
        self,
        trunk: nn.Module | None,
        head: nn.Linear,
        limit: float | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        switch: AdapterSwitch | None = None,
    ) -> None:
        super().__init__()
        self.switch = switch
        self.trunk = trunk
        self.head = head
        self.limit = limit
        self.mean, self.std = mean, std

    @property
    def on_policy(self) -> bool:
        """Whether it is a head on the policy's own states, and moves with the policy."""
        return self.trunk is None and self.switch is None

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (M,) of hidden states (M, H)."""
        values = self.head(hidden).squeeze(-1).float()
        if self.limit is not None:
            values = bound(values, self.limit)
        out: Tensor = (values - self.mean) / self.std
        return out


class Network(nn.Module):
    """Policy and critic in one module, so that accelerate prepares, saves and loads both."""

    def __init__(self, policy: PreTrainedModel, critic: Critic | None, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.temperature = temperature

    def policy_parameters(self) -> list[nn.Parameter]:
        """What moves with the policy, a head on its trunk included."""
        shared = self.critic is not None and self.critic.on_policy
        critic = {id(weight) for weight in self.critic_parameters()}
        found = self.parameters() if shared else self.policy.parameters()
        return [weight for weight in found if weight.requires_grad and id(weight) not in critic]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Of a critic with a trunk or an adapter of its own."""
        if self.critic is None or self.critic.on_policy:
            return []
        switched = self.critic.switch is not None
        adapter = adapter_weights(self.policy, CRITIC).values() if switched else ()
        return [w for w in (*self.critic.parameters(), *adapter) if w.requires_grad]

    def forward(
        self, batch: MicroBatch, logps: bool = True, values: bool = True, entropy: Entropy = "none"
    ) -> Outputs:
        """Log-probs, entropies and values of the micro-batch's tokens, those that are asked for."""
        critic = self.critic if values else None
        shared = critic is not None and critic.on_policy
        out = Tokens(None, None, None)
        if logps or shared:
            out = tokens_of(self.policy, batch, self.temperature, entropy, logps, shared)
        if critic is None:
            return Outputs(out.logps, out.entropy, None)
        if critic.switch is not None:
            with critic.switch.on(CRITIC):
                hidden: Tensor | None = states(self.policy.base_model, batch)
        else:
            hidden = out.hidden if critic.trunk is None else states(critic.trunk, batch)
        assert hidden is not None
        return Outputs(out.logps, out.entropy, critic(hidden))


class Tokens(NamedTuple):
    """What a language model says of M tokens."""

    logps: Tensor | None
    """(M,)."""
    entropy: Tensor | None
    """(M,)."""
    hidden: Tensor | None
    """(M, H) of the states before them."""


def states(trunk: nn.Module, batch: MicroBatch) -> Tensor:
    """Last hidden states at the states s_t: (M, H)."""
    hidden: Tensor = trunk(**batch.inputs)[0]
    return hidden.flatten(0, 1).index_select(0, batch.flat)


def tokens_of(
    model: PreTrainedModel,
    batch: MicroBatch,
    temperature: float,
    entropy: Entropy = "none",
    logps: bool = True,
    hidden: bool = False,
) -> Tokens:
    """Log-probs, entropies and hidden states of a micro-batch's tokens, those that are asked for.

    The output layer runs on completion positions only, in pieces that fit the memory; log-softmax
    is in float32 whatever the layers before it are.
    """
    if not has_plain_logits(model):  # scaled or capped: the model's own forward does it
        out = model(**batch.inputs, output_hidden_states=hidden)
        found: list[Tensor] = [out.logits, *([out.hidden_states[-1]] if hidden else [])]
        logits, *last = [x.flatten(0, 1).index_select(0, batch.flat) for x in found]
        own = _logits_to_logps(logits, batch.targets, temperature, entropy)
        return Tokens(*own, last[0] if last else None)
    chosen = states(model.base_model, batch)
    if not logps:
        return Tokens(None, None, chosen)
    head = model.get_output_embeddings()
    size = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    pieces = list(zip(chosen.split(size), batch.targets.split(size), strict=True))
    parts = [_piece(head, *piece, temperature, entropy, len(pieces) > 1) for piece in pieces]
    spread = [part[1] for part in parts if part[1] is not None]
    return Tokens(
        torch.cat([part[0] for part in parts]),
        torch.cat(spread) if spread else None,
        chosen if hidden else None,
    )


def _piece(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: Entropy,
    recompute: bool,
) -> tuple[Tensor, Tensor | None]:
    def of(states: Tensor) -> tuple[Tensor, Tensor | None]:
        return _logits_to_logps(lm_head_logits(head, states), targets, temperature, entropy)

    if recompute and torch.is_grad_enabled():  # of several pieces only one's logits are held
        pair: tuple[Tensor, Tensor | None] = checkpoint(of, hidden, use_reentrant=False)
        return pair
    return of(hidden)


def _logits_to_logps(
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
