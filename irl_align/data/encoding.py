"""Text to token ids and back: one template per data card, applied once.

A prompt's ids start with the tokenizer's BOS where it adds one; a completion's ids end with EOS.
Ids that a policy sampled are never made from text again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.loading import Demonstration, Message, Preference, Prompt, prompt_key
from irl_align.data.tokenizer import (
    check_tokenizer,
    decode,
    decode_batch,
    prepare_tokenizer,
    tokenizer_name,
    train_tokenizer,
)
from irl_align.errors import UserError

__all__ = [
    "Encoded",
    "Templated",
    "check_tokenizer",
    "decode",
    "decode_batch",
    "encode_completions",
    "encode_demonstrations",
    "encode_preferences",
    "encode_prompts",
    "prepare_tokenizer",
    "prompt_text",
    "train_tokenizer",
    "training_texts",
]


class Templated(Protocol):
    """What has a prompt template: a data card, or a reward that takes text."""

    @property
    def name(self) -> str:
        """Name of the data card, for messages."""

    @property
    def template(self) -> str:
        """Text with one {prompt}, or chat."""

    @property
    def lowercase(self) -> bool:
        """Whether prompts and completions are lowercased first."""


class Encoded(NamedTuple):
    """Rows as token ids, and how many were dropped for their length."""

    rows: Dataset
    dropped: int


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    options: DataOptions,
    context: int | None = None,
) -> Encoded:
    """Columns prompt (text as in the data), completion (text), prompt_ids, completion_ids,
    prompt_key; rows in their order.

    context: most tokens of prompt and completion together, the model's positions. Raises
    UserError: a row is too long and options.overlong is error, or no row is left; the chat
    template is missing or cannot render a row; a completion holds the EOS token's own text.
    """
    prompts = [row["prompt"] for row in rows]
    rendered = _render_all(prompts, tokenizer, card)
    prompt_ids = _prompt_ids(rendered, tokenizer, card)
    completion_ids = _completion_ids(rows, "completion", rendered, prompt_ids, tokenizer, card)
    fits = _fitting(prompt_ids, [completion_ids], card, options, context)
    columns: dict[str, list[Any]] = {
        "prompt": [prompt_text(prompt) for prompt in prompts],
        "completion": [_cased(row["completion"], card) for row in rows],
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "prompt_key": [prompt_key(prompt) for prompt in prompts],
    }
    return _encoded(columns, fits)


def encode_preferences(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    options: DataOptions,
    context: int | None = None,
) -> Encoded:
    """Columns prompt, chosen, rejected (text), prompt_ids, chosen_ids, rejected_ids, prompt_key,
    subset, margin; lengths and errors as in encode_demonstrations."""
    prompts = [row["prompt"] for row in rows]
    rendered = _render_all(prompts, tokenizer, card)
    prompt_ids = _prompt_ids(rendered, tokenizer, card)
    chosen_ids, rejected_ids = (
        _completion_ids(rows, column, rendered, prompt_ids, tokenizer, card)
        for column in ("chosen", "rejected")
    )
    fits = _fitting(prompt_ids, [chosen_ids, rejected_ids], card, options, context)
    columns: dict[str, list[Any]] = {
        "prompt": [prompt_text(prompt) for prompt in prompts],
        "chosen": [_cased(row["chosen"], card) for row in rows],
        "rejected": [_cased(row["rejected"], card) for row in rows],
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "prompt_key": [prompt_key(prompt) for prompt in prompts],
        "subset": [row["subset"] for row in rows],
        "margin": [row["margin"] for row in rows],
    }
    return _encoded(columns, fits)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[list[int]]:
    """Ids of the rendered prompts, with BOS exactly once where the tokenizer adds one."""
    return _prompt_ids(_render_all(prompts, tokenizer, card), tokenizer, card)


def encode_completions(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[list[int]]:
    """Ids of completions, each ending with its only EOS, after prompts encoded by encode_prompts.

    With a chat template they are what it writes after the prompt, up to its first EOS.
    """
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    rendered = _render_all(prompts, tokenizer, card)
    return _completion_ids(rows, "completion", rendered, prompt_ids, tokenizer, card)


def training_texts(rows: Iterable[Demonstration], card: Card) -> list[str]:
    """Rendered prompts and completions, each distinct one once: what a tokenizer is trained on."""
    texts: dict[str, None] = {}
    for row in rows:
        if card.template == "chat" or not isinstance(row["prompt"], str):
            raise UserError(
                f"data.card {card.name}: a tokenizer from scratch has no chat template; "
                "expected a card with a plain template"
            )
        texts[card.template.format(prompt=_cased(row["prompt"], card))] = None
        texts[_cased(row["completion"], card)] = None
    return list(texts)


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people and gold metrics: as it is in the data, or one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _cased(text: str, card: Templated) -> str:
    return text.lower() if card.lowercase else text


def _conversation(prompt: Prompt, card: Templated) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": _cased(prompt, card)}]
    return [{"role": turn["role"], "content": _cased(turn["content"], card)} for turn in prompt]


def _render_all(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[str]:
    """Each prompt in the card's card, up to where the completion starts."""
    if card.template != "chat":
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"data.card {card.name}: a conversation needs template: chat")
        return [card.template.format(prompt=_cased(str(prompt), card)) for prompt in prompts]
    check_tokenizer(tokenizer, needs_chat=True)
    conversations = [_conversation(prompt, card) for prompt in prompts]
    return [_chat(turns, tokenizer, card, add_generation_prompt=True) for turns in conversations]


