"""Text to token ids, through the one template of a data card.

The ids of a prompt start with the tokenizer's BOS if the tokenizer adds one; the ids of a
completion end with the id of data.tokenizer.text_end. Ids that a policy sampled are never made from
text again.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.rows import (
    Completion,
    Demonstration,
    Message,
    Preference,
    Prompt,
    as_answer,
    as_messages,
    completion_text,
    is_one_turn,
    prompt_key,
    prompt_text,
    template_input,
)
from irl_align.data.splits import merged_keys
from irl_align.data.tokenizer import text_end, tokenizer_name
from irl_align.errors import UserError


class Templated(Protocol):
    """Has a prompt template: a data card, or a reward that takes text."""

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
    """Rows as token ids, and how many rows were dropped for their length."""

    rows: Dataset
    dropped: int


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    options: DataOptions,
    context: int | None = None,
) -> Encoded:
    """Columns prompt (text), messages (JSON of a conversation, else empty), completion (text),
    prompt_ids, completion_ids and prompt_key.

    Rows keep their order. context: the model's positions, the limit for prompt and completion
    together. Raises UserError: a row is too long and options.overlong is error, or no row is left;
    the chat template is missing or cannot render a row; a completion holds the text of a special
    token.
    """
    encoder = _Encoder(tokenizer, card)
    return _fitting(encoder.columns(rows, ["completion"]), ["completion"], card, options, context)


def encode_preferences(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    card: Card,
    options: DataOptions,
    context: int | None = None,
) -> Encoded:
    """Columns prompt, messages, chosen, rejected, prompt_ids, chosen_ids, rejected_ids, prompt_key,
    subset and margin. Lengths and errors are those of encode_demonstrations."""
    sides = ["chosen", "rejected"]
    columns = _Encoder(tokenizer, card).columns(rows, sides)
    columns["subset"] = [row["subset"] for row in rows]
    columns["margin"] = [row["margin"] for row in rows]
    return _fitting(columns, sides, card, options, context)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[list[int]]:
    """Ids of the rendered prompts, with exactly one BOS if the tokenizer adds one."""
    encoder = _Encoder(tokenizer, card)
    return encoder.prompt_ids(encoder.render(prompts))


def same_prompts(
    prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase | None, card: Card
) -> dict[str, str]:
    """Key of a prompt -> the key that it shares with prompts of the same ids (`merged_keys`).

    tokenizer: None stands for one that keeps every difference of rendered texts, as one that is
    trained from scratch does. A prompt that the template cannot render is like no other prompt.
    """
    distinct = list({prompt_key(prompt): prompt for prompt in prompts}.values())
    if tokenizer is None:
        return merged_keys(distinct, (_cased(prompt_text(prompt), card) for prompt in distinct))
    read: Iterable[Hashable]
    try:
        read = map(tuple, encode_prompts(distinct, tokenizer, card))
    except UserError:
        read = [_ids_or_key(prompt, tokenizer, card) for prompt in distinct]
    return merged_keys(distinct, read)


def _ids_or_key(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, card: Card) -> Hashable:
    try:
        return tuple(encode_prompts([prompt], tokenizer, card)[0])
    except UserError:  # encoding the rows reports it
        return prompt_key(prompt)


def encode_completions(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[list[int]]:
    """Ids of completions, each with one end of text at its end, after prompts of encode_prompts.

    With a chat template they are what it writes after the prompt, up to the first end of text.
    """
    encoder = _Encoder(tokenizer, card)
    rendered = encoder.render(prompts)
    return encoder.completion_ids("completion", completions, prompts, rendered, prompt_ids)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    """Messages in the tokenizer's chat template, with the definitions of tools in the first one.

    The template may raise any error.
    """
    conversation, tools = template_input(messages)
    text = tokenizer.apply_chat_template(
        conversation,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)


def training_texts(rows: Iterable[Demonstration], card: Card) -> list[str]:
    """Distinct rendered prompts and completions, to train a tokenizer on."""
    texts: dict[str, None] = {}
    for row in rows:
        if card.template == "chat" or not isinstance(row["prompt"], str):
            raise UserError(
                f"data.card {card.name}: a tokenizer from scratch has no chat template; "
                "expected a card with a plain template"
            )
        texts[card.template.format(prompt=_cased(row["prompt"], card))] = None
        texts[_cased(completion_text(row["completion"]), card)] = None
    return list(texts)


def _cased(text: str, card: Templated) -> str:
    return text.lower() if card.lowercase else text


@dataclass(frozen=True)
class _Encoder:
    """Encodes texts with one tokenizer and one template."""

    tokenizer: PreTrainedTokenizerBase
    card: Templated

    def columns(self, rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
        """Texts, ids and keys of all rows; `sides` are the fields that hold a completion."""
        prompts: list[Prompt] = [row["prompt"] for row in rows]
        rendered = self.render(prompts)
        prompt_ids = self.prompt_ids(rendered)
        answers = {side: [row[side] for row in rows] for side in sides}
        texts = {side: [completion_text(answer) for answer in answers[side]] for side in sides}
        ids = {
            f"{side}_ids": self.completion_ids(side, answers[side], prompts, rendered, prompt_ids)
            for side in sides
        }
        same = merged_keys(prompts, map(tuple, prompt_ids))
        return {
            "prompt": [prompt_text(prompt) for prompt in prompts],
            "messages": ["" if isinstance(p, str) else json.dumps(p) for p in prompts],
            **{side: [_cased(text, self.card) for text in texts[side]] for side in sides},
            "prompt_ids": prompt_ids,
            **ids,
            "prompt_key": [same.get(key, key) for key in map(prompt_key, prompts)],
        }

    def render(self, prompts: Sequence[Prompt]) -> list[str]:
        """Each prompt in the card's template, up to where the completion starts."""
        card = self.card
        if card.template != "chat":
            if not all(is_one_turn(prompt) for prompt in prompts):
                raise UserError(f"data.card {card.name}: a conversation needs template: chat")
            texts = [_cased(prompt_text(prompt), card) for prompt in prompts]
            return [card.template.format(prompt=text) for text in texts]
        text_end(self.tokenizer, card.template)  # checks the chat template
        return [self._chat(self._messages(prompt), prompt_only=True) for prompt in prompts]

    def prompt_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts."""
        distinct = list(dict.fromkeys(rendered))
        ids = dict(zip(distinct, self._ids(distinct), strict=True))
        bos: list[int] = []
        if self.card.template != "chat":  # a chat template writes BOS itself
            token = self.tokenizer.bos_token_id
            if token is not None and self.tokenizer("a")["input_ids"][0] == token:
                bos = [token]
        return [(bos if ids[text][:1] != bos else []) + ids[text] for text in rendered]

    def completion_ids(
        self,
        field: str,
        completions: Sequence[Completion],
        prompts: Sequence[Prompt],
        rendered: Sequence[str],
        prompt_ids: Sequence[list[int]],
    ) -> list[list[int]]:
        """Ids of the texts of a field after their prompts; each ends with its only end of text."""
        texts = [_cased(completion_text(completion), self.card) for completion in completions]
        end = text_end(self.tokenizer, self.card.template)
        special = {end.token, self.tokenizer.eos_token, self.tokenizer.pad_token}
        for number, text in enumerate(texts):
            # In the text of a chat template they would look like the template's own.
            for token in special:
                if token and str(token) in text:
                    raise UserError(
                        f"data.card {self.card.name}, row {number}: {field} holds {str(token)!r}, "
                        "a special token of the tokenizer; expected text without it"
                    )
        if self.card.template == "chat":
            ids = self._chat_completion_ids(completions, prompts, rendered, prompt_ids)
        else:
            ids = self._ids(texts)
        return [
            [*row[: row.index(end.id)], end.id] if end.id in row else [*row, end.id] for row in ids
        ]

    def _chat_completion_ids(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[Prompt],
        rendered: Sequence[str],
        prompt_ids: Sequence[list[int]],
    ) -> list[list[int]]:
        """Ids of what the chat template writes after each prompt."""
        whole: list[str] = []
        rows = zip(prompts, completions, rendered, strict=True)
        for number, (prompt, completion, before) in enumerate(rows):
            turns = [*as_messages(prompt), *as_answer(completion)]
            whole.append(self._chat(self._messages(turns), prompt_only=False))
            if not whole[-1].startswith(before):
                raise UserError(
                    f"model.chat_template: the template of {tokenizer_name(self.tokenizer)} "
                    f"renders the prompt of row {number} differently when the answer follows; "
                    f"expected the prompt, ending {before[-40:]!r}, to be the start of the whole"
                )
        ids = [
            full[len(start) :] if full[: len(start)] == start else None
            for full, start in zip(self._ids(whole), prompt_ids, strict=True)
        ]
        # A policy continues the ids of the prompt, so it cannot write a token that spans the end
        # of the prompt. There the rest of the text is encoded by itself.
        seams = [number for number, rest in enumerate(ids) if rest is None]
        own = self._ids([whole[number][len(rendered[number]) :] for number in seams])
        repaired = dict(zip(seams, own, strict=True))
        return [repaired[number] if rest is None else rest for number, rest in enumerate(ids)]

    def _messages(self, prompt: Prompt) -> list[Message]:
        turns = as_messages(prompt)
        return [{**turn, "content": _cased(turn["content"], self.card)} for turn in turns]

    def _chat(self, messages: list[Message], prompt_only: bool) -> str:
        """Messages in the chat template; `prompt_only` adds the start of the assistant's turn."""
        try:
            return chat_text(self.tokenizer, messages, add_generation_prompt=prompt_only)
        except Exception as error:  # a template may raise anything that Python may
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"model.chat_template: the template of {tokenizer_name(self.tokenizer)} cannot "
                f"render a row of data.card {self.card.name} with the roles {roles}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, with nothing added and nothing cut."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return rows


