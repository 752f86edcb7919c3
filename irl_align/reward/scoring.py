"""The one reward pass of a rollout: rewards, and what token-level credit is made of.

Legend of shapes: B completions, P prompt tokens, T completion tokens (padded to the longest, Tmax),
R rows, S completions in a row, L columns of a row, Q queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.models.lm_head import head_logprobs
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    PackedRows,
    can_pack,
    hidden_states,
    over_packed,
)
from irl_align.reward.attention import attention_rows, require_causal
from irl_align.reward.model import (
    RewardFunction,
    RewardModel,
    RewardSettings,
    last_layer_head,
    prefix_rewards,
    require_finite,
    score_head,
    settled,
    whole_rewards,
)

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class TokenScores:
    """What one reward pass says of B completions: float32 on the CPU, 0 on padding."""

    rewards: Tensor
    """R(x, y) of each completion as it was sampled: (B,)."""
    prefixes: Tensor | None = None
    """R(x, y_<t), the empty prefix first and R(x, y) last: (B, Tmax + 1)."""
    attention: Tensor | None = None
    """Last layer's attention of the pooled (last) token on the completion's tokens, mean over
    heads, not renormalised: (B, Tmax)."""


@runtime_checkable
class TokenScorer(Protocol):
    """A reward that does its own pass, such as one with a tokenizer of its own."""

    def score_tokens(
        self,
        prompts: Ids,
        completions: Ids,
        *,
        prefixes: bool,
        attention: bool,
        eos_prefixes: bool = False,
    ) -> TokenScores:
        """As the function of the same name."""


def score_tokens(
    reward: RewardFunction,
    prompts: Ids,
    completions: Ids,
    *,
    prefixes: bool,
    attention: bool,
    eos_prefixes: bool = False,
) -> TokenScores:
    """Rewards of completions, with prefix rewards and attention where asked for.

    A RewardModel gives all of it in one forward; other rewards give rewards and prefixes by their
    own methods. eos_prefixes: prefixes[:, t] is R(x, y_<t, EOS) for t < T, since heads are trained
    at EOS only, in one pass over P + 2T tokens, the prompt's once per row; the last is R(x, y).

    Raises UserError: a prompt is empty, a score is not finite, or the reward cannot give what is
    asked for (prefixes of a model that is not causal, attention of one that has none to read).
    """
    prompts, completions = [list(p) for p in prompts], [list(c) for c in completions]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"reward: prompt {number} has no tokens; expected at least one")
    if eos_prefixes and not prefixes:
        raise UserError("reward: eos_prefixes without prefixes; expected both, or neither")
    wanted = {"prefixes": prefixes, "attention": attention, "eos_prefixes": eos_prefixes}
    if isinstance(reward, TokenScorer):
        scores = reward.score_tokens(prompts, completions, **wanted)
    elif isinstance(reward, RewardModel):
        scores = _model_scores(reward, prompts, completions, **wanted)
    else:
        scores = _other_scores(reward, prompts, completions, **wanted)
    _check_finite(scores)
    return scores


def policy_attention(
    model: PreTrainedModel,
    prompts: Ids,
    completions: Ids,
    max_batch_tokens: int = TOKENS_PER_BATCH,
) -> Tensor:
    """The policy's attention while it wrote, for abc (ABC-D of arXiv:2402.00782): (B, Tmax).

    With A_t the last layer's attention, mean over heads, of the query that chose y_t, which is at
    the token before it, a token's weight is the mean of A_t(y_s) over the steps t = s + 1 .. T - 1
    that could attend to it. The last token is attended to by no step and weighs 0, so a completion
    of one token has no mass (abc then falls back to the uniform split). The paper's code puts each
    weight one token too late, and gives NaN at T = 1. float32 on the CPU, not renormalised.
    """
    attention = torch.zeros(len(prompts), max(map(len, completions), default=0))

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        places = packed.places()[:, 1:]  # (B, T)
        with attention_rows(model) as reader:
            reader.queries = _by_row(packed, places)
            hidden_states(model, packed)
            rows = _of_completions(packed, reader.take(), places.shape[1])  # (B, T, L)
        seen = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))  # (B, query, token)
        step = torch.arange(places.shape[1], device=seen.device)
        # The query at y_(t-1) chooses y_t; the one at the last token chose nothing.
        asks = (step < packed.length[:, None] - 1)[:, :, None] & (step[:, None] >= step)
        mean = (seen * asks).sum(1) / asks.sum(1).clamp(min=1)
        attention[batch, : mean.shape[1]] = mean.cpu()

    with _evaluating(model):
        over_packed(one_batch, model, prompts, completions, max_batch_tokens)
    return attention


def _model_scores(
    reward: RewardModel,
    prompts: Ids,
    completions: Ids,
    prefixes: bool,
    attention: bool,
    eos_prefixes: bool,
) -> TokenScores:
    if not (prefixes or attention):
        return TokenScores(reward.score_ids(prompts, completions, None))
    reward.require_no_echo()
    model = reward.model
    require_causal(model)
    longest = max(map(len, completions), default=0)
    rewards = torch.zeros(len(prompts))
    scores = torch.zeros(len(prompts), longest + 1) if prefixes else None
    weights = torch.zeros(len(prompts), longest) if attention else None
    eos = _eos_id(reward) if eos_prefixes else None
    budget = reward.max_batch_tokens if eos is None else reward.max_batch_tokens // 2

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        with attention_rows(model) if attention else contextlib.nullcontext() as reader:
            if reader is not None:
                reader.queries = _by_row(packed, packed.ends()[:, None])
            if scores is None:
                whole = whole_rewards(model, reward.settings, packed)
            else:
                values = _prefix_rewards(reward, packed, eos)
                whole = values.gather(1, packed.length[:, None]).squeeze(1)
                scores[batch, : values.shape[1]] = values.cpu()
        rewards[batch] = whole.cpu()
        if weights is not None and reader is not None:
            own = _pooled(packed, reader.take())
            weights[batch, : own.shape[1]] = own.cpu()

    with _evaluating(model):
        over_packed(one_batch, model, prompts, completions, budget)
    return TokenScores(rewards, scores, weights)


def _other_scores(
    reward: RewardFunction,
    prompts: Ids,
    completions: Ids,
    prefixes: bool,
    attention: bool,
    eos_prefixes: bool,
) -> TokenScores:
    """Scores by a reward's own methods: an implicit reward, or a user's."""
    kind = type(reward).__name__
    if attention:
        raise UserError(
            f"reward: {kind} has no attention to split by; expected a RewardModel, or credit "
            "sparse, uniform, red or random"
        )
    if eos_prefixes:
        raise UserError(
            f"reward: {kind} does not score prefixes with EOS appended; expected a RewardModel, "
            "or eos_prefixes: false"
        )
    if not prefixes:
        return TokenScores(reward.score_ids(prompts, completions).float())
    rows = reward.prefix_scores_ids(prompts, completions)
    whole = torch.tensor([float(row[-1]) for row in rows])
    padded = pad_sequence(rows, batch_first=True).float() if rows else torch.zeros(0, 1)
    return TokenScores(whole, padded)


def _prefix_rewards(reward: RewardModel, packed: PackedRows, eos: int | None) -> Tensor:
    """Rewards of a batch's prefixes, 0 after each completion's end: (B, T + 1)."""
    if eos is None:
        values = prefix_rewards(reward.model, reward.settings, packed)
    else:
        values = _eos_prefix_rewards(reward.model, reward.settings, packed, eos)
    step = torch.arange(values.shape[1], device=values.device)
    return values.where(step <= packed.length[:, None], torch.zeros_like(values))


def _eos_prefix_rewards(
    model: PreTrainedModel, settings: RewardSettings, packed: PackedRows, eos: int
) -> Tensor:
    """R(x, y_<t, EOS) for t < T, then R(x, y): (B, T + 1); nothing after a completion's end.

    After the L columns of a row come EOS_0 .. EOS_(T-1) of each of its completions. EOS_t stands at
    the position of y_t; it sees itself and what the token before it sees, and no token sees it.
    """
    width = packed.input_ids.shape[1]
    step = torch.arange(int(packed.length.max()) + 1, device=packed.row.device)
    column = (packed.start - packed.before - 1)[:, None] + step  # of EOS_t among the new ones
    asked = step[:-1] < packed.length[:, None]  # (B, T)
    before = step.new_zeros(len(packed.input_ids), int((column[:, 0] + packed.length).max()))
    row = packed.row[:, None].expand_as(asked)
    before[row[asked], column[:, :-1][asked]] = packed.places()[:, :-1][asked]
    hidden = model.base_model(
        input_ids=torch.nn.functional.pad(packed.input_ids, (0, before.shape[1]), value=eos),
        **_with_appended(model, packed, before),
        use_cache=False,
    )[0]
    read = torch.where(step < packed.length[:, None], width + column, packed.ends()[:, None])
    values = score_head(model)(hidden[packed.row[:, None], read]).squeeze(-1).float()
    if settings.lm_coef:
        values = values + settings.lm_coef * _eos_mean_logps(model, packed, hidden, eos)
    return settled(values, settings)


def _with_appended(
    model: PreTrainedModel, packed: PackedRows, before: Tensor
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Positions and masks of rows after whose L columns come tokens E, each after column `before`.

    before: (R, E). The masks, (R, 1, L + E, L + E), are narrowed by the sliding window of the
    layers that have one.
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
    seen = torch.cat([torch.nn.functional.pad(seen, (0, before.shape[1])), appended], dim=1)
    position = torch.cat([position, position.gather(1, before) + 1], dim=1)
    masks = _masks_by_layer(model, seen[:, None], position)
    return {"position_ids": position, "attention_mask": masks}


def _eos_mean_logps(model: PreTrainedModel, packed: PackedRows, hidden: Tensor, eos: int) -> Tensor:
    """Mean log-prob of y_<t and EOS for t < T, then of y, by the reward's backbone: (B, T + 1)."""
    places, row = packed.places(), packed.row[:, None]
    step = torch.arange(places.shape[1], device=places.device)
    real = step[1:] <= packed.length[:, None]  # (B, T)
    before = hidden[row, places[:, :-1]][real]
    head = last_layer_head(model)
    own, end = torch.zeros(2, *real.shape, device=hidden.device)
    targets = packed.input_ids[row, places[:, 1:]][real]
    own[real] = head_logprobs(head, before, targets)
    end[real] = head_logprobs(head, before, torch.full_like(targets, eos))
    sums = torch.nn.functional.pad(own.cumsum(1), (1, 0))  # (B, T + 1)
    finished = (sums + torch.nn.functional.pad(end, (0, 1))) / (step + 1)
    return torch.where(step < packed.length[:, None], finished, sums / step.clamp(min=1))


