"""Demonstrations and preferences of a data card's split, as checked rows of text.

A data card says where rows come from (:mod:`irl_align.data.cards` has a card of six lines for data
of your own). :mod:`irl_align.data.encoding` turns rows into token ids.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from irl_align.data.cards import Card, import_object
from irl_align.data.messages import READ, SPOKEN
from irl_align.data.parsing import parse_demonstrations, parse_preferences, parse_prompt
from irl_align.data.rows import Demonstration, Message, Preference, Prompt
from irl_align.data.sources import FaultyRow, Raw, hub_rows, local_rows, read_file
from irl_align.data.splits import Row, carve
from irl_align.errors import UserError
from irl_align.utils.sanitize import one_line

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


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
    return _load(card, split, path, parse_demonstrations)


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
    return _load(card, split, path, parse_preferences)


def load_prompts(card: Card, path: str) -> list[Prompt]:
    """Prompts of a file without demonstrations, from the card's prompt or messages column.

    Messages are cut after the last turn that is not the assistant's. Raises UserError with the
    file and line of a row that has no prompt.
    """
    column = card.columns.get("prompt", card.columns.get("messages", "prompt"))
    columns = {**card.columns, "prompt": column}

    def parse(raw: Raw, card: Card, columns: Mapping[str, str]) -> list[Prompt]:
        prompt = parse_prompt(raw, columns, card)
        if isinstance(prompt, list):
            prompt = before_answer(prompt)
            if not prompt:
                raise raw.fault(column, "only turns of the assistant, expected a prompt")
        return [prompt]

    return _parsed(read_file(Path(path)), card, columns, parse, f"{card.name} {path}")


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
        made: list[Demonstration] = []
        for row in rows:
            made.append({"prompt": row["prompt"], "completion": row["completion"]})
            if card.extra:
                made[-1]["extra"] = {name: row[name] for name in card.extra}
        return made
    except UserError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise UserError(
            f"data.card {card.name}: source.task gave no rows of split {split}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


def _load(
    card: Card,
    split: str,
    path: str | None,
    parse: Callable[[Raw, Card, Mapping[str, str]], list[Row]],
) -> list[Row]:
    """Rows of a split, parsed from the card's source or from `path`."""
    base = card.splits[split].carved_from or split
    source = card.source if path is None else None
    if source is not None and source.hub is not None:
        raws, columns = hub_rows(card, base), source.columns or card.columns
    else:
        raws, columns = local_rows(card, base, path), card.columns
    rows = carve(card, split, _parsed(raws, card, columns, parse, f"{card.name} {split}"))
    if not rows:
        raise UserError(
            f"data.card {card.name}: split {split}: found no row, expected at least one"
        )
    if card.rows.get(split, len(rows)) != len(rows):
        logger.warning(
            "%s %s: found %d rows, the card says %d", card.name, split, len(rows), card.rows[split]
        )
    return rows


def _parsed(
    raws: Iterable[Raw],
    card: Card,
    columns: Mapping[str, str],
    parse: Callable[[Raw, Card, Mapping[str, str]], list[Parsed]],
    label: str,
) -> list[Parsed]:
    """What `parse` makes of the rows that the card takes; logs what is dropped or not used.

    Raises FaultyRow: a row is faulty, and the card does not drop such rows or all of them are.
    """
    rows: list[Parsed] = []
    faults: list[FaultyRow] = []
    unused: Counter[str] = Counter()
    special: Counter[str] = Counter()
    for raw in raws:
        try:
            if any(raw.column(name) != value for name, value in card.where.items()):
                continue
            rows += parse(raw, card, columns)
        except FaultyRow as error:
            if card.faulty == "error":
                raise
            faults.append(error)
        else:
            _count_keys(raw, card, columns, unused, special)
    if faults and not rows:
        raise FaultyRow(f"{label}: all {len(faults)} rows are faulty; the first: {faults[0]}")
    if faults:
        logger.warning("%s: %d faulty rows dropped; the first: %s", label, len(faults), faults[0])
    if special:
        logger.info("%s: the model's chat template has to render %s", label, _counts(special))
    if unused:
        logger.info("%s: not used: %s", label, _counts(unused))
    return rows


def _count_keys(
    raw: Raw,
    card: Card,
    columns: Mapping[str, str],
    unused: Counter[str],
    special: Counter[str],
) -> None:
    """Count the row's columns and keys of messages that are not used, or only by chat templates."""
    chat = {columns.get("tools", "tools")} if card.template == "chat" else set()
    parts = [part for column in columns.values() for part in (column, *column.split("+"))]
    used = {*parts, *card.extra, *(part.split(".")[0] for part in parts), *card.where, *chat}
    for name, value in raw.values.items():
        if value is None or value in ("", [], {}):
            continue
        if name not in used:
            unused[name] += 1
        elif name in chat:
            special[name] += 1
        elif isinstance(value, list) and name in columns.values():
            keys = {key for turn in value if isinstance(turn, dict) for key in turn if turn[key]}
            special.update(key for key in SPOKEN if key in keys)
            unused.update(f"{name}.{key}" for key in sorted(keys - READ))


def _counts(rows: Counter[str]) -> str:
    return ", ".join(f"{one_line(name)} ({count} rows)" for name, count in sorted(rows.items()))
