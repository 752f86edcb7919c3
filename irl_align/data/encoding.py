"""Text to token ids, through the one template of a data card.

The ids of a prompt start with the tokenizer's BOS if the tokenizer adds one; the ids of a
completion end with the id of data.tokenizer.text_end. Ids that a policy sampled are never made from
text again.

Special tokens come from the template, never from the text of a row: a row that has the text of one
is faulty, as is one of which the chat template does not write everything.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.messages import SPOKEN
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
    place_of,
    prompt_key,
    prompt_text,
)
from irl_align.data.sources import FaultyRow, fault_at
from irl_align.data.splits import merged_keys
from irl_align.data.tokenizer import chat_text, text_end, tokenizer_name
from irl_align.errors import UserError

logger = logging.getLogger(__name__)


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
    the chat template is missing; a row is faulty and card.faulty is error.
    """
    kept, columns = _Encoder(tokenizer, card).columns(rows, ["completion"], card.faulty == "drop")
    return _fitting(kept, columns, ["completion"], card, options, context)


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
    kept, columns = _Encoder(tokenizer, card).columns(rows, sides, card.faulty == "drop")
    columns["subset"] = [row["subset"] for row in kept]
    columns["margin"] = [row["margin"] for row in kept]
    return _fitting(kept, columns, sides, card, options, context)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, card: Templated
) -> list[list[int]]:
    """Ids of the rendered prompts, with exactly one BOS if the tokenizer adds one.

    Raises UserError: the template cannot render a prompt, or a prompt has the text of a special
    token.
    """
    encoder = _Encoder(tokenizer, card)
    return encoder.prompt_ids(encoder.all_rendered(prompts))


def encode_completions(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    prompt_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    card: Templated,
) -> list[list[int]]:
    """Ids of completions, each with one end of text at its end, after prompts of encode_prompts.

    With a chat template they are what it writes after the prompt, up to the first end of text.
    Errors are those of encode_prompts.
    """
    encoder = _Encoder(tokenizer, card)
    before = encoder.all_rendered(prompts)
    texts = []
    for number, row in enumerate(zip(prompts, completions, before, strict=True)):
        with fault_at(f"data.card {card.name}, row {number}"):
            texts.append(encoder.answered(*row, "completion"))
    return encoder.completion_ids(texts, before, prompt_ids)


def training_texts(rows: Iterable[Demonstration], card: Card) -> list[str]:
    """Distinct rendered prompts and completions, to train a tokenizer on."""
    texts: dict[str, None] = {}
    for row in rows:
        if card.template == "chat" or not isinstance(row["prompt"], str):
            raise UserError(
                f"data.card {card.name}: a tokenizer from scratch has no chat template; "
                "expected a card with a plain template"
            )
        texts[card.template.format(prompt=cased(row["prompt"], card))] = None
        texts[cased(completion_text(row["completion"]), card)] = None
    return list(texts)


def cased(text: str, card: Templated) -> str:
    """The text as the card's policy reads it."""
    return text.lower() if card.lowercase else text


def _squeezed(text: str) -> str:
    """Text without white space, which templates trim."""
    return "".join(text.split())


