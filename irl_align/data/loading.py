"""Demonstrations and preferences of a data card's split, as checked rows of text.

A data card says where rows come from (:mod:`irl_align.data.cards` has a card of six lines for data
of your own). :mod:`irl_align.data.encoding` turns rows into token ids.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from irl_align.config.yaml import show
from irl_align.data.cards import LABELLED, MESSAGES, TEXT, TRANSCRIPTS, Card, import_object
from irl_align.data.rows import Demonstration, Message, Preference, Prompt
from irl_align.data.sources import Raw, file_rows, hub_rows, local_rows
from irl_align.data.splits import Row, carve
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

logger = logging.getLogger(__name__)

MAX_TEXT = 10_000_000  # characters; the longest contexts have a million tokens
ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class _FaultyRow(UserError):
    """The content of a row is unusable; `faulty: drop` leaves such rows out."""


def load_demonstrations(
    card: Card,
    split: str,
    path: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Demonstration]:
    """Rows of a split in the order of the data.

    path: a local file or folder that replaces the card's source. task_args and seed are for a card
    whose source is a procedural task. Raises UserError: there is no such split, file or Hub
    dataset; or a row, named by file and line, is not a demonstration.
    """
    check_source(card, split, path, task_args)
    if card.is_task:
        return _task_rows(card, split, task_args or {}, seed)
    return _load(card, split, path, _demonstration)


def check_source(
    card: Card, split: str, path: str | None, task_args: Mapping[str, Any] | None
) -> None:
    """Check the source of a split before anything is loaded.

    Raises UserError: the card has no such split, or the path or task_args do not fit the source.
    """
    _require_kind(card, "demonstrations", split)
    if not card.is_task:
        if task_args:
            raise UserError(f"data.task: card {card.name} is not a procedural task")
        if path is not None and not Path(path).exists():
            raise UserError(f"data.path: found nothing at {path}, expected a file or a folder")
        return
    if path is not None:
        raise UserError(f"data.path: card {card.name} is a procedural task, which has no files")
    parameters = inspect.signature(_task(card)).parameters
    known = [name for name in parameters if name not in ("split", "seed")]
    needed = [name for name in known if parameters[name].default is inspect.Parameter.empty]
    given = list(task_args or {})
    if set(given) - set(known) or set(needed) - set(given):
        raise UserError(
            f"data.task: found {', '.join(given) or 'nothing'}, expected only "
            f"{', '.join(known)}, and at least {', '.join(needed) or 'none of them'}"
        )


def load_preferences(card: Card, split: str, path: str | None = None) -> list[Preference]:
    """Rows of a split of a preference set; parameters and errors as in load_demonstrations."""
    _require_kind(card, "preferences", split)
    return _load(card, split, path, _preference)


def load_prompts(card: Card, path: str) -> list[Prompt]:
    """Prompts of a file without demonstrations, from the card's prompt or messages column.

    Messages are cut after the last turn that is not the assistant's. Raises UserError with the
    file and line of a row that has no prompt.
    """
    column = card.columns.get("prompt", card.columns.get("messages", "prompt"))
    prompts: list[Prompt] = []
    for raw in file_rows(Path(path)):
        prompt = _prompt(raw, column, card)
        if isinstance(prompt, list):
            prompt = before_answer(prompt)
            if not prompt:
                raise UserError(raw.fault(column, "only turns of the assistant, expected a prompt"))
        prompts.append(prompt)
    return prompts


def before_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last one that is not the assistant's."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def _require_kind(card: Card, kind: str, split: str) -> None:
    if card.kind != kind:
        raise UserError(f"data.card {card.name}: found a card of {card.kind}, expected {kind}")
    if split not in card.split_names:
        raise UserError(
            f"data.card {card.name}: found no split {split!r}, expected one of "
            f"{', '.join(card.split_names)}"
        )


def _task(card: Card) -> Callable[..., Any]:
    assert card.source is not None and card.source.task is not None
    task: Callable[..., Any] = import_object(
        card.source.task, f"data.card {card.name}: source.task"
    )
    return task


def _task_rows(card: Card, split: str, args: Mapping[str, Any], seed: int) -> list[Demonstration]:
    try:
        rows = _task(card)(split=split, seed=seed, **args)
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    except UserError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise UserError(
            f"data.card {card.name}: source.task gave no rows of split {split}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


def _load(
    card: Card, split: str, path: str | None, parse: Callable[[Raw, Card, Mapping[str, str]], Row]
) -> list[Row]:
    """Rows of a split, parsed from the card's source or from `path`."""
    base = card.splits[split].carved_from or split
    source = card.source if path is None else None
    if source is not None and source.hub is not None:
        raws, columns = hub_rows(card, base), source.columns or card.columns
    else:
        raws, columns = local_rows(card, base, path), card.columns
    rows: list[Row] = []
    dropped = 0
    for raw in raws:
        if any(raw.column(name) != value for name, value in card.where.items()):
            continue
        try:
            rows.append(parse(raw, card, columns))
        except _FaultyRow:
            if card.faulty == "error":
                raise
            dropped += 1
    if dropped:
        logger.warning("%s %s: %d faulty rows dropped", card.name, split, dropped)
    rows = carve(card, split, rows)
    if not rows:
        raise UserError(
            f"data.card {card.name}: split {split}: found no row, expected at least one"
        )
    if card.rows.get(split, len(rows)) != len(rows):
        logger.warning(
            "%s %s: found %d rows, the card says %d", card.name, split, len(rows), card.rows[split]
        )
    return rows


