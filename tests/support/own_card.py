"""A data card of one's own, written into a test's folder."""

from pathlib import Path

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