@dataclass(frozen=True)
class _Encoder:
    """Encodes texts with one tokenizer and one template."""

    tokenizer: PreTrainedTokenizerBase
    card: Templated

    def columns(
        self, rows: Sequence[Any], sides: Sequence[str], drop: bool
    ) -> tuple[list[Any], dict[str, Any]]:
        """The rows without faulty ones, which are dropped, and their texts, ids and keys.

        sides: the fields that hold a completion. Raises FaultyRow: all rows are faulty, or with
        drop=False one is.
        """
        kept, before, after, faults = [], list[str](), list[list[str]](), list[str]()
        for number, row in enumerate(rows):
            try:
                with fault_at(place_of(row, self.card.name, number)):
                    start = self.rendered(row["prompt"])
                    texts = [self.answered(row["prompt"], row[side], start, side) for side in sides]
            except FaultyRow as error:
                if not drop:
                    raise
                faults.append(str(error))
                continue
            kept.append(row)
            before.append(start)
            after.append(texts)
        if faults and not kept:
            raise FaultyRow(f"all {len(faults)} rows are faulty; the first: {faults[0]}")
        if faults:
            logger.warning("%d faulty rows dropped; the first: %s", len(faults), faults[0])
        prompt_ids = self.prompt_ids(before)
        prompts: list[Prompt] = [row["prompt"] for row in kept]
        same = merged_keys(prompts, map(tuple, prompt_ids))
        columns: dict[str, Any] = {
            "prompt": [prompt_text(prompt) for prompt in prompts],
            "messages": ["" if isinstance(p, str) else json.dumps(p) for p in prompts],
            "prompt_ids": prompt_ids,
            "prompt_key": [same.get(key, key) for key in map(prompt_key, prompts)],
        }
        for place, side in enumerate(sides):
            texts = [own[place] for own in after]
            columns[side] = [cased(completion_text(row[side]), self.card) for row in kept]
            columns[f"{side}_ids"] = self.completion_ids(texts, before, prompt_ids)
        return kept, columns

    def all_rendered(self, prompts: Sequence[Prompt]) -> list[str]:
        """Prompts in the card's template. Raises FaultyRow."""
        texts = []
        for number, prompt in enumerate(prompts):
            with fault_at(f"data.card {self.card.name}, row {number}"):
                texts.append(self.rendered(prompt))
        return texts

    def rendered(self, prompt: Prompt) -> str:
        """The prompt in the card's template, up to where the completion starts.

        Raises FaultyRow, without the row's place.
        """
        card = self.card
        self._no_special_tokens("prompt", prompt_text(prompt))
        if card.template != "chat":
            if not is_one_turn(prompt):
                raise FaultyRow("a conversation needs template: chat")
            return card.template.format(prompt=cased(prompt_text(prompt), card))
        messages = self._messages(prompt)
        text = self._chat(messages, prompt_only=True)
        squeezed = _squeezed(text)
        for turn in messages:  # of earlier answers, many templates leave out the reasoning
            content = _squeezed(turn["content"])
            common = turn["role"] == "assistant" or (turn["role"] == "user" and content in squeezed)
            if content and not common and not self._is_written(messages, turn, text):
                raise FaultyRow(
                    f"model.chat_template: the template of {tokenizer_name(self.tokenizer)} "
                    f"leaves out the turn of the role {turn['role']}"
                )
        return text

    def answered(self, prompt: Prompt, completion: Completion, before: str, field: str) -> str:
        """Text of the completion; with a chat template, of the prompt and the completion.

        Raises FaultyRow, without the row's place.
        """
        text = cased(completion_text(completion), self.card)
        self._no_special_tokens(field, text)
        if self.card.template != "chat":
            return text
        messages = self._messages([*as_messages(prompt), *as_answer(completion)])
        whole = self._chat(messages, prompt_only=False)
        name = tokenizer_name(self.tokenizer)
        if not whole.startswith(before):
            raise FaultyRow(
                f"model.chat_template: the template of {name} renders the prompt of a row "
                f"differently when the answer follows; expected the prompt, ending "
                f"{before[-40:]!r}, to be the start of the whole"
            )
        if _squeezed(messages[-1]["content"]) not in _squeezed(whole[len(before) :]):
            raise FaultyRow(
                f"model.chat_template: the template of {name} leaves out a part of the {field}, "
                f"such as reasoning before </think>: {messages[-1]['content'][:40]!r}"
            )
        return whole

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
        self, texts: Sequence[str], rendered: Sequence[str], prompt_ids: Sequence[list[int]]
    ) -> list[list[int]]:
        """Ids of the completions in texts of `answered`; each ends with its only end of text."""
        end = text_end(self.tokenizer, self.card.template)
        ids = self._ids(texts)
        if self.card.template == "chat":
            rests = [
                full[len(start) :] if full[: len(start)] == start else None
                for full, start in zip(ids, prompt_ids, strict=True)
            ]
            # A policy continues the ids of the prompt, so it cannot write a token that spans the
            # end of the prompt. There the rest of the text is encoded by itself.
            seams = [number for number, rest in enumerate(rests) if rest is None]
            own = self._ids([texts[number][len(rendered[number]) :] for number in seams])
            repaired = dict(zip(seams, own, strict=True))
            ids = [repaired[i] if rest is None else rest for i, rest in enumerate(rests)]
        return [
            [*row[: row.index(end.id)], end.id] if end.id in row else [*row, end.id] for row in ids
        ]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """The texts of special tokens."""
        tokens = {text_end(self.tokenizer, self.card.template).token}
        tokens |= set(map(str, self.tokenizer.all_special_tokens))
        added = self.tokenizer.added_tokens_decoder.values()
        tokens |= {token.content for token in added if token.special}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens) if token.strip()))

    @cached_property
    def _named(self) -> frozenset[str]:
        """Words of the chat template, the keys of messages that it reads among them."""
        template = self.tokenizer.chat_template or ""
        texts = template.values() if isinstance(template, dict) else [template]
        return frozenset(word for text in texts for word in re.findall(r"\w+", text))

    def _no_special_tokens(self, field: str, text: str) -> None:
        """Special tokens come from the template, never from the text of a row."""
        token = self._special.search(text)
        if token is not None:
            raise FaultyRow(
                f"{field} holds {token[0]!r}, a special token of the tokenizer; expected text "
                "without it"
            )

    def _is_written(self, messages: list[Message], turn: Message, text: str) -> bool:
        """Whether the text of the prompt would be another one without this turn."""
        others = [other for other in messages if other is not turn]
        try:
            return not others or self._chat(others, prompt_only=True) != text
        except FaultyRow:  # the template needs the turn
            return True

    def _messages(self, prompt: Prompt) -> list[Message]:
        turns = as_messages(prompt)
        return [{**turn, "content": cased(turn["content"], self.card)} for turn in turns]

    def _chat(self, messages: list[Message], prompt_only: bool) -> str:
        """Messages in the chat template; `prompt_only` adds the start of the assistant's turn."""
        for key in {"tools", *SPOKEN} - self._named:
            if any(message.get(key) for message in messages):
                raise FaultyRow(
                    f"model.chat_template: the template of {tokenizer_name(self.tokenizer)} does "
                    f"not write {key}"
                )
        try:
            return chat_text(self.tokenizer, messages, add_generation_prompt=prompt_only)
        except Exception as error:  # a template may raise anything that Python may
            roles = ", ".join(message["role"] for message in messages)
            raise FaultyRow(
                f"model.chat_template: the template of {tokenizer_name(self.tokenizer)} cannot "
                f"render the roles {roles}: {' '.join(str(error).split())}"
            ) from error

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, with nothing added and nothing cut."""
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return rows


def _fitting(
    rows: Sequence[Mapping[str, Any]],
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
            f"{place_of(rows[row], card.name, row)}: prompt of {prompts[row]} tokens and "
            f"completion of {completions[row]}; expected at most {options.max_prompt_tokens} "
            f"(data.max_prompt_tokens) and {options.max_completion_tokens} "
            f"(data.max_completion_tokens){within}; raise a limit or set data.overlong: drop"
        )
    if len(kept) < len(fits):
        columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    return Encoded(Dataset.from_dict(columns), len(fits) - len(kept))
