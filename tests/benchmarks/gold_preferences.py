"""Write a preference set from a task's gold metric: pairs of a policy's samples for one prompt.

    python tests/benchmarks/gold_preferences.py runs/e2e-irl-best-of-n-seed1 gold1
    irl-align evaluate runs/e2e-irl-best-of-n-seed1 --card gold1/gold.md --train-set gold1/gold.md

The splits `train` and `test` have the first policy's samples for the run's train and held-out
prompts, which are disjoint. The sample with fewer slot errors is preferred, and the kind of error
in which the two differ most is the pair's subset. With this set a reward from demonstrations can be
compared with a reward trained on any number of exact preferences.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from reward_gold import KINDS, gold_pairs, gold_rows, prompt_texts, stages_of

from irl_align.models.loading import load_tokenizer
from irl_align.training.run_folder import Run, RunView

PARTS = {"train": ("train", "reward"), "test": ("held_out", "held_out")}
"""Split -> file of the run's pairs, and file of its demonstrations."""
CARD = """---
irl_align:
  kind: preferences
  splits: {train: {files: train.jsonl}, test: {files: test.jsonl}}
  columns: {prompt: prompt, chosen: chosen, rejected: rejected, subset: kind, margin: margin}
---
"""


def preferences(view: RunView, split: str) -> Iterator[dict[str, str | int]]:
    """All pairs of one split whose slot errors differ, by prompt, without empty texts."""
    stage = stages_of(view)
    of_pairs, of_data = PARTS[split]
    texts = prompt_texts(stage["data"] / f"{of_data}.parquet")
    tokenizer = load_tokenizer(stage["sft"] / "model")
    pairs = pq.read_table(
        stage["pairs/0"] / f"{of_pairs}.parquet", columns=["prompt_key", "rejected_ids", "source"]
    )
    samples = {
        (row["prompt_key"], str(tokenizer.decode(row["rejected_ids"], skip_special_tokens=True)))
        for row in pairs.to_pylist()
        if row["source"] == "demonstration/policy"
    }
    keys, sampled = zip(*sorted(s for s in samples if s[1].strip()), strict=True)
    judged = gold_rows(view, [texts[key] for key in keys], list(sampled))
    count = {k: np.array([row[k] for row in judged]) for k in (*KINDS, "slots", "slot_errors")}
    rates = count["slot_errors"] / count["slots"]
    numbers = np.unique(keys, return_inverse=True)[1]
    for better, worse in zip(*gold_pairs(rates, numbers), strict=True):
        yield {
            "prompt": texts[keys[better]],
            "chosen": sampled[better],
            "rejected": sampled[worse],
            "kind": max(KINDS, key=lambda k: count[k][worse] - count[k][better]),
            "margin": int(count["slot_errors"][worse] - count["slot_errors"][better]),
        }


def main(run: Path, output: Path, number: int) -> None:
    """Write the card, `number` random pairs of train, and all pairs of test."""
    view = Run.load(run)
    output.mkdir(parents=True, exist_ok=True)
    for split in PARTS:
        rows = list(preferences(view, split))
        if split == "train" and len(rows) > number:
            rows = random.Random(view.recipe["seed"]).sample(rows, number)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        prompts = len({row["prompt"] for row in rows})
        texts = len({(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")})
        print(f"{output / split}.jsonl: {len(rows)} pairs of {texts} texts of {prompts} prompts")
    (output / "gold.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=8000, help="pairs of train")
    asked = parser.parse_args()
    main(asked.run, asked.output, asked.pairs)
