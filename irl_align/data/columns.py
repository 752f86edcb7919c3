"""Columns of a dataset as lists or as a dict by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from irl_align.data.rows import Prompt, stored_prompt


def read_parquet(file: Path) -> Dataset:
    """The rows of a parquet file, in memory.

    Dataset.from_parquet would read brackets in the path as a pattern.
    """
    import pyarrow.parquet

    return Dataset(pyarrow.parquet.ParquetFile(file).read())


def column(rows: Dataset, name: str) -> list[Any]:
    """The values of a column, read at once.

    Iterating over `rows[name]` reads row by row, which takes 30 times as long for texts and five
    times for token ids.
    """
    return list(rows[name][:])


def prompts_of(rows: Dataset) -> list[Prompt]:
    """The prompts of encoded rows as they are in the data: texts, or conversations."""
    return [stored_prompt(row) for row in rows.select_columns(["prompt", "messages"]).to_list()]


def prompts_by_ids(rows: Dataset) -> dict[tuple[int, ...], Prompt]:
    """Token ids of each prompt -> the prompt as it is in the data."""
    return dict(zip(map(tuple, column(rows, "prompt_ids")), prompts_of(rows), strict=True))


def by_prompt_key(rows: Dataset, name: str) -> dict[str, Any]:
    """Prompt key -> the value of a column that is equal in all rows of a prompt."""
    return dict(zip(column(rows, "prompt_key"), column(rows, name), strict=True))
