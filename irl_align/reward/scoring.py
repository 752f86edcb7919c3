"""The one reward pass of a rollout: rewards, and what token-level credit is made of.

Letters beyond the package's legend of shapes: Tmax tokens of the longest completion, R rows,
S completions in a row, Q queries.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from irl_align.errors import UserError
from irl_align.models.loading import evaluating
from irl_align.models.packing import (
    TOKENS_PER_BATCH,
    Ids,
    PackedRows,
    can_pack,
    hidden_states,
    over_packed,
)
from irl_align.reward.attention import attention_rows, require_causal
from irl_align.reward.forward import eos_prefix_rewards, prefix_rewards, whole_rewards
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import (
    RewardFunction,
    ScoreRequest,
    TokenScorer,
    TokenScores,
    require_finite,
)


def score_tokens(reward: RewardFunction, request: ScoreRequest) -> TokenScores:
    """Rewards of completions, with the prefix rewards and attention that are requested.

    A RewardModel gives all of it in one forward; other rewards give rewards and prefixes by their
    own methods. With eos_prefixes prefixes[:, t] is R(x, y_<t, EOS) for t < T, since heads are
    trained at EOS only; this is one pass over P + 2T tokens. The last one is R(x, y).

    Raises UserError: a prompt is empty, a score is not finite, or the reward cannot give what is
    requested (prefixes of a model that is not causal, attention of one that has none to read).
    """
    request = replace(
        request,
        prompts=[list(prompt) for prompt in request.prompts],
        completions=[list(completion) for completion in request.completions],
    )
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise UserError(f"reward: prompt {number} has no tokens; expected at least one")
    if request.eos_prefixes and not request.prefixes:
        raise UserError("reward: eos_prefixes without prefixes; expected both, or neither")
    if isinstance(reward, TokenScorer):
        scores = reward.score_tokens(request)
    elif isinstance(reward, RewardModel):
        scores = _model_scores(reward, request)
    else:
        scores = _other_scores(reward, request)
    for name, values in vars(scores).items():
        if values is not None:
            require_finite(name, values)
    return scores


def policy_attention(
    model: PreTrainedModel,
    prompts: Ids,
    completions: Ids,
    max_batch_tokens: int = TOKENS_PER_BATCH,
) -> Tensor:
    """The policy's attention while it wrote, for abc (ABC-D of arXiv:2402.00782): (B, Tmax).

    A_t is the last layer's attention, mean over heads, of the query that chose y_t, which is at the
    token before it. A token's weight is the mean of A_t(y_s) over the steps t = s + 1 .. T - 1
    that could attend to it. No step attends to the last token, which weighs 0, so a completion
    of one token has no mass (abc then falls back to the uniform split). The paper's code puts each
    weight one token too late, and gives NaN at T = 1. float32 on the CPU, not renormalised.
    """
    attention = torch.zeros(len(prompts), max(map(len, completions), default=0))

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        places = packed.places()[:, 1:]  # (B, T)
        with attention_rows(model) as reader:
            reader.queries = _by_row(packed, places)
            hidden_states(model, packed)
            rows = _by_completion(packed, reader.take(), places.shape[1])  # (B, T, L)
        seen = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))  # (B, query, token)
        step = torch.arange(places.shape[1], device=seen.device)
        # The query at y_(t-1) chooses y_t; the one at the last token chose nothing.
        asks = (step < packed.length[:, None] - 1)[:, :, None] & (step[:, None] >= step)
        mean = (seen * asks).sum(1) / asks.sum(1).clamp(min=1)
        attention[batch, : mean.shape[1]] = mean.cpu()

    with evaluating(model):
        over_packed(one_batch, model, prompts, completions, max_batch_tokens)
    return attention


def _model_scores(reward: RewardModel, request: ScoreRequest) -> TokenScores:
    """Scores of a RewardModel, in one forward."""
    prompts, completions = request.prompts, request.completions
    if not (request.prefixes or request.attention):
        return TokenScores(reward.score_ids(prompts, completions, None))
    reward.require_no_echo()
    model = reward.model
    require_causal(model)
    rewards = torch.zeros(len(prompts))
    scores = torch.zeros(len(prompts), request.longest + 1) if request.prefixes else None
    weights = torch.zeros(len(prompts), request.longest) if request.attention else None
    eos = _eos_id(reward) if request.eos_prefixes else None
    budget = reward.max_batch_tokens if eos is None else reward.max_batch_tokens // 2

    def one_batch(batch: list[int], packed: PackedRows) -> None:
        with attention_rows(model) if request.attention else contextlib.nullcontext() as reader:
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
            pooled = _pooled_attention(packed, reader.take())
            weights[batch, : pooled.shape[1]] = pooled.cpu()

    with evaluating(model):
        over_packed(one_batch, model, prompts, completions, budget)
    return TokenScores(rewards, scores, weights)


def _other_scores(reward: RewardFunction, request: ScoreRequest) -> TokenScores:
    """Scores by a reward's own methods: an implicit reward, or a user's."""
    kind = type(reward).__name__
    if request.attention:
        raise UserError(
            f"reward: {kind} has no attention to split by; expected a RewardModel, or credit "
            "sparse, uniform, red or random"
        )
    if request.eos_prefixes:
        raise UserError(
            f"reward: {kind} does not score prefixes with EOS appended; expected a RewardModel, "
            "or eos_prefixes: false"
        )
    if not request.prefixes:
        return TokenScores(reward.score_ids(request.prompts, request.completions).float())
    rows = reward.prefix_scores_ids(request.prompts, request.completions)
    whole = torch.tensor([float(row[-1]) for row in rows])
    padded = pad_sequence(rows, batch_first=True).float() if rows else torch.zeros(0, 1)
    return TokenScores(whole, padded)


def _prefix_rewards(reward: RewardModel, packed: PackedRows, eos: int | None) -> Tensor:
    """Rewards of a batch's prefixes, 0 after each completion's end: (B, T + 1)."""
    if eos is None:
        values = prefix_rewards(reward.model, reward.settings, packed)
    else:
        values = eos_prefix_rewards(reward.model, reward.settings, packed, eos)
    step = torch.arange(values.shape[1], device=values.device)
    return values.where(step <= packed.length[:, None], torch.zeros_like(values))


def _by_row(packed: PackedRows, places: Tensor) -> Tensor:
    """Columns (B, Q) of completions as those of rows, S completions in each at most: (R, S Q)."""
    slot, most = _slots(packed.row)
    queries = places.new_zeros(len(packed.input_ids), most, places.shape[1])
    queries[packed.row, slot] = places
    return queries.flatten(1)


def _by_completion(packed: PackedRows, rows: Tensor, queries: int) -> Tensor:
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


def _pooled_attention(packed: PackedRows, rows: Tensor) -> Tensor:
    """Attention of each completion's last token on the completion's tokens: (B, T)."""
    places = packed.places()[:, 1:]
    own = _by_completion(packed, rows, 1)[:, 0].gather(1, places)
    step = torch.arange(places.shape[1], device=own.device)
    return own.where(step < packed.length[:, None], torch.zeros_like(own))


def _eos_id(reward: RewardModel) -> int:
    """EOS for prefixes. Raises UserError: there is none, or the model takes no masks by token."""
    config = reward.model.config
    if not can_pack(reward.model, 0):
        raise UserError(
            "reward model: eos_prefixes needs a model that takes a mask and positions per token; "
            f"{config.model_type} with {config._attn_implementation} attention is not known to: "
            "expected eos_prefixes: false"
        )
    return reward.text_end
