"""Demonstrations and preferences as rows of text, and their division by prompt.

Where rows come from is said by a data card (:mod:`irl_align.data.cards`, with a card of six lines
for data of your own). Rows become token ids in :mod:`irl_align.data.encoding`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from irl_align.config.data import DataOptions
from irl_align.config.yaml import show
from irl_align.data.cards import (
    LABELLED,
    MESSAGES,
    TEXT,
    TRANSCRIPTS,
    Card,
    import_object,
    load_card,
)
from irl_align.data.sources import Raw, file_rows, hub_rows, local_rows
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

__all__ = [
    "Card",
    "Demonstration",
    "Division",
    "Message",
    "Preference",
    "Prompt",
    "choose_prompts",
    "data_checksum",
    "divide",
    "import_object",
    "load_card",
    "load_demonstrations",
    "load_preferences",
    "prompt_key",
    "unit_hash",
]

logger = logging.getLogger(__name__)

MAX_TEXT = 10_000_000  # characters; the longest contexts are of a million tokens
ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | list[Message]
"""Text, or a conversation up to the turn that is to be written."""


class Demonstration(TypedDict):
    """A prompt and what was demonstrated for it."""

    prompt: Prompt
    completion: str


class Preference(TypedDict):
    """A prompt and two completions; margin is how much better, in the data's own unit."""

    prompt: Prompt
    chosen: str
    rejected: str
    subset: str
    margin: float | None


Row = TypeVar("Row", Demonstration, Preference)


class _FaultyRow(UserError):
    """A row whose content is unusable: what `faulty: drop` leaves out."""


def load_demonstrations(
    card: Card,
    split: str,
    path: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Demonstration]:
    """Rows of a split in the order of the data.

    path: local file or folder in place of the card's source. task_args and seed are for a card
    whose source is a procedural task. Raises UserError: no such split, file or Hub dataset, or a
    row that is not a demonstration, named by file and line.
    """
    check_source(card, split, path, task_args)
    if card.is_task:
        return _from_task(card, split, dict(task_args or {}), seed)
    return _load(card, split, path, _demonstration)


def check_source(
    card: Card, split: str, path: str | None, task_args: Mapping[str, Any] | None
) -> None:
    """Raise UserError for what is wrong with a split's source before anything is loaded."""
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
    args = dict(task_args or {})
    if set(args) - set(known) or set(needed) - set(args):
        found = ", ".join(map(str, args)) or "nothing"
        raise UserError(
            f"data.task: found {found}, expected of {', '.join(known)} at least "
            f"{', '.join(needed) or 'none'}"
        )


def load_preferences(card: Card, split: str, path: str | None = None) -> list[Preference]:
    """Rows of a split of a preference set; parameters and errors as in load_demonstrations."""
    _require_kind(card, "preferences", split)
    return _load(card, split, path, _preference)


def load_prompts(card: Card, path: str) -> list[Prompt]:
    """Prompts of a file without demonstrations: the card's prompt column, or its messages.

    Messages are taken up to the last turn that is not the assistant's. Raises UserError naming file
    and line of what is no prompt.
    """
    column = card.columns.get("prompt", card.columns.get("messages", "prompt"))
    prompts: list[Prompt] = []
    for raw in file_rows(Path(path)):
        prompt = _prompt(raw, column, card)
        if isinstance(prompt, list):
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
            if not prompt:
                raise UserError(
                    raw.fault(column, "turns of the assistant alone, expected a prompt")
                )
        prompts.append(prompt)
    return prompts


