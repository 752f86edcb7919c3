"""A column of a dataset as a list."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def column(rows: Dataset, name: str) -> list[Any]:
    """The values of a column, read at once.

    Going through `rows[name]` asks for one row after the other: 30 times the time for texts, five
    times for token ids.
    """
    return list(rows[name][:])
