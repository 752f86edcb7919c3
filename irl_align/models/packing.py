"""Batches of token ids within a budget of tokens, in which completions share their prompt.

Completions of one prompt share a row x y_1 y_2 ...: every y_i sees the prompt and itself (a block
mask), at the positions that it has in x y_i, so its hidden states equal those of x y_i.

Legend of shapes: B completions, R rows, P prompt tokens, T completion tokens, L columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from irl_align.errors import UserError

TOKENS_PER_BATCH = 16384

# Causal decoders that take a block mask and position ids, and keep no state besides attention.
PACKABLE = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"})
_ROW = 256  # columns; a longer row costs more in attention than it saves in prompt tokens
_PROMPTS = 4  # a row may also be as long as four of its prompts

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PackedRows:
    """A batch of rows, and the place of each completion in them."""

    input_ids: Tensor
    """(R, L) token ids, padded at the end."""
    attention_mask: Tensor
    """(R, 1, L, L), true where a column is visible; (R, L) when no row has two completions."""
    position_ids: Tensor | None
    """(R, L); None when no row has two completions: then the model counts them itself."""
    row: Tensor
    """(B,) row of each completion."""
    before: Tensor
    """(B,) column of the last prompt token, which is the place of the empty prefix."""
    start: Tensor
    """(B,) column of the first completion token."""
    length: Tensor
    """(B,) number of completion tokens, T."""

    def to(self, device: torch.device) -> PackedRows:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return PackedRows(**moved)

    def places(self) -> Tensor:
        """Columns of every prefix, the empty one first; 0 after a completion's end: (B, T + 1)."""
        step = torch.arange(int(self.length.max()) + 1, device=self.row.device)
        columns = torch.where(step == 0, self.before[:, None], self.start[:, None] + step - 1)
        return columns.where(step <= self.length[:, None], 0)

    def ends(self) -> Tensor:
        """Column of the last token of each completion, or of its prompt where it has none: (B,)."""
        return torch.where(self.length > 0, self.start + self.length - 1, self.before)


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: at most max_tokens with padding, or one row."""
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    start = 0
    while start < len(order):
        rows = max(1, max_tokens // max(1, lengths[order[start]]))
        yield [int(row) for row in order[start : start + rows]]
        start += rows


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, L), padded at the end."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids, mask


def can_pack(model: PreTrainedModel, longest: int) -> bool:
    """Whether completions of one prompt may share a row of this model.

    longest: tokens of the longest prompt and completion. A shorter sliding window would need
    another mask, and only torch's attention (sdpa) takes a block mask.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in PACKABLE
        and config._attn_implementation == "sdpa"
        and (window is None or longest <= window)
    )


def share_prompts(prompts: Ids, completions: Ids, share: bool) -> list[list[int]]:
    """Numbers of the completions in each row; with share=False every completion has its own row.

    Completions of one prompt stay in their order. A completion longer than the limit of a row has
    its own row.
    """
    if not share:
        return [[number] for number in range(len(prompts))]
    rows: list[list[int]] = []
    open_rows: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        key = tuple(prompt)
        row, used = open_rows.get(key, ([], 0))
        if not row or used + len(completion) > row_limit(len(prompt)):
            row, used = [], len(prompt)
            rows.append(row)
        row.append(number)
        open_rows[key] = row, used + len(completion)
    return rows


def row_limit(prompt: int) -> int:
    """Most columns of a row with several completions of a prompt of P tokens."""
    return max(_ROW, _PROMPTS * prompt)


def row_lengths(prompts: Ids, completions: Ids, rows: Sequence[Sequence[int]]) -> list[int]:
    """Columns of each row."""
    return [len(prompts[row[0]]) + sum(len(completions[i]) for i in row) for row in rows]


def pack_rows(
    prompts: Ids, completions: Ids, rows: Sequence[Sequence[int]], pad: int
) -> PackedRows:
    """The rows as tensors; the B completions are in the order of the rows."""
    lengths = row_lengths(prompts, completions, rows)
    shape = (len(rows), max(lengths))
    ids = torch.full(shape, pad, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)  # 0 the prompt, 1.. completions, -1 padding
    places = []
    for r, row in enumerate(rows):
        prompt = prompts[row[0]]
        column = len(prompt)
        ids[r, :column] = torch.as_tensor(prompt, dtype=torch.long)
        positions[r, :column] = torch.arange(column)
        segments[r, :column] = 0
        for segment, number in enumerate(row, start=1):
            completion = completions[number]
            end = column + len(completion)
            ids[r, column:end] = torch.as_tensor(completion, dtype=torch.long)
            positions[r, column:end] = torch.arange(len(prompt), len(prompt) + len(completion))
            segments[r, column:end] = segment
            places.append((r, len(prompt) - 1, column, len(completion)))
            column = end
    where = torch.tensor(places, dtype=torch.long)
    if all(len(row) == 1 for row in rows):
        return PackedRows(ids, (segments >= 0).long(), None, *where.unbind(1))
    own = segments[:, :, None] == segments[:, None, :]
    seen = (own | (segments == 0)[:, None, :]).tril()
    return PackedRows(ids, seen[:, None], positions, *where.unbind(1))


def hidden_states(model: PreTrainedModel, packed: PackedRows) -> Tensor:
    """Last hidden states of a model's backbone: (R, L, H)."""
    hidden: Tensor = model.base_model(**model_inputs(packed))[0]
    return hidden


def model_inputs(packed: PackedRows) -> dict[str, Any]:
    """Keyword arguments of a model's forward pass."""
    inputs = {"input_ids": packed.input_ids, "attention_mask": packed.attention_mask}
    if packed.position_ids is not None:  # some architectures take none
        inputs["position_ids"] = packed.position_ids
    return {**inputs, "use_cache": False}


def context_length(model: PreTrainedModel) -> int | None:
    """Most positions of a model; None for a model without such a limit."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def require_context(lengths: Sequence[int], context: int | None, kind: str) -> None:
    """Raise UserError for the first of (B,) lengths, in tokens, that exceeds a model's context.

    Otherwise some architectures would fail with an unclear error, and models with rotary positions
    would continue with positions that they were never trained on.
    """
    for number, length in enumerate(lengths):
        if context is not None and length > context:
            raise UserError(
                f"completion {number}, with its prompt, has {length} tokens, expected at most the "
                f"{context} of this {kind} model's context: shorten the texts, or leave it out"
            )


def over_packed(
    one_batch: Callable[[list[int], PackedRows], None],
    model: PreTrainedModel,
    prompts: Ids,
    completions: Ids,
    max_batch_tokens: int = TOKENS_PER_BATCH,
    progress: str | None = None,
) -> None:
    """Call `one_batch` with each batch: the numbers of its B completions, and their packed rows.

    The rows are on the model's device, and no gradients are computed. progress: label of a progress
    bar; None shows none. Raises UserError where a prompt and its completion exceed the context.
    """
    totals = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    require_context(totals, context_length(model), model.config.model_type)
    rows = share_prompts(prompts, completions, can_pack(model, max(totals, default=0)))
    pad = model.config.pad_token_id or 0
    with (
        torch.inference_mode(),
        tqdm(total=len(totals), desc=progress, unit="row", disable=progress is None) as bar,
    ):
        for batch in batches_by_tokens(row_lengths(prompts, completions, rows), max_batch_tokens):
            chosen = [rows[r] for r in batch]
            packed = pack_rows(prompts, completions, chosen, pad).to(model.device)
            numbers = [number for row in chosen for number in row]
            one_batch(numbers, packed)
            bar.update(len(numbers))
