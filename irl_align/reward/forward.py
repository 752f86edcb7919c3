"""Forward passes of an explicit reward: packed rows in, rewards of completions and prefixes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from irl_align.models.lm_head import head_logprobs
from irl_align.models.packing import PackedRows, hidden_states
from irl_align.reward.losses import bound, pessimistic
from irl_align.reward.settings import RewardSettings


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The head (1, H) of a sequence classifier; (k, H) of an ensemble of heads."""
    head: torch.nn.Linear = getattr(model, "score")  # noqa: B009  (torch types it as a tensor)
    return head


def head_values(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """The head's output, computed in float32 also under autocast: (..., H) -> (...).

    Of an ensemble's k heads: (..., k).
    """
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)


def whole_rewards(model: PreTrainedModel, settings: RewardSettings, packed: PackedRows) -> Tensor:
    """Reward of each whole completion: (B,). Differentiable.

    Without settings.penalty an ensemble of k heads gives their rewards separately: (B, k).

    With echo a completion in `packed` is y, x and EOS; the log-prob term covers y only.
    """
    hidden = hidden_states(model, packed)
    reward = head_values(score_head(model), hidden[packed.row, packed.ends()])
    if settings.lm_coef:
        after = packed.before + 2 if settings.echo else 0  # tokens of x, which starts at 0, and EOS
        length = packed.length - after
        means = _mean_logps(model, hidden, packed, length)
        means = means.gather(1, length[:, None]).squeeze(1)
        reward = _with_logps(reward, settings.lm_coef * means)
    return bounded_and_centred(reward, settings)


def prefix_rewards(model: PreTrainedModel, settings: RewardSettings, packed: PackedRows) -> Tensor:
    """Reward of every prefix of each completion, the empty one first: (B, T + 1).

    One pass of a causal backbone. Values after a completion's end are undefined. Differentiable.
    """
    hidden = hidden_states(model, packed)
    reward = head_values(score_head(model), hidden[packed.row[:, None], packed.places()])
    if settings.lm_coef:
        means = _mean_logps(model, hidden, packed, packed.length)
        reward = _with_logps(reward, settings.lm_coef * means)
    return bounded_and_centred(reward, settings)


def eos_prefix_rewards(
    model: PreTrainedModel, settings: RewardSettings, packed: PackedRows, eos: int
) -> Tensor:
    """R(x, y_<t, EOS) for t < T, then R(x, y): (B, T + 1). Undefined after a completion's end.

    The L columns of a row are followed by EOS_0 .. EOS_(T-1) of each of its completions. EOS_t has
    the position of y_t; it sees itself and what the token before it sees, and no token sees it.
    """
    width = packed.input_ids.shape[1]
    step = torch.arange(int(packed.length.max()) + 1, device=packed.row.device)
    column = (packed.start - packed.before - 1)[:, None] + step  # of EOS_t among the new ones
    real = step[:-1] < packed.length[:, None]  # (B, T)
    before = step.new_zeros(len(packed.input_ids), int((column[:, 0] + packed.length).max()))
    row = packed.row[:, None].expand_as(real)
    before[row[real], column[:, :-1][real]] = packed.places()[:, :-1][real]
    hidden = model.base_model(
        input_ids=pad(packed.input_ids, (0, before.shape[1]), value=eos),
        **_inputs_with_appended(model, packed, before),
        use_cache=False,
    )[0]
    read = torch.where(step < packed.length[:, None], width + column, packed.ends()[:, None])
    values = head_values(score_head(model), hidden[packed.row[:, None], read])
    if settings.lm_coef:
        means = _eos_mean_logps(model, packed, hidden, eos)
        values = _with_logps(values, settings.lm_coef * means)
    return bounded_and_centred(values, settings)


def bounded_and_centred(reward: Tensor, settings: RewardSettings) -> Tensor:
    """Raw rewards of any shape with the settings' bound applied and their mean subtracted.

    With settings.penalty the last dimension has an ensemble's heads, which become one number.
    """
    if settings.bound is not None:
        reward = bound(reward, settings.bound)
    if settings.penalty is not None:
        reward = pessimistic(reward - reward.new_tensor(settings.centres or 0.0), settings.penalty)
    return reward - settings.mean


