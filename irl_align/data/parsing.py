"""A row's columns to demonstrations, preferences and prompts, by the format of a data card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from irl_align.config.yaml import show
from irl_align.data.cards import LABELLED, MESSAGES, TEXT, TRANSCRIPTS, Card
from irl_align.data.messages import (
    read_messages,
    read_text,
    read_tools,
    unlearned,
    with_tools,
)
from irl_align.data.rows import (
    Completion,
    Demonstration,
    Message,
    Preference,
    Prompt,
    answer_of,
    as_messages,
)
from irl_align.data.sources import FaultyRow, Raw

_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_demonstrations(raw: Raw, card: Card, columns: Mapping[str, str]) -> list[Demonstration]:
    """The demonstrations of a row, with the card's extra columns. Raises FaultyRow."""
    rows = _demonstrations(raw, card, columns)
    if card.extra:
        extra = {name: raw.column(name) for name in card.extra}
        try:
            json.dumps(extra)
        except TypeError as error:  # a date, or bytes
            raise raw.fault(", ".join(card.extra), f"{error}; expected text or numbers") from error
        rows = [{**row, "extra": extra} for row in rows]
    return rows


def _demonstrations(raw: Raw, card: Card, columns: Mapping[str, str]) -> list[Demonstration]:
    form = card.format(columns)
    if form == TEXT:
        return [{**_split_text(raw, columns["text"], card.prompt_words or 1), "place": raw.place}]
    if form == MESSAGES:
        return _turns(raw, columns["messages"], [], card, columns)
    prompt, column = parse_prompt(raw, columns, card), columns["completion"]
    if isinstance(raw.column(column), list):
        return _turns(raw, column, as_messages(prompt), card, columns)
    return [{"prompt": prompt, "completion": read_text(raw, column), "place": raw.place}]


def _turns(
    raw: Raw, column: str, before: list[Message], card: Card, columns: Mapping[str, str]
) -> list[Demonstration]:
    """The demonstrations among the assistant's turns of a column, which continue `before`."""
    added, skipped = _conversation(raw, column, card), unlearned(raw, column)
    turns = [
        len(before) + place
        for place, message in enumerate(added)
        if message["role"] == "assistant" and place not in skipped
    ]
    if card.turn == "last" and added[-1]["role"] != "assistant":
        raise raw.fault(column, "no last turn of the assistant")
    if not turns:
        raise raw.fault(column, "no turn of the assistant that is to be learned")
    turns = [turn for turn in turns if turn > 0]
    if not turns:
        raise raw.fault(column, "an answer without a prompt")
    messages = as_messages(with_tools([*before, *added], _tools(raw, card, columns)))
    chosen = {"first": turns[:1], "last": turns[-1:], "each": turns}[card.turn]
    rows: list[Demonstration] = [
        {"prompt": messages[:i], "completion": answer_of(messages[i]), "place": raw.place}
        for i in chosen
    ]
    if card.turn == "last" and len(turns) > 1:
        rows[0]["earlier"] = turns[:-1]
    return rows


def learned_turns(rows: Iterable[Demonstration]) -> list[Demonstration]:
    """The demonstrations, each after the assistant's earlier turns that are demonstrations too."""
    turns: list[Demonstration] = []
    for row in rows:
        for i in row.get("earlier", ()):
            before = as_messages(row["prompt"])
            turn: Demonstration = {"prompt": before[:i], "completion": answer_of(before[i])}
            turns.append(turn if "place" not in row else {**turn, "place": row["place"]})
        turns.append(row)
    return turns


def _split_text(raw: Raw, column: str, words: int) -> Demonstration:
    """A text divided after its first words; the completion starts with the space after them."""
    start = re.match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}(?=\s+\S)", read_text(raw, column))
    if start is None:
        raise raw.fault(column, f"no more than the {words} words of the prompt")
    return {"prompt": start[0], "completion": start.string[start.end() :]}