def _masks_by_layer(
    model: PreTrainedModel, seen: Tensor, position: Tensor
) -> Tensor | dict[str, Tensor]:
    """The mask (R, 1, L, L) that the layers take: narrowed by the window where they have one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None:
        return seen
    near = seen & (position[:, None, :, None] - position[:, None, None, :] < window)
    if len(set(getattr(config, "layer_types", None) or ())) < 2:
        return near
    return {"full_attention": seen, "sliding_attention": near}


def _by_row(packed: PackedRows, places: Tensor) -> Tensor:
    """Columns (B, Q) of completions as those of rows, S completions in each at most: (R, S Q)."""
    slot, most = _slots(packed.row)
    queries = places.new_zeros(len(packed.input_ids), most, places.shape[1])
    queries[packed.row, slot] = places
    return queries.flatten(1)


def _of_completions(packed: PackedRows, rows: Tensor, queries: int) -> Tensor:
    """Attention of the queries of `_by_row` (R, S Q, L) by completion: (B, Q, L)."""
    slot, most = _slots(packed.row)
    return rows.view(len(rows), most, queries, -1)[packed.row, slot]


def _slots(row: Tensor) -> tuple[Tensor, int]:
    """Number of each completion within its row (B,), and how many the fullest row has.

    row: (B,) in ascending order.
    """
    count = row.bincount()
    first = count.cumsum(0) - count
    return torch.arange(len(row), device=row.device) - first[row], int(count.max())


def _pooled(packed: PackedRows, rows: Tensor) -> Tensor:
    """Attention of each completion's last token on the completion's tokens: (B, T)."""
    places = packed.places()[:, 1:]
    own = _of_completions(packed, rows, 1)[:, 0].gather(1, places)
    step = torch.arange(places.shape[1], device=own.device)
    return own.where(step < packed.length[:, None], torch.zeros_like(own))


def _eos_id(reward: RewardModel) -> int:
    """EOS for prefixes. Raises UserError: there is none, or the model takes no masks by token."""
    config, eos = reward.model.config, reward.tokenizer.eos_token_id
    if not can_pack(reward.model, 0):
        raise UserError(
            "reward model: eos_prefixes needs a model that takes a mask and positions per token; "
            f"{config.model_type} with {config._attn_implementation} attention is not known to: "
            "expected eos_prefixes: false"
        )
    if eos is None:
        raise UserError(
            "reward model: eos_prefixes, but its tokenizer has no EOS token; expected one"
        )
    return int(eos)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside the block, and the mode as it was after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_finite(scores: TokenScores) -> None:
    for name, values in vars(scores).items():
        if values is not None:
            require_finite(name, values)