def _fitting(
    columns: dict[str, list[Any]],
    sides: Sequence[str],
    card: Card,
    options: DataOptions,
    context: int | None,
) -> Encoded:
    """The rows whose prompts and completions are within the limits."""
    prompts = np.array([len(ids) for ids in columns["prompt_ids"]], dtype=np.int64)
    lengths = [[len(ids) for ids in columns[f"{side}_ids"]] for side in sides]
    completions = np.array(lengths, dtype=np.int64).max(axis=0, initial=0)
    most = context if context is not None else np.iinfo(np.int64).max
    fits = (
        (prompts <= options.max_prompt_tokens)
        & (completions <= options.max_completion_tokens)
        & (prompts + completions <= most)
    )
    kept = np.flatnonzero(fits)
    if len(kept) < len(fits) and (options.overlong == "error" or not len(kept)):
        row = int(np.flatnonzero(~fits)[0])
        within = "" if context is None else f", together {context} (the model's context)"
        raise UserError(
            f"data.card {card.name}, row {row}: prompt of {prompts[row]} tokens and "
            f"completion of {completions[row]}; expected at most {options.max_prompt_tokens} "
            f"(data.max_prompt_tokens) and {options.max_completion_tokens} "
            f"(data.max_completion_tokens){within}; raise a limit or set data.overlong: drop"
        )
    if len(kept) < len(fits):
        columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    return Encoded(Dataset.from_dict(columns), len(fits) - len(kept))
