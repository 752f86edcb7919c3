"""How well do rewards agree with a task's gold metric among samples of one prompt?

    python tests/benchmarks/reward_gold.py runs/e2e-irl-rloo-seed1 runs/e2e-irl-rloo-seed2

Judges each run's first reward, explicit or SPIN's, on its samples for held-out prompts. A line has:

- the correlation of the reward with the number of errors of each kind, and with length, after the
  prompt's mean is subtracted from both;
- the slot errors of the samples with the highest and the lowest reward, and of the mean sample;
- the share of gold pairs (two samples of one prompt, one with fewer slot errors) that the reward
  ranks right, and the same for the SFT model's log-prob and for length; ties count half.

"both" is the sum of the reward and the mean log-prob, each divided by its standard deviation within
prompts. --beside, a run or a reward's folder, adds further rewards of the same samples, each
without and with the mean log-prob. "beside" is the sum of these and the mean log-prob; "all" also
includes the run's own reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from irl_align.data.cards import import_object, load_card
from irl_align.data.pairs import load_pairs
from irl_align.data.tokenizer import decode_batch
from irl_align.models.loading import load_model, load_tokenizer
from irl_align.reward.implicit import ImplicitReward
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import RewardFunction
from irl_align.training.run_folder import Run, RunView

KINDS = ("missing", "wrong", "hallucinated")


def centred(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Values (N,) minus the mean of their prompt; prompts (N,) are numbers from 0."""
    means = np.bincount(prompts, values) / np.bincount(prompts)
    return np.asarray(values - means[prompts])


def gold_pairs(errors: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (M,) of the better and of the worse sample of all pairs of a prompt that differ."""
    better, worse = [], []
    for prompt in range(int(prompts.max()) + 1):
        rows = np.flatnonzero(prompts == prompt)
        one, other = np.nonzero(errors[rows][:, None] < errors[rows][None, :])
        better.append(rows[one])
        worse.append(rows[other])
    return np.concatenate(better), np.concatenate(worse)


def accuracy(scores: np.ndarray, better: np.ndarray, worse: np.ndarray) -> float:
    """Share of pairs whose better sample has the higher score; a tie counts half."""
    gap = scores[better] - scores[worse]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def summed(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Sum of scores (N,), each divided by its standard deviation."""
    return np.asarray(np.sum([values / values.std() for values in scores], axis=0))


def prompt_texts(file: Path) -> dict[str, str]:
    """Prompt key -> prompt, from a file of the data stage."""
    data = pq.read_table(file, columns=["prompt_key", "prompt"])
    return {row["prompt_key"]: row["prompt"] for row in data.to_pylist()}


def gold_rows(view: RunView, prompts: list[str], texts: list[str]) -> list[dict[str, float]]:
    """The gold metric's row of each text: errors of every kind, and slots asked for."""
    gold = import_object(load_card(view.recipe["data"]["card"]).gold or "", "gold")
    rows: list[dict[str, float]] = gold(prompts, texts, [[] for _ in prompts]).rows
    return rows


def first_reward(stage: dict[str, Path]) -> RewardFunction:
    """The explicit reward of a run's first iteration, or SPIN's log-ratio (with beta 1)."""
    if stage["reward/0"].name.startswith("implicit"):
        policy, reference = (load_model(stage[role] / "model") for role in ("reward/0", "sft"))
        return ImplicitReward(policy, [(1.0, reference)], 1.0)
    return RewardModel.from_pretrained(stage["reward/0"] / "model")


def stages_of(view: RunView) -> dict[str, Path]:
    """Role -> folder of a run's stages."""
    return {role: view.folder / where["path"] for role, where in view.stages.items()}


def load_reward(folder: Path) -> RewardFunction:
    """The first reward of a run, or the reward in a folder."""
    if (folder / "stages.json").exists():
        return first_reward(stages_of(Run.load(folder)))
    return RewardModel.from_pretrained(folder)


def further_scores(
    further: Mapping[str, np.ndarray], own: np.ndarray, mean_logp: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of further rewards and of their sums; all are (N,) and centred by prompt."""
    rewards = list(further.values())
    scores = dict(further)
    scores |= {f"{name} and mean log-prob": summed([v, mean_logp]) for name, v in further.items()}
    if len(rewards) > 1:
        scores["beside"] = summed([mean_logp, *rewards])
    return scores | ({"all": summed([own, mean_logp, *rewards])} if rewards else {})


def main(folder: Path, beside: Sequence[Path] = ()) -> None:
    """Print one run's line; beside: folders of further rewards."""
    view = Run.load(folder)
    stage = stages_of(view)
    pairs = load_pairs(stage["pairs/0"] / "held_out.parquet").to_list()
    pairs = [pair for pair in pairs if pair["source"] == "demonstration/policy"]
    texts = prompt_texts(stage["data"] / "held_out.parquet")
    samples = {(p["prompt_key"], tuple(p["rejected_ids"])): p["prompt_ids"] for p in pairs}
    logp = {(p["prompt_key"], tuple(p["rejected_ids"])): p["rejected_logp"] for p in pairs}
    keys = [key for key, _ in samples]
    ids = [list(completion) for _, completion in samples]
    asked = list(samples.values())
    scores = first_reward(stage).score_ids(asked, ids).double().numpy()
    tokenizer = load_tokenizer(stage["sft"] / "model")
    decoded = decode_batch(tokenizer, ids)
    rows = gold_rows(view, [texts[key] for key in keys], decoded)
    prompts = np.unique(keys, return_inverse=True)[1]
    measures = {kind: np.array([row[kind] for row in rows]) for kind in KINDS}
    measures["length"] = np.array([float(len(row)) for row in ids])
    own = centred(scores, prompts)
    correlations = {
        name: np.corrcoef(own, centred(values, prompts))[0, 1] for name, values in measures.items()
    }
    errors, slots = (np.array([row[name] for row in rows]) for name in ("slot_errors", "slots"))
    order = np.lexsort((scores, prompts))
    ends = np.append(np.flatnonzero(np.diff(prompts[order])), len(order) - 1)
    starts = np.append(0, ends[:-1] + 1)
    chosen = {"best": order[ends], "worst": order[starts], "mean": order}
    rates = {name: errors[at].sum() / slots[at].sum() for name, at in chosen.items()}
    pair = gold_pairs(errors / slots, prompts)
    lengths, sums = measures["length"], np.array(list(logp.values()), float)
    others = {"log-prob": sums, "mean log-prob": sums / lengths, "longer": lengths}
    mean_logp = centred(others["mean log-prob"], prompts)
    others = {"both": summed([own, mean_logp]), **others}
    further = {
        path.name: centred(load_reward(path).score_ids(asked, ids).double().numpy(), prompts)
        for path in beside
    }
    others |= further_scores(further, own, mean_logp)
    shares = {
        name: accuracy(values, *pair) for name, values in {"reward": scores, **others}.items()
    }
    print(
        f"{folder.name}: correlation with "
        + ", ".join(f"{name} {value:.2f}" for name, value in correlations.items())
        + "; slot errors of "
        + ", ".join(f"{name} {value:.1%}" for name, value in rates.items())
        + f"; of {len(pair[0])} gold pairs "
        + ", ".join(f"{name} {value:.1%}" for name, value in shares.items())
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="RUN|REWARD")
    given = parser.parse_args()
    for run in given.runs:
        main(run, given.beside)
