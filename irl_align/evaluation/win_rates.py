"""Win rates of a run's policy by a reward that it was not trained on, against SFT and the
demonstrations, and the diversity of its samples. Reads the samples in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irl_align.errors import UserError
from irl_align.evaluation.compare.policies import policy_label
from irl_align.evaluation.preference_data import is_foreign
from irl_align.evaluation.preferences import reward_of
from irl_align.models.loading import pick_device
from irl_align.reward.foreign import TextReward, load_text_reward
from irl_align.training.run_folder import Run, RunView
from irl_align.utils.statistics import clustered_share


@dataclass(frozen=True)
class LastSamples:
    """The samples of a finished run's last policy at one temperature, and those to compare with."""

    temperature: float
    rows: list[dict[str, Any]]
    """Rows of the last policy."""
    opponents: dict[str, dict[str, str]]
    """`start` (the policy that the run started from) and `demonstrations` -> prompt key -> text;
    empty where there are none."""


def prompt_id(row: Mapping[str, Any]) -> str:
    """A sample's prompt as one string."""
    return json.dumps(row["prompt"], sort_keys=True)


def last_samples(source: Path) -> tuple[str, list[LastSamples]]:
    """Label of a run's last policy, and its samples by temperature, the hottest first.

    Raises UserError: the run is not finished, or has no samples.
    """
    view = Run.load(source)
    last = int(view.require_finished()["policy_number"])
    start_rows = view.answers(0) if last else {}
    samples = []
    for temperature, rows in reversed(view.answers(last).items()):
        demonstrated = {
            prompt_id(row): row["demonstrations"][0] for row in rows if row.get("demonstrations")
        }
        start = {prompt_id(row): row["completion"] for row in start_rows.get(temperature, [])}
        opponents = {"start": start, "demonstrations": demonstrated}
        samples.append(LastSamples(temperature, rows, opponents))
    if not samples:
        raise UserError(f"{source}: found no samples of policy {last}; run the recipe again")
    return policy_label(view, last), samples


def win_rates(
    source: Path, judge: Path, device: str = "auto", template: str | None = None
) -> dict[str, Any]:
    """Win rates of a run's last policy by the reward of `judge`, at every temperature.

    The opponents are the policy that the run started from and the first demonstration of each
    prompt. Equal texts count half; intervals are over prompts. template: of a judge that was not
    fitted here, see load_text_reward. Raises UserError: no finished run, or a judge that is a
    reward of the run, of any iteration.
    """
    label, samples = last_samples(source)
    folder = reward_of(judge)
    if own := _own_reward(Run.load(source), folder):
        raise UserError(
            f"--judge: found {judge}, {own} that the policy was trained on; expected another"
        )
    chosen = template if is_foreign(folder, is_reward=True) else None
    reward = load_text_reward(folder, pick_device(device), chosen)
    rows = [{"temperature": one.temperature, **_wins(reward, one)} for one in samples]
    return {"judge": judge.name, "policy": label, "rows": rows}


def _own_reward(view: RunView, reward: Path) -> str:
    """Which of a run's rewards is in this folder, in words; empty if none is."""
    own = {
        view.folder / stage["path"] / "model": f"the reward of iteration {k + 1}"
        for k, stage in view.numbered_stages("reward").items()
    }
    if last := (view.summary or {}).get("reward"):
        own = {view.folder.parent / str(last): "the reward", **own}
    names = (name for path, name in own.items() if path.resolve() == reward.resolve())
    return next(names, "")


def _wins(reward: TextReward, samples: LastSamples) -> dict[str, Any]:
    """Win rates against every opponent, mean score and diversity of samples.

    If training has seen some of the prompts, there are also win rates on the unseen ones.
    """
    prompts = [row["prompt"] for row in samples.rows]
    keys = [prompt_id(row) for row in samples.rows]
    texts = [row["completion"] for row in samples.rows]
    scores = reward.score(prompts, texts).numpy()
    report: dict[str, Any] = {
        "samples": len(samples.rows),
        "judge_score": float(scores.mean()),
        "distinct_bigrams": distinct_bigrams(texts),
    }
    for name, others in samples.opponents.items():
        compared = [i for i, key in enumerate(keys) if key in others]
        if not compared:
            continue
        other_texts = [others[keys[i]] for i in compared]
        other_scores = reward.score([prompts[i] for i in compared], other_texts).numpy()
        difference = scores[compared].astype(np.float64) - other_scores
        # The same text may score slightly differently in another batch.
        same = [texts[i] == other for i, other in zip(compared, other_texts, strict=True)]
        outcome = 0.5 * (1.0 + np.sign(np.where(same, 0.0, difference)))
        unseen = [samples.rows[i].get("seen") is False for i in compared]
        parts = {"": [True] * len(compared), "_unseen": unseen}
        for part, chosen in parts.items():
            own = [(o, keys[i]) for o, i, use in zip(outcome, compared, chosen, strict=True) if use]
            if own:
                share = clustered_share(*zip(*own, strict=True))
                report[f"wins_against_{name}{part}"] = asdict(share)
    return report


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct pairs of neighbouring words over all of them (distinct-2, arXiv:1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
