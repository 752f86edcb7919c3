"""Export of a run's pairs and evaluation samples as a dataset with its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.data.columns import column
from irl_align.data.pairs import load_pairs
from irl_align.data.tokenizer import decode_batch
from irl_align.hub.card import pairs_card
from irl_align.hub.facts import Facts, Licence
from irl_align.models.loading import load_tokenizer
from irl_align.utils.files import atomic_write

PARTS = {"train": "train", "held_out": "validation"}
"""Part of the pairs -> split of the dataset."""


def write_pairs(folder: Path, facts: Facts, licence: Licence) -> None:
    """Write pairs/<split>-<iteration>.parquet, samples/<policy and temperature>.parquet and
    README.md.

    They hold texts, not token ids: prompts as they are in the data, completions without special
    tokens.
    """
    tokenizer = load_tokenizer(facts.stage_folder("start") / "model")
    prompts = _prompt_texts(facts)
    counts: dict[str, int] = dict.fromkeys(PARTS.values(), 0)
    (folder / "pairs").mkdir()
    for number, source in facts.pairs().items():
        for part, split in PARTS.items():
            rows = load_pairs(source / f"{part}.parquet")
            counts[split] += len(rows)
            table = pa.table(_columns(rows, prompts, tokenizer))
            pq.write_table(table, folder / "pairs" / f"{split}-{number:03d}.parquet")
    counts["samples"] = _write_samples(folder / "samples", facts)
    atomic_write(folder / "README.md", pairs_card(facts, counts, licence))


def _columns(
    rows: Dataset, prompts: Mapping[tuple[int, ...], str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    def prompt_texts(name: str) -> list[str]:
        ids = [tuple(row) for row in column(rows, name)]
        # A prompt that was edited for contrast is not in the data: decode its ids.
        edited = [row for row in ids if row not in prompts]
        decoded = dict(zip(edited, decode_batch(tokenizer, edited), strict=True)) if edited else {}
        return [prompts.get(row) or decoded[row] for row in ids]

    kept = (
        "source",
        "iteration",
        "sample_index",
        "rejected_truncated",
        "temperature",
        "prompt_key",
    )
    return {
        "prompt": prompt_texts("prompt_ids"),
        "chosen": decode_batch(tokenizer, column(rows, "chosen_ids")),
        "rejected": decode_batch(tokenizer, column(rows, "rejected_ids")),
        "rejected_prompt": prompt_texts("rejected_prompt_ids"),
        **{name: column(rows, name) for name in (*kept, "prompt_key")},
    }


def _prompt_texts(facts: Facts) -> dict[tuple[int, ...], str]:
    """Token ids of every prompt of the demonstrations -> its text."""
    texts: dict[tuple[int, ...], str] = {}
    for part in ("reward", "held_out"):
        path = facts.stage_folder("data") / f"{part}.parquet"
        rows = pq.read_table(path, columns=["prompt_ids", "prompt"])
        ids = rows.column("prompt_ids").to_pylist()
        texts.update(zip(map(tuple, ids), rows.column("prompt").to_pylist(), strict=True))
    return texts


def _write_samples(folder: Path, facts: Facts) -> int:
    """Write the evaluation samples, one file per policy and temperature, all with the same columns.

    Returns the number of samples.
    """
    rows = [{"samples": name, **row} for name, own in facts.view.samples().items() for row in own]
    if not rows:
        return 0
    folder.mkdir()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    for file in dict.fromkeys(row["samples"] for row in rows):
        own = table.filter(pc.equal(table["samples"], file))
        pq.write_table(own, folder / f"{file}.parquet")
    return len(rows)