def parse_preferences(raw: Raw, card: Card, columns: Mapping[str, str]) -> list[Preference]:
    """The preference of a row, as a list of one. Raises FaultyRow."""
    form = card.format(columns)
    prompt: Prompt
    if form == TRANSCRIPTS:
        prompt, chosen, rejected = _transcripts(raw, card, columns)
    else:
        prompt = parse_prompt(raw, columns, card)
        better, worse = "chosen", "rejected"
        if form == LABELLED:
            better, worse = _label(raw, columns["label"], card.labels)
        chosen, rejected = (_answer(raw, columns[side], prompt, card) for side in (better, worse))
    if chosen == rejected:
        raise FaultyRow(f"{raw.place}: chosen and rejected are the same text")
    subset = [str(raw.column(name)) for name in columns.get("subset", "").split("+") if name]
    row: Preference = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "subset": "/".join(subset) or raw.group,
        "margin": _number(raw, columns["margin"]) if "margin" in columns else None,
        "place": raw.place,
    }
    return [row]


def _answer(raw: Raw, column: str, prompt: Prompt, card: Card) -> Completion:
    """A text; or one turn of the assistant, which may follow a copy of the prompt."""
    if not isinstance(raw.column(column), list):
        return read_text(raw, column)
    turns, before = _conversation(raw, column, card), as_messages(prompt)
    plain = [{key: value for key, value in turn.items() if key != "tools"} for turn in before]
    turns = turns[len(plain) :] if turns[: len(plain)] == plain else turns
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise raw.fault(column, f"turns of {roles} after the prompt, expected one of the assistant")
    return answer_of(turns[0])


def _transcripts(
    raw: Raw, card: Card, columns: Mapping[str, str]
) -> tuple[Prompt, Completion, Completion]:
    """Prompt, chosen and rejected text of two transcripts that differ only in the last turn."""
    column = columns["rejected_transcript"]
    chosen = _transcript(raw, columns["chosen_transcript"], card)
    rejected = _transcript(raw, column, card)
    if chosen[:-1] != rejected[:-1]:
        raise raw.fault(column, "a transcript that differs before the last turn")
    prompt = with_tools(chosen[:-1], _tools(raw, card, columns))
    return prompt, answer_of(chosen[-1]), answer_of(rejected[-1])


def _transcript(raw: Raw, column: str, card: Card) -> list[Message]:
    """Messages of a text of alternating "\\n\\nHuman: ..." and "\\n\\nAssistant: ...".

    A list of messages is taken as it is.
    """
    expected = "non-empty Human and Assistant turns, the last of the Assistant"
    if isinstance(raw.column(column), list):
        messages = _conversation(raw, column, card)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise raw.fault(column, "no last turn of the assistant after a prompt")
        return messages
    before, *turns = _TURN.split(read_text(raw, column))
    speakers, texts = turns[::2], [text.strip() for text in turns[1::2]]
    alternating = ["Human", "Assistant"] * (len(speakers) // 2)
    if before.strip() or not speakers or speakers != alternating or not all(texts):
        raise raw.fault(column, f"no alternation of {expected}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": text}
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def parse_prompt(raw: Raw, columns: Mapping[str, str], card: Card) -> Prompt:
    """The prompt of a row, with the text of `input` after an empty line if the row has one.

    Raises FaultyRow.
    """
    column = columns["prompt"]
    if isinstance(raw.column(column), list):
        return with_tools(_conversation(raw, column, card), _tools(raw, card, columns))
    text = read_text(raw, column)
    if columns.get("input") and raw.column(columns["input"]) not in (None, ""):
        text = f"{text}\n\n{read_text(raw, columns['input'])}"
    return with_tools(text, _tools(raw, card, columns))


def _conversation(raw: Raw, column: str, card: Card) -> list[Message]:
    if card.template != "chat":
        raise raw.fault(column, "a conversation, which needs template: chat")
    return read_messages(raw, column)


def _tools(raw: Raw, card: Card, columns: Mapping[str, str]) -> list[Any]:
    return read_tools(raw, columns.get("tools", "tools")) if card.template == "chat" else []


def _label(raw: Raw, column: str, labels: Sequence[int]) -> tuple[str, str]:
    """Names of the better and the worse text's fields."""
    value, (first, second) = raw.column(column), labels
    if value in (first, str(first)):
        return "first", "second"
    if value in (second, str(second)):
        return "second", "first"
    expected = f"{first} or {second}, which names the better text"
    raise raw.fault(column, f"{show(value)}, expected {expected}")


def _number(raw: Raw, column: str) -> float:
    value = raw.column(column)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise raw.fault(column, f"{show(value)}, expected a finite number")
    return number