def data_checksum(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the rows' content, in their order; the keys' order does not matter."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def prompt_key(prompt: Prompt) -> str:
    """16 hex digits that name a prompt by its content."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_prompts(keys: Iterable[str], count: int | None, seed: int) -> set[str]:
    """`count` distinct prompt keys, by hash: fewer are a subset of more. None chooses all."""
    distinct = set(keys)
    if count is None or count >= len(distinct):
        return distinct
    return set(sorted(distinct, key=lambda key: (unit_hash(seed, "choose", key), key))[:count])


@dataclass(frozen=True)
class Division:
    """Training demonstrations by use; no prompt of held_out is in sft or reward."""

    sft: list[Demonstration]
    """For supervised fine-tuning."""
    reward: list[Demonstration]
    """For fitting the reward: the rows of sft, or rows of other prompts."""
    held_out: list[Demonstration]
    """For measuring and selecting rewards."""

    def counts(self) -> dict[str, int]:
        """Rows and distinct prompts of each part."""
        numbers = {}
        for part in ("sft", "reward", "held_out"):
            rows: list[Demonstration] = getattr(self, part)
            numbers[f"{part}_rows"] = len(rows)
            numbers[f"{part}_prompts"] = len({prompt_key(row["prompt"]) for row in rows})
        return numbers


def divide(rows: Sequence[Demonstration], options: DataOptions, seed: int) -> Division:
    """Divide by prompt, each prompt's part given by a hash of (seed, prompt) alone.

    So the order of the rows does not matter, and a smaller share is a subset of a larger one, part
    by part. Raises UserError where a part would be empty.
    """
    sft: list[Demonstration] = []
    reward: list[Demonstration] = []
    held_out: list[Demonstration] = []
    disjoint = options.reward_data == "disjoint"
    for row in rows:
        key = prompt_key(row["prompt"])
        if unit_hash(seed, "share", key) >= options.share:
            continue
        if unit_hash(seed, "held_out", key) < options.held_out:
            held_out.append(row)
        elif disjoint and unit_hash(seed, "reward", key) < options.reward_share:
            reward.append(row)
        else:
            sft.append(row)
    if not disjoint:
        reward = sft
    division = Division(sft, reward, held_out)
    for part, option in (("sft", "share"), ("held_out", "held_out"), ("reward", "reward_share")):
        if not getattr(division, part):
            raise UserError(
                f"data.{option}: of {len(rows)} demonstrations none is left for {part}; "
                f"expected at least one: give more demonstrations or change data.{option}"
            )
    return division


def unit_hash(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that looks random and depends on the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


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
    made: Callable[..., Any] = import_object(
        card.source.task, f"data.card {card.name}: source.task"
    )
    return made


def _from_task(card: Card, split: str, args: dict[str, Any], seed: int) -> list[Demonstration]:
    try:
        rows = _task(card)(split=split, seed=seed, **args)
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    except UserError:
        raise
    except Exception as error:  # code of one's own may raise any
        raise UserError(
            f"data.card {card.name}: source.task gave no rows of split {split}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


def _load(
    card: Card, split: str, path: str | None, shape: Callable[[Raw, Card, Mapping[str, str]], Row]
) -> list[Row]:
    own = card.splits[split]
    base = own.carved_from or split
    on_hub = path is None and card.source is not None and card.source.hub is not None
    raws = hub_rows(card, base) if on_hub else local_rows(card, base, path)
    columns = (card.source.columns if on_hub and card.source else None) or card.columns
    rows: list[Row] = []
    dropped = 0
    for raw in raws:
        if any(raw.column(name) != value for name, value in card.where.items()):
            continue
        try:
            rows.append(shape(raw, card, columns))
        except _FaultyRow:
            if card.faulty == "error":
                raise
            dropped += 1
    if dropped:
        logger.warning("%s %s: %d faulty rows dropped", card.name, split, dropped)
    rows = _carve(card, split, base, rows)
    if not rows:
        raise UserError(
            f"data.card {card.name}: split {split}: found no row, expected at least one"
        )
    if card.rows.get(split, len(rows)) != len(rows):
        logger.warning(
            "%s %s: found %d rows, the card says %d", card.name, split, len(rows), card.rows[split]
        )
    return rows


def _carve(card: Card, split: str, base: str, rows: list[Row]) -> list[Row]:
    """Rows of `split` among those of `base`: each carved split has an interval of the hashes."""
    parts = card.carved(base)
    if not parts:
        return rows
    bounds: dict[str, tuple[float, float]] = {}
    taken = 0.0
    for name, part in parts.items():
        assert part.share is not None
        bounds[name] = (taken, taken + part.share)
        taken += part.share
    low, high = bounds.get(split, (taken, 1.0))
    return [row for row in rows if low <= unit_hash(0, "carve", prompt_key(row["prompt"])) < high]


def _demonstration(raw: Raw, card: Card, columns: Mapping[str, str]) -> Demonstration:
    if (row := card.format(dict(columns))) == TEXT:
        return _begun(raw, columns["text"], card.prompt_words or 1)
    if row != MESSAGES:
        prompt = _prompt(raw, columns["prompt"], card)
        return {"prompt": prompt, "completion": _text(raw, columns["completion"])}
    messages = _messages(raw, columns["messages"])
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or (card.turn == "last" and answers[-1] != len(messages) - 1):
        raise _FaultyRow(raw.fault(columns["messages"], "no last turn of the assistant"))
    turn = answers[0] if card.turn == "first" else answers[-1]
    if turn == 0:
        raise _FaultyRow(raw.fault(columns["messages"], "an answer without a prompt"))
    return {"prompt": messages[:turn], "completion": messages[turn]["content"]}


def _begun(raw: Raw, column: str, words: int) -> Demonstration:
    """A text whose first words are the prompt; the completion starts with the space after them."""
    start = re.match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}(?=\s+\S)", _text(raw, column))
    if start is None:
        raise _FaultyRow(raw.fault(column, f"no more than the {words} words of the prompt"))
    return {"prompt": start[0], "completion": start.string[start.end() :]}


def _preference(raw: Raw, card: Card, columns: Mapping[str, str]) -> Preference:
    prompt: Prompt
    if (row := card.format(dict(columns))) == TRANSCRIPTS:
        prompt, chosen, rejected = _transcripts(raw, columns)
    elif row == LABELLED:
        prompt = _prompt(raw, columns["prompt"], card)
        better, worse = _label(raw, columns["label"], card.labels)
        chosen, rejected = _text(raw, columns[better]), _text(raw, columns[worse])
    else:
        prompt = _prompt(raw, columns["prompt"], card)
        chosen, rejected = _text(raw, columns["chosen"]), _text(raw, columns["rejected"])
    if chosen == rejected:
        raise _FaultyRow(f"{raw.place}: chosen and rejected are the same text")
    named = [str(raw.column(name)) for name in columns.get("subset", "").split("+") if name]
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "subset": "/".join(named) or raw.group,
        "margin": _number(raw, columns["margin"]) if "margin" in columns else None,
    }


def _transcripts(raw: Raw, columns: Mapping[str, str]) -> tuple[Prompt, str, str]:
    """Two transcripts that share all turns but the last, one of the assistant."""
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
        return _messages(raw, column)
    return _text(raw, column)


def _messages(raw: Raw, column: str) -> list[Message]:
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
        found = f"a text of {len(value):,} characters, expected at most {MAX_TEXT:,}"
        raise _FaultyRow(raw.fault(column, found))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _FaultyRow(raw.fault(column, "half of a surrogate pair, not text")) from error
    return value


def _label(raw: Raw, column: str, labels: Sequence[int]) -> tuple[str, str]:
    value, (one, two) = raw.column(column), labels
    for label, order in zip(labels, (("first", "second"), ("second", "first")), strict=True):
        if value in (label, str(label)):
            return order
    raise UserError(raw.fault(column, f"{show(value)}, expected {one} or {two}, the better one"))


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
