"""What a learned reward sees of a task's gold errors, within a prompt.

    python tests/benchmarks/reward_gold.py runs/e2e-irl-rloo-seed1 runs/e2e-irl-rloo-seed2

Of each run's first reward, on the held-out prompts' samples that it was judged by: the correlation
of reward and error count of each kind, and with length, after both lost their prompt's mean; and
the slot errors of the sample that the reward likes best and least, beside the mean sample's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from irl_align.cards import import_object, load_card
from irl_align.pairs import load_pairs
from irl_align.reward.model import RewardModel
from irl_align.stages import Run

KINDS = ("missing", "wrong", "hallucinated")


def centred(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Values less their prompt's mean; prompts are numbers from 0."""
    return values - (np.bincount(prompts, values) / np.bincount(prompts))[prompts]


def main(folder: Path) -> None:
    """Print one run's line."""
    view = Run.load(folder)
    stage = {role: folder / where["path"] for role, where in view.stages.items()}
    pairs = load_pairs(stage["pairs/0"] / "held_out.parquet").to_list()
    pairs = [pair for pair in pairs if pair["source"] == "demonstration/policy"]
    data = pq.read_table(stage["data"] / "held_out.parquet", columns=["prompt_key", "prompt"])
    texts = {row["prompt_key"]: row["prompt"] for row in data.to_pylist()}
    samples = {(p["prompt_key"], tuple(p["rejected_ids"])): p["prompt_ids"] for p in pairs}
    keys = [key for key, _ in samples]
    ids = [list(completion) for _, completion in samples]
    reward = RewardModel.from_pretrained(stage["reward/0"] / "model")
    scores = reward.score_ids(list(samples.values()), ids, None).double().numpy()
    gold = import_object(load_card(view.recipe["data"]["card"]).gold or "", "gold")
    decoded = [reward.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    rows = gold([texts[key] for key in keys], decoded, [[] for _ in keys]).rows
    prompts = np.unique(keys, return_inverse=True)[1]
    measures = {kind: np.array([row[kind] for row in rows]) for kind in KINDS}
    measures["length"] = np.array([float(len(row)) for row in ids])
    own = centred(scores, prompts)
    seen = {
        name: np.corrcoef(own, centred(values, prompts))[0, 1] for name, values in measures.items()
    }
    errors, slots = (np.array([row[name] for row in rows]) for name in ("slot_errors", "slots"))
    order = np.lexsort((scores, prompts))
    ends = np.append(np.flatnonzero(np.diff(prompts[order])), len(order) - 1)
    starts = np.append(0, ends[:-1] + 1)
    chosen = {"best": order[ends], "worst": order[starts], "mean": order}
    rates = {name: errors[at].sum() / slots[at].sum() for name, at in chosen.items()}
    print(
        f"{folder.name}: correlation with "
        + ", ".join(f"{name} {value:.2f}" for name, value in seen.items())
        + "; slot errors of "
        + ", ".join(f"{name} {value:.1%}" for name, value in rates.items())
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