def _demonstration(raw: Raw, card: Card, columns: Mapping[str, str]) -> Demonstration:
    form = card.format(columns)
    if form == TEXT:
        return _split_text(raw, columns["text"], card.prompt_words or 1)
    if form != MESSAGES:
        prompt = _prompt(raw, columns["prompt"], card)
        return {"prompt": prompt, "completion": _text(raw, columns["completion"])}
    messages = read_messages(raw, columns["messages"])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or (card.turn == "last" and answers[-1] != len(messages) - 1):
        raise _FaultyRow(raw.fault(columns["messages"], "no last turn of the assistant"))
    turn = answers[0] if card.turn == "first" else answers[-1]
    if turn == 0:
        raise _FaultyRow(raw.fault(columns["messages"], "an answer without a prompt"))
    return {"prompt": messages[:turn], "completion": messages[turn]["content"]}


def _split_text(raw: Raw, column: str, words: int) -> Demonstration:
    """A text divided after its first words; the completion starts with the space after them."""
    start = re.match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}(?=\s+\S)", _text(raw, column))
    if start is None:
        raise _FaultyRow(raw.fault(column, f"no more than the {words} words of the prompt"))
    return {"prompt": start[0], "completion": start.string[start.end() :]}


def _preference(raw: Raw, card: Card, columns: Mapping[str, str]) -> Preference:
    form = card.format(columns)
    prompt: Prompt
    if form == TRANSCRIPTS:
        prompt, chosen, rejected = _transcripts(raw, columns)
    else:
        prompt = _prompt(raw, columns["prompt"], card)
        better, worse = "chosen", "rejected"
        if form == LABELLED:
            better, worse = _label(raw, columns["label"], card.labels)
        chosen, rejected = _text(raw, columns[better]), _text(raw, columns[worse])
    if chosen == rejected:
        raise _FaultyRow(f"{raw.place}: chosen and rejected are the same text")
    subset = [str(raw.column(name)) for name in columns.get("subset", "").split("+") if name]
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "subset": "/".join(subset) or raw.group,
        "margin": _number(raw, columns["margin"]) if "margin" in columns else None,
    }


def _transcripts(raw: Raw, columns: Mapping[str, str]) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected text of two transcripts that differ only in the last turn."""
    column = columns["rejected_transcript"]
    chosen = _conversation(raw, columns["chosen_transcript"])
    rejected = _conversation(raw, column)
    if chosen[:-1] != rejected[:-1]:
        raise _FaultyRow(raw.fault(column, "a transcript that differs before the last turn"))
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _conversation(raw: Raw, column: str) -> list[Message]:
    """Messages of a text of alternating "\\n\\nHuman: ..." and "\\n\\nAssistant: ..."."""
    before, *turns = _TURN.split(_text(raw, column))
    speakers, texts = turns[::2], [text.strip() for text in turns[1::2]]
    expected = ["Human", "Assistant"] * (len(speakers) // 2)
    if before.strip() or not speakers or speakers != expected or not all(texts):
        raise _FaultyRow(
            raw.fault(
                column,
                "no alternation of non-empty Human and Assistant turns, the last of the Assistant",
            )
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": text}
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def _prompt(raw: Raw, column: str, card: Card) -> Prompt:
    if isinstance(raw.column(column), list):
        if card.template != "chat":
            raise UserError(raw.fault(column, "a conversation, which needs template: chat"))
        return read_messages(raw, column)
    return _text(raw, column)


def read_messages(raw: Raw, column: str) -> list[Message]:
    """The messages of a row. Raises UserError that names the file, row and column."""
    value = raw.column(column)
    if not isinstance(value, list) or not value:
        raise UserError(raw.fault(column, f"{_kind(value)}, expected a list of messages"))
    messages: list[Message] = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(
                raw.fault(column, f"role {show(role)} in a message, expected {', '.join(ROLES)}")
            )
        messages.append({"role": role, "content": _checked(raw, column, message.get("content"))})
    return messages


def _text(raw: Raw, column: str) -> str:
    return _checked(raw, column, raw.column(column))


def _checked(raw: Raw, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _FaultyRow(raw.fault(column, f"{_kind(value)}, expected text"))
    if not value.strip():
        raise _FaultyRow(raw.fault(column, "empty text"))
    if len(value) > MAX_TEXT:
        size = f"a text of {len(value):,} characters, expected at most {MAX_TEXT:,}"
        raise _FaultyRow(raw.fault(column, size))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _FaultyRow(raw.fault(column, "half of a surrogate pair, not text")) from error
    return value


def _label(raw: Raw, column: str, labels: Sequence[int]) -> tuple[str, str]:
    """Names of the better and the worse text's fields."""
    value, (first, second) = raw.column(column), labels
    if value in (first, str(first)):
        return "first", "second"
    if value in (second, str(second)):
        return "second", "first"
    expected = f"{first} or {second}, which names the better text"
    raise UserError(raw.fault(column, f"{show(value)}, expected {expected}"))


def _number(raw: Raw, column: str) -> float:
    value = raw.column(column)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(raw.fault(column, f"{show(value)}, expected a finite number"))
    return number


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
