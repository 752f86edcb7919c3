"""A data card of one's own, written into a test's folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from irl_align.data.cards import Card, load_card

DEMOS = """
  kind: demonstrations
  splits: {train: {files: demos.*}}
  columns: {prompt: question, completion: answer}
"""
PREFERENCES = """
  kind: preferences
  splits: {test: {files: pairs.*}}
"""


def write_card(folder: Path, options: str = DEMOS) -> Card:
    path = folder / "own.md"
    path.write_text(f"---\nlicense: mit\nirl_align:{options}---\n\n# Own\n", encoding="utf-8")
    return load_card(path)


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def without_places(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loaded rows without the file and line that each came from."""
    return [{name: value for name, value in row.items() if name != "place"} for row in rows]