def _with_logps(reward: Tensor, logps: Tensor) -> Tensor:
    """Rewards (...) plus log-probs (...), which are the same for all heads of rewards (..., k)."""
    return reward + (logps if reward.ndim == logps.ndim else logps[..., None])


def _output_layer(model: PreTrainedModel) -> torch.nn.Module | Tensor:
    """Output matrix of a reward's backbone: its own `lm_head`, or the tied input embeddings."""
    own: torch.nn.Module | None = getattr(model, "lm_head", None)
    if own is not None:
        return own
    embeddings: Any = model.get_input_embeddings()
    weight: Tensor = embeddings.weight
    return weight


def _mean_logps(
    model: PreTrainedModel, hidden: Tensor, packed: PackedRows, length: Tensor
) -> Tensor:
    """Mean log-prob of the tokens of every prefix of a completion: (B, T + 1), 0 of the empty one.

    hidden: last hidden states (R, L, H). length: (B,) tokens that count; T is their maximum.
    """
    count = torch.arange(int(length.max()) + 1, device=length.device)
    places, rows = packed.places()[:, : len(count)], packed.row[:, None]
    real = count[1:] <= length[:, None]  # (B, T)
    targets = packed.input_ids[rows, places[:, 1:]][real]
    logps = torch.zeros(real.shape, device=real.device)
    logps[real] = head_logprobs(_output_layer(model), hidden[rows, places[:, :-1]][real], targets)
    return pad(logps.cumsum(1), (1, 0)) / count.clamp(min=1)


def _eos_mean_logps(model: PreTrainedModel, packed: PackedRows, hidden: Tensor, eos: int) -> Tensor:
    """Mean log-prob of y_<t and EOS for t < T, then of y, by the reward's backbone: (B, T + 1)."""
    places, row = packed.places(), packed.row[:, None]
    step = torch.arange(places.shape[1], device=places.device)
    real = step[1:] <= packed.length[:, None]  # (B, T)
    before = hidden[row, places[:, :-1]][real]
    head = _output_layer(model)
    own, end = torch.zeros(2, *real.shape, device=hidden.device)
    targets = packed.input_ids[row, places[:, 1:]][real]
    own[real] = head_logprobs(head, before, targets)
    end[real] = head_logprobs(head, before, torch.full_like(targets, eos))
    sums = pad(own.cumsum(1), (1, 0))  # (B, T + 1)
    finished = (sums + pad(end, (0, 1))) / (step + 1)
    return torch.where(step < packed.length[:, None], finished, sums / step.clamp(min=1))


def _inputs_with_appended(
    model: PreTrainedModel, packed: PackedRows, before: Tensor
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Positions and masks of rows with E tokens appended, each to be read after column `before`.

    before: (R, E). The masks are (R, 1, L + E, L + E), for layers with a sliding window narrowed to
    it.
    """
    rows, width = packed.input_ids.shape
    if packed.position_ids is None:  # one completion per row, and a mask of padding
        position = torch.arange(width, device=before.device).expand(rows, -1)
        seen = packed.attention_mask[:, None].bool() & position[:1, :, None].ge(position[:1, None])
    else:
        position, seen = packed.position_ids, packed.attention_mask[:, 0]
    itself = torch.eye(before.shape[1], dtype=torch.bool, device=before.device)
    row = torch.arange(rows, device=before.device)[:, None]
    appended = torch.cat([seen[row, before], itself.expand(rows, -1, -1)], dim=2)
    seen = torch.cat([pad(seen, (0, before.shape[1])), appended], dim=1)
    position = torch.cat([position, position.gather(1, before) + 1], dim=1)
    masks = _masks_by_layer(model, seen[:, None], position)
    return {"position_ids": position, "attention_mask": masks}


def _masks_by_layer(
    model: PreTrainedModel, seen: Tensor, position: Tensor
) -> Tensor | dict[str, Tensor]:
    """The mask (R, 1, L, L) as the model takes it: one, or one for each kind of layer."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None:
        return seen
    near: Tensor = seen & (position[:, None, :, None] - position[:, None, None, :] < window)
    if len(set(getattr(config, "layer_types", None) or ())) < 2:
        return near
    return {"full_attention": seen, "sliding_attention": near}
