"""Preference pairs of a few words, and a card for them, for tests of `irl-align evaluate`."""

import json
from pathlib import Path
from typing import Any

CARD = """\
---
irl_align:
  kind: preferences
  splits: {test: {files: pairs.jsonl}, train: {files: train.jsonl}}
  columns: {prompt: prompt, chosen: chosen, rejected: rejected, subset: axis, margin: margin}
---
"""
PAIRS = [
    # prompt, chosen, rejected, axis, margin
    ("name[the red lion], food[thai]", "the red lion serves thai food.", "it.", "a/x", 1.0),
    ("name[the red lion], food[thai]", "thai.", "the red lion is the red lion.", "a/x", 2.0),
    ("name[the blue heron]", "the blue heron is cheap.", "the blue heron", "b", 1.0),
    ("name[the blue heron]", "the the the", "the the", "b", 3.0),
]


def write_pairs(path: Path, pairs: list[tuple[Any, ...]]) -> None:
    names = ("prompt", "chosen", "rejected", "axis", "margin")
    lines = [json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs]
    path.write_text("".join(lines), encoding="utf-8")