def _chat(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
    add_generation_prompt: bool,
) -> str:
    conversation: list[Any] = list(messages)
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may raise anything that Python may
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"model.chat_template: the template of {tokenizer_name(tokenizer)} cannot render "
            f"a row of data.card {card.name} with the roles {roles}: {' '.join(str(error).split())}"
        ) from error
    return str(text)


def _prompt_ids(
    rendered: Sequence[str], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[list[int]]:
    distinct = list(dict.fromkeys(rendered))
    ids = dict(zip(distinct, _ids(tokenizer, distinct), strict=True))
    bos = [tokenizer.bos_token_id] if card.template != "chat" and _adds_bos(tokenizer) else []
    # A template may write BOS itself; then it is there already.
    return [(bos if ids[text][:1] != bos else []) + ids[text] for text in rendered]


def _completion_ids(
    rows: Sequence[Any],
    column: str,
    rendered: Sequence[str],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[list[int]]:
    """Ids of a column's texts after their prompts, each row ending with its only EOS."""
    eos = tokenizer.eos_token_id
    texts = [_cased(row[column], card) for row in rows]
    special = [str(token) for token in (tokenizer.eos_token, tokenizer.pad_token) if token]
    for number, text in enumerate(texts):
        # In a chat template's text they could not be told from the template's own.
        for token in special:
            if token in text:
                raise UserError(
                    f"data.card {card.name}, row {number}: {column} holds {token!r}, a special "
                    "token of the tokenizer; expected text without it"
                )
    if card.template == "chat":
        prompts = [row["prompt"] for row in rows]
        ids = _chat_completion_ids(prompts, texts, rendered, prompt_ids, tokenizer, card)
    else:
        ids = _ids(tokenizer, texts)
    return [[*row[: row.index(eos)], eos] if eos in row else [*row, eos] for row in ids]


def _chat_completion_ids(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    rendered: Sequence[str],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[list[int]]:
    """Ids of what the chat template writes after each prompt."""
    whole: list[str] = []
    for number, (prompt, text, before) in enumerate(zip(prompts, texts, rendered, strict=True)):
        answer: Message = {"role": "assistant", "content": text}
        messages = [*_conversation(prompt, card), answer]
        whole.append(_chat(messages, tokenizer, card, add_generation_prompt=False))
        if not whole[-1].startswith(before):
            raise UserError(
                f"model.chat_template: the template of {tokenizer_name(tokenizer)} renders the "
                f"prompt of row {number} otherwise when the answer follows; expected the prompt, "
                f"ending {before[-40:]!r}, to be the start of the whole"
            )
    ids = [
        full[len(start) :] if full[: len(start)] == start else None
        for full, start in zip(_ids(tokenizer, whole), prompt_ids, strict=True)
    ]
    # Where a token spans the seam the policy, which is given the prompt's ids, could not say it:
    # then the rest of the text has ids of its own.
    seams = [number for number, rest in enumerate(ids) if rest is None]
    own = _ids(tokenizer, [whole[number][len(rendered[number]) :] for number in seams])
    repaired = dict(zip(seams, own, strict=True))
    return [repaired[number] if rest is None else rest for number, rest in enumerate(ids)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts as they stand, nothing added and nothing cut."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return rows


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def _fitting(
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[Sequence[list[int]]],
    card: Templated,
    options: DataOptions,
    context: int | None,
) -> np.ndarray:
    """Numbers of the rows within the limits; completion_ids has one list per column."""
    prompt_lengths = np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
    columns = [[len(ids) for ids in column] for column in completion_ids]
    lengths = np.array(columns, dtype=np.int64).max(axis=0, initial=0)
    whole = context if context is not None else np.iinfo(np.int64).max
    fits = (
        (prompt_lengths <= options.max_prompt_tokens)
        & (lengths <= options.max_completion_tokens)
        & (prompt_lengths + lengths <= whole)
    )
    kept = np.flatnonzero(fits)
    if len(kept) < len(fits) and (options.overlong == "error" or not len(kept)):
        row = int(np.flatnonzero(~fits)[0])
        within = "" if context is None else f", together {context} (the model's context)"
        raise UserError(
            f"data.card {card.name}, row {row}: prompt of {prompt_lengths[row]} tokens and "
            f"completion of {lengths[row]}; expected at most {options.max_prompt_tokens} "
            f"(data.max_prompt_tokens) and {options.max_completion_tokens} "
            f"(data.max_completion_tokens){within}; raise a limit or set data.overlong: drop"
        )
    return kept


def _encoded(columns: dict[str, list[Any]], kept: np.ndarray) -> Encoded:
    total = len(columns["prompt_key"])
    if len(kept) < total:
        columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    return Encoded(Dataset.from_dict(columns), total - len(kept))
