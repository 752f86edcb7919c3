"""What a data card loads: counts, lengths, overlaps, samples, and checks: `irl-align data`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from irl_align.data.cards import Card, load_card
from irl_align.data.encoding import prompt_text
from irl_align.data.loading import load_demonstrations, load_preferences, prompt_key
from irl_align.errors import UserError

SHOWN = 300  # characters of a text in a sample


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split."""

    name: str
    rows: int
    expected: int | None
    """Rows that the card says."""
    prompts: frozenset[str]
    """Keys of the distinct prompts."""
    repeated: int
    """Rows that are equal to an earlier one."""
    words: dict[str, tuple[float, int]]
    """Field -> mean and largest number of words."""
    faults: list[str]
    """What the loader warned of: other counts or checksums than the card's, rows left out."""
    samples: list[dict[str, Any]]


def report(
    card: Card, splits: Sequence[str], path: str | None, samples: int, task: dict[str, Any]
) -> list[SplitReport]:
    """Load splits, from `path` or from where the card says; evenly spaced rows as samples.

    Raises UserError where a split does not exist or cannot be loaded.
    """
    return [_split(card, name, path, samples, task) for name in splits]


def _split(
    card: Card, name: str, path: str | None, samples: int, task: dict[str, Any]
) -> SplitReport:
    rows: Any
    with _warnings() as faults:
        if card.kind == "demonstrations":
            rows = load_demonstrations(card, name, path, task)
            fields = ["completion"]
        else:
            rows = load_preferences(card, name, path)
            fields = ["chosen", "rejected"]
    texts = {"prompt": [prompt_text(row["prompt"]) for row in rows]}
    texts |= {field: [str(row[field]) for row in rows] for field in fields}
    counts = {f: np.array([len(text.split()) for text in found]) for f, found in texts.items()}
    chosen = np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int)
    return SplitReport(
        name,
        len(rows),
        card.rows.get(name),
        frozenset(prompt_key(row["prompt"]) for row in rows),
        len(rows) - len(set(zip(*texts.values(), strict=True))),
        {field: (float(found.mean()), int(found.max())) for field, found in counts.items()},
        faults,
        [{f: found[i] for f, found in texts.items()} for i in chosen],
    )


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what irl-align warns of inside the block."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("irl_align"), Keep(logging.WARNING)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def show(
    name: str,
    console: Console,
    path: str | None = None,
    split: str | None = None,
    samples: int = 2,
    check: bool = False,
    task: Sequence[str] = (),
) -> None:
    """Print what a card says and what its splits hold.

    check: raise UserError with every difference between the card and the data. split: that one
    alone; all by default. task: key=value for a card whose source is a procedural task.
    """
    card = load_card(name)
    splits = [split] if split else card.split_names
    found = report(card, splits, path, samples, dict(_setting(text) for text in task))
    console.print(f"{card.name}: {card.kind}, licence {card.license or 'not given'}", markup=False)
    console.print(_table(found))
    for part in found:
        for other in found:
            shared = len(part.prompts & other.prompts)
            if part is not other and part.name == "train" and shared:
                share = shared / len(other.prompts)
                console.print(f"{share:.1%} of the prompts of {other.name} are in train as well")
        for fault in part.faults:
            console.print(f"note: {fault}", markup=False, soft_wrap=True)
    for part in found:
        for sample in part.samples:
            console.rule(f"sample of {part.name}", align="left")
            for field, text in sample.items():
                line = f"[bold]{field}[/bold]: {escape(_cut(text))}"
                console.print(line, highlight=False, markup=True)
    if check:
        _check(card, found)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--task: found {text!r}, expected key=value")
    return key, yaml.safe_load(value)


def _check(card: Card, found: Sequence[SplitReport]) -> None:
    faults = [fault for part in found for fault in part.faults]
    if not card.license:
        faults.append(f"{card.name}: the card gives no license")
    if faults:
        raise UserError(f"data.card {card.name}: {len(faults)} checks failed: {'; '.join(faults)}")


def _table(found: Sequence[SplitReport]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("split")
    fields = list(found[0].words)
    for column in ("rows", "the card says", "prompts", "repeated", *fields):
        table.add_column(column, justify="right")
    for part in found:
        table.add_row(
            part.name,
            f"{part.rows:,}",
            "-" if part.expected is None else f"{part.expected:,}",
            f"{len(part.prompts):,}",
            f"{part.repeated:,}",
            *(f"{mean:.0f} words, at most {most:,}" for mean, most in part.words.values()),
        )
    return table


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"
