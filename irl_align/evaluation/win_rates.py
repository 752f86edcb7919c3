"""A run's policy judged by a reward that it was not trained on: how often it beats SFT and the
demonstrations, and how varied its samples are. Reads the samples that the run left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irl_align.errors import UserError
from irl_align.evaluation.compare.run_tables import policy_label
from irl_align.evaluation.preferences import reward_of
from irl_align.models.loading import pick_device
from irl_align.reward.model import RewardModel
from irl_align.training.run_folder import Run, RunView
from irl_align.utils.statistics import clustered_share


@dataclass(frozen=True)
class SamplesOf:
    """What a finished run's last policy says, and the policy that it started from."""

    label: str
    by_temperature: list[tuple[float, list[dict[str, Any]], list[dict[str, Any]]]]
    """(temperature, rows of the last policy, rows of the start or none), the hottest first."""


def last_samples(source: Path) -> SamplesOf:
    """The samples that a run left. Raises UserError: no finished run, or none with samples."""
    view = Run.load(source)
    last = int(view.require_finished()["policy_number"])
    answers, first = view.answers(last), view.answers(0) if last else {}
    if not answers:
        raise UserError(f"{source}: found no samples of policy {last}; run the recipe again")
    by_temperature = [(t, answers[t], first.get(t, [])) for t in sorted(answers, reverse=True)]
    return SamplesOf(policy_label(view, last), by_temperature)


def key_of(row: Mapping[str, Any]) -> str:
    """A sample's prompt as one string."""
    return json.dumps(row["prompt"], sort_keys=True)


def judged(source: Path, judge: Path, device: str = "auto") -> dict[str, Any]:
    """Win rates of a run's last policy by the reward of `judge`, at every temperature.

    Against the policy that the run started from and against the first demonstration of each prompt;
    equal texts count half, intervals are over prompts. Raises UserError: no finished run, or a
    judge that is a reward of the run, of whichever iteration.
    """
    samples = last_samples(source)
    folder = reward_of(judge)
    if used := _trained_on(Run.load(source), folder):
        raise UserError(
            f"--judge: found {judge}, {used} that the policy was trained on; expected another"
        )
    reward = RewardModel.from_pretrained(folder, pick_device(device))
    rows = [
        {"temperature": temperature, **_wins(reward, last, first)}
        for temperature, last, first in samples.by_temperature
    ]
    return {"judge": judge.name, "policy": samples.label, "rows": rows}


def _trained_on(view: RunView, reward: Path) -> str:
    """Which of a run's rewards is in this folder, in words; empty if none is."""
    folder = reward.resolve()
    own = (view.summary or {}).get("reward")
    if own is not None and folder == (view.folder.parent / str(own)).resolve():
        return "the reward"
    for k, stage in view.numbered_stages("reward").items():
        if folder == _model_of(view, stage):
            return f"the reward of iteration {k + 1}"
    return ""


def _model_of(view: RunView, stage: Mapping[str, str]) -> Path:
    return (view.folder / stage["path"] / "model").resolve()


def _wins(
    reward: RewardModel, samples: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Win rates and diversity of samples; `first` are those of the start's policy, or nothing."""
    prompts = [row["prompt"] for row in samples]
    keys = [key_of(row) for row in samples]
    own = reward.score(prompts, [row["completion"] for row in samples]).numpy()
    report: dict[str, Any] = {
        "samples": len(samples),
        "judge_score": float(own.mean()),
        "distinct_bigrams": distinct_bigrams([row["completion"] for row in samples]),
    }
    at_start = {key_of(row): row["completion"] for row in first}
    demonstrated = {
        key: row["demonstrations"][0]
        for key, row in zip(keys, samples, strict=True)
        if row.get("demonstrations")
    }
    for name, others in (("start", at_start), ("demonstrations", demonstrated)):
        both = [i for i, key in enumerate(keys) if key in others]
        if both:
            texts = [others[keys[i]] for i in both]
            theirs = reward.score([prompts[i] for i in both], texts).numpy()
            difference = own[both].astype(np.float64) - theirs
            # The same text may score a rounding apart in another batch.
            same = [samples[i]["completion"] == text for i, text in zip(both, texts, strict=True)]
            outcome = 0.5 * (1.0 + np.sign(np.where(same, 0.0, difference)))
            report[f"wins_against_{name}"] = asdict(
                clustered_share(outcome.tolist(), [keys[i] for i in both])
            )
    return report


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct pairs of neighbouring words over all of them (distinct-2, arXiv:1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
