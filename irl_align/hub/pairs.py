"""Export of a run's pairs and evaluation samples as a dataset with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from irl_align.data.columns import column, prompts_by_ids, prompts_of
from irl_align.data.decoding import TokenFormat, decode_answers
from irl_align.data.pairs import FEATURES, load_pairs
from irl_align.data.rows import Prompt, as_messages
from irl_align.evaluation.inference import prompt_format
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
    tokens and without what the template writes around them. Where prompts are conversations, they
    and the completions are lists of messages.
    """
    start = facts.stage_folder("start") / "model"
    known, by_key = _known_prompts(facts)
    form = TokenFormat(load_tokenizer(start), prompt_format(start), known)
    counts: dict[str, int] = dict.fromkeys(PARTS.values(), 0)
    (folder / "pairs").mkdir()
    for number, source in facts.pairs().items():
        for part, split in PARTS.items():
            rows = load_pairs(source / f"{part}.parquet")
            counts[split] += len(rows)
            table = pa.table(_columns(rows, form, by_key))
            pq.write_table(table, folder / "pairs" / f"{split}-{number:03d}.parquet")
    counts["samples"] = _write_samples(folder / "samples", facts)
    atomic_write(folder / "README.md", pairs_card(facts, counts, licence))


def _columns(rows: Dataset, form: TokenFormat, by_key: Mapping[str, Prompt]) -> dict[str, Any]:
    """Columns of the exported table; all rows are conversations if any prompt is one.

    by_key: prompt key of a pair -> the prompt of its demonstration.
    """
    ids = {name: column(rows, name) for name in FEATURES if name.endswith("_ids")}
    own = [by_key[key] for key in column(rows, "prompt_key")]
    # A prompt that was edited for contrast is not in the data: its last turn is decoded.
    prompts = {
        name: [form.prompt(row, like) for row, like in zip(ids[name], own, strict=True)]
        for name in ("prompt_ids", "rejected_prompt_ids")
    }
    answers = {
        side: [
            answer.text
            for answer in decode_answers(
                prompts[given], ids[f"{side}_ids"], form.tokenizer, form.card
            )
        ]
        for side, given in (("chosen", "prompt_ids"), ("rejected", "rejected_prompt_ids"))
    }
    columns: dict[str, list[Any]] = {
        "prompt": prompts["prompt_ids"],
        **answers,
        "rejected_prompt": prompts["rejected_prompt_ids"],
    }
    if not all(isinstance(prompt, str) for prompt in columns["prompt"]):
        tools = [as_messages(prompt)[0].get("tools") for prompt in columns["prompt"]]
        if any(tools):
            columns["tools"] = [json.dumps(own or []) for own in tools]
        for name in ("prompt", "rejected_prompt"):
            columns[name] = list(map(_plain_messages, columns[name]))
        for side in answers:
            columns[side] = [[{"role": "assistant", "content": text}] for text in answers[side]]
    kept = ("source", "iteration", "sample_index", "rejected_truncated", "temperature")
    return {**columns, **{name: column(rows, name) for name in (*kept, "prompt_key")}}


def _plain_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as messages of texts, which fit in a table: calls of functions are JSON."""
    return [
        {k: json.dumps(v) if k == "tool_calls" else v for k, v in turn.items() if k != "tools"}
        for turn in as_messages(prompt)
    ]


def _known_prompts(
    facts: Facts,
) -> tuple[dict[tuple[int, ...], Prompt], dict[str, Prompt]]:
    """The prompts of the demonstrations by their token ids and by their keys."""
    by_ids: dict[tuple[int, ...], Prompt] = {}
    by_key: dict[str, Prompt] = {}
    for part in ("reward", "held_out"):
        path = facts.stage_folder("data") / f"{part}.parquet"
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
        by_ids |= prompts_by_ids(rows)
        by_key |= dict(zip(column(rows, "prompt_key"), prompts_of(rows), strict=True))
    return by_ids, by_key


def _write_samples(folder: Path, facts: Facts) -> int:
    """Write the evaluation samples, one file per policy and temperature, all with the same columns.

    Returns the number of samples.
    """
    rows = [{"samples": name, **row} for name, own in facts.view.samples().items() for row in own]
    if not rows:
        return 0
    folder.mkdir()
    if not all(isinstance(row["prompt"], str) for row in rows):
        rows = [{**row, "prompt": _plain_messages(row["prompt"])} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    for file in dict.fromkeys(row["samples"] for row in rows):
        own = table.filter(pc.equal(table["samples"], file))
        pq.write_table(own, folder / f"{file}.parquet")
    return len(rows)
