"""Summary of a data card's splits: counts, lengths, samples, and differences from the card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from irl_align.data.cards import Card
from irl_align.data.loading import load_demonstrations, load_preferences
from irl_align.data.rows import completion_text, prompt_key, prompt_text


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds."""

    name: str
    rows: int
    expected: int | None
    """Number of rows that the card gives."""
    prompts: frozenset[str]
    """Keys of the distinct prompts."""
    repeated: int
    """Number of rows that are equal to an earlier one."""
    words: dict[str, tuple[float, int]]
    """Field -> mean and largest number of words."""
    warnings: list[str]
    """Warnings of the loader: counts or checksums that differ from the card's, dropped rows."""
    notes: list[str]
    """What the loader says of columns and keys that are not used, or only by chat templates."""
    samples: list[dict[str, str]]


def summarize_split(
    card: Card, name: str, path: str | None, samples: int, task: Mapping[str, Any]
) -> SplitSummary:
    """Load a split, from `path` or from the card's source, with evenly spaced rows as samples.

    task: arguments for a card whose source is a procedural task. Raises UserError: the split does
    not exist or cannot be loaded.
    """
    rows: Any
    with _collected_messages() as messages:
        if card.kind == "demonstrations":
            rows, fields = load_demonstrations(card, name, path, task), ["completion"]
        else:
            rows, fields = load_preferences(card, name, path), ["chosen", "rejected"]
    texts = {"prompt": [prompt_text(row["prompt"]) for row in rows]}
    texts |= {field: [completion_text(row[field]) for row in rows] for field in fields}
    counts = {field: np.array([len(t.split()) for t in column]) for field, column in texts.items()}
    shown = np.linspace(0, len(rows) - 1, min(samples, len(rows))).astype(int)
    return SplitSummary(
        name,
        len(rows),
        card.rows.get(name),
        frozenset(prompt_key(row["prompt"]) for row in rows),
        len(rows) - len(set(zip(*texts.values(), strict=True))),
        {field: (float(words.mean()), int(words.max())) for field, words in counts.items()},
        messages[logging.WARNING],
        messages[logging.INFO],
        [{field: column[i] for field, column in texts.items()} for i in shown],
    )


@contextmanager
def _collected_messages() -> Iterator[dict[int, list[str]]]:
    """Collect by level what irl-align logs inside the block, instead of showing it."""
    messages: dict[int, list[str]] = {logging.INFO: [], logging.WARNING: []}

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.setdefault(record.levelno, []).append(record.getMessage())

    logger, handler = logging.getLogger("irl_align"), Collector()
    logger.addHandler(handler)
    level, propagate, logger.propagate = logger.level, logger.propagate, False
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
