"""A run's pairs and evaluation samples as a dataset with its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.data.columns import column
from irl_align.data.encoding import decode_batch
from irl_align.errors import UserError
from irl_align.hub.card import pairs_card
from irl_align.hub.facts import Facts
from irl_align.hub.licences import Licence
from irl_align.models.loading import load_tokenizer
from irl_align.utils.files import atomic_write

# Part of the pairs -> split of the dataset.
PARTS = {"train": "train", "held_out": "validation"}


COLUMNS = [
    *("prompt_ids", "chosen_ids", "rejected_prompt_ids", "rejected_ids"),
    *("source", "iteration", "sample_index", "rejected_truncated", "temperature", "prompt_key"),
]


def read_pairs(path: Path) -> Dataset:
    """Pairs of a run with COLUMNS: those that every version of the program has written."""
    try:
        return Dataset(pq.read_table(path, columns=COLUMNS))
    except (pa.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a whole parquet file of pairs: {cause}") from error


def write_pairs(folder: Path, facts: Facts, iteration: int | None, licence: Licence) -> None:
    """pairs/<split>-<iteration>.parquet, samples/<policy and temperature>.parquet, README.md.

    Texts, not token ids: prompts as they are in the data, completions without special tokens.
    """
    tokenizer = load_tokenizer(facts.stage_folder("start") / "model")
    prompts = _prompt_texts(facts)
    counts: dict[str, int] = dict.fromkeys(PARTS.values(), 0)
    (folder / "pairs").mkdir()
    for number, source in facts.pairs().items():
        for part, split in PARTS.items():
            rows = read_pairs(source / f"{part}.parquet")
            counts[split] += len(rows)
            table = pa.table(_columns(rows, prompts, tokenizer))
            pq.write_table(table, folder / "pairs" / f"{split}-{number:03d}.parquet")
    counts["samples"] = _write_samples(folder / "samples", facts)
    atomic_write(folder / "README.md", pairs_card(facts, counts, licence))


def _columns(
    rows: Dataset, prompts: Mapping[tuple[int, ...], str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    def prompt_texts(column: str) -> list[str]:
        ids = [tuple(row) for row in rows[column]]
        missing = list(dict.fromkeys(row for row in ids if row not in prompts))
        # A prompt that was edited for contrast is in no data: its ids are all there is.
        own = dict(zip(missing, decode_batch(tokenizer, missing), strict=True)) if missing else {}
        return [prompts.get(row) or own[row] for row in ids]

    kept = ("source", "iteration", "sample_index", "rejected_truncated", "temperature")
    return {
        "prompt": prompt_texts("prompt_ids"),
        "chosen": decode_batch(tokenizer, column(rows, "chosen_ids")),
        "rejected": decode_batch(tokenizer, column(rows, "rejected_ids")),
        "rejected_prompt": prompt_texts("rejected_prompt_ids"),
        **{name: list(rows[name]) for name in kept},
        "prompt_key": column(rows, "prompt_key"),
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
    """Evaluation samples, one file per policy and temperature, all with the same columns."""
    files = facts.view.samples()
    if not files:
        return 0
    folder.mkdir()
    rows = {name: [{"samples": name, **row} for row in found] for name, found in files.items()}
    names = list(dict.fromkeys(key for row in _all(rows) for key in row))
    full = {n: [{key: row.get(key) for key in names} for row in r] for n, r in rows.items()}
    schema = pa.Table.from_pylist(list(_all(full))).schema
    for name, found in full.items():
        pq.write_table(pa.Table.from_pylist(found, schema=schema), folder / f"{name}.parquet")
    return sum(map(len, full.values()))


def _all(rows: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for some in rows.values():
        yield from some
