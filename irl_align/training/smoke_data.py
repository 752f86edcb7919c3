"""Tiny made-up data in the columns of a data card, for smoke runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from irl_align.config.schema import Recipe
from irl_align.data.cards import LABELLED, MESSAGES, PLAIN, TEXT, TRANSCRIPTS, Card, load_card
from irl_align.data.loading import load_demonstrations
from irl_align.data.rows import Demonstration, Prompt, completion_text, prompt_text
from irl_align.tasks import restaurant
from irl_align.utils.files import atomic_write

NOTICE = "smoke run: a tiny model on made-up data; its numbers mean nothing"
_ROWS = {"train": 48}  # demonstrations of a split
_FEWER = 16  # of any other split


def write_demonstrations(recipe: Recipe, folder: Path) -> Path:
    """Write a copy of the recipe's card and tiny files of its splits; return the copy's path.

    The texts are those of the built-in task, or the card's own if the card is a task.
    """
    card = load_card(recipe.data.card)
    splits = [name for name in card.split_names if card.is_task or name not in _carved(card)]

    def rows(split: str) -> list[Demonstration]:
        count = _ROWS.get(split, _FEWER)
        if card.is_task:
            task = recipe.data.task
            return load_demonstrations(card, split, None, task, recipe.seed)[:count]
        made = restaurant.demonstrations(split="train", seed=splits.index(split), size=count)
        return [{"prompt": row["prompt"], "completion": row["completion"]} for row in made]

    columns = {"prompt": "prompt", "completion": "completion"} if card.is_task else _columns(card)
    for split in splits:
        shaped = [_demonstration(card, columns, row, i) for i, row in enumerate(rows(split))]
        _write_rows(folder / f"{card.name}-{split}.jsonl", shaped)
    return _write_card(card, columns, splits, folder)


def write_preferences(card: Card, split: str, folder: Path) -> Path:
    """Write a copy of a preference card and a tiny file of one split; return the copy's path."""
    base = card.splits[split].carved_from or split
    texts = list(restaurant.demonstrations(split="train", seed=7, size=_ROWS["train"] + 1))
    columns = _columns(card)
    shaped = [
        _preference(card, columns, row["prompt"], row["completion"], other["completion"])
        for row, other in pairwise(texts)
    ]
    _write_rows(folder / f"{card.name}-{base}.jsonl", shaped)
    return _write_card(card, columns, [base], folder)


def _carved(card: Card) -> set[str]:
    return {name for name, split in card.splits.items() if split.carved_from is not None}


def _columns(card: Card) -> dict[str, str]:
    """Field -> column: those on the Hub if the card has a Hub source, else those of local files."""
    return dict((card.source.columns if card.source is not None else None) or card.columns)


def _write_card(card: Card, columns: dict[str, str], splits: Sequence[str], folder: Path) -> Path:
    """Write the card with the tiny files in place of its source."""
    own = {"name", "folder", "license", "source", "splits", "columns", "rows", "sha256"}
    if not card.is_task:
        own |= {"gold", "edit"}  # both need prompts of the card's own data
    options = card.model_dump(exclude=own, exclude_defaults=True)
    files: dict[str, Any] = {name: {"files": f"{card.name}-{name}.jsonl"} for name in splits}
    for base in splits:
        parts = {} if card.is_task else card.carved(base)
        files |= {name: {"from": base, "share": 0.25 / len(parts)} for name in parts}
    options |= {"kind": card.kind, "splits": files, "columns": columns}
    front = yaml.safe_dump({"license": card.license, "irl_align": options}, sort_keys=False)
    path = folder / f"{card.name}.md"
    atomic_write(path, f"---\n{front}---\n\n{NOTICE}\n")
    return path


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _demonstration(
    card: Card, columns: dict[str, str], row: Demonstration, number: int
) -> dict[str, Any]:
    """A demonstration as a row of the card's data."""
    prompt, completion = prompt_text(row["prompt"]), completion_text(row["completion"])
    form = PLAIN if card.is_task else card.format(columns)
    if form == MESSAGES:
        turns = [("user", prompt), ("assistant", completion)]
        if card.turn == "first":  # later turns are left out
            turns += [("user", "Thanks."), ("assistant", "You are welcome.")]
        fields: dict[str, Any] = {"messages": _messages(turns)}
    elif form == TEXT:
        fields = {"text": f"{prompt} {completion}"}
    else:
        asked: Prompt = prompt
        if card.template == "chat" and number % 2:  # text and conversations are both allowed
            asked = _messages([("user", prompt)])  # type: ignore[assignment]
        fields = {"prompt": asked, "completion": completion}
    return _row(card, columns, fields)


def _preference(
    card: Card, columns: dict[str, str], prompt: str, chosen: str, rejected: str
) -> dict[str, Any]:
    """A preference pair as a row of the card's data."""
    form = card.format(columns)
    if form == TRANSCRIPTS:
        asked = f"\n\nHuman: {prompt}\n\nAssistant: "
        fields: dict[str, Any] = {
            "chosen_transcript": asked + chosen,
            "rejected_transcript": asked + rejected,
        }
    elif form == LABELLED:
        fields = {"prompt": prompt, "first": chosen, "second": rejected, "label": card.labels[0]}
    else:
        fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return _row(card, columns, {**fields, "margin": 1.0, "subset": "smoke"})


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _row(card: Card, columns: dict[str, str], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields in their columns; a column a.0.b is key b of item 0 of column a."""
    row: dict[str, Any] = dict(card.where)
    for field, column in columns.items():
        for name in column.split("+"):
            first, *path = name.split(".")
            value = fields[field]
            for step in reversed(path):
                value = [*[{}] * int(step), value] if step.isdigit() else {step: value}
            row[first] = value
    return row
