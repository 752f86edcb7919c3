"""`irl-align evaluate`: rewards on preference sets, beside what length and log-probs tell alone.

Preferences are for reporting only: no run selects by what is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.data.columns import column
from irl_align.data.loading import prompt_key
from irl_align.errors import UserError
from irl_align.evaluation.preference_baseline import (
    PreferenceBaseline,
    first_policy,
    preference_reward,
)
from irl_align.evaluation.preference_data import (
    PreferenceSet,
    axes_of,
    encode,
    fits,
    reads_prompt_again,
)
from irl_align.evaluation.preference_tables import (
    BASELINES,
    PREFERENCE_REWARD,
    PairSet,
    excess_share,
    preference_report,
)
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_model, pick_device
from irl_align.reward.losses import calibration_error
from irl_align.reward.model import RewardModel
from irl_align.training.run_folder import Run, RunView, is_run

OWN_REWARD, IMPLICIT_REWARD = "reward", "implicit reward"
RESERVED = (OWN_REWARD, IMPLICIT_REWARD, PREFERENCE_REWARD, *BASELINES)
"""Names of scorers that no run beside can have."""


@dataclass(frozen=True)
class Implicit:
    """The reward log pi(y|x) - log pi_0(y|x) that SPIN and DPO fit, up to its beta."""

    policy: Path
    reference: Path
    """The model that the policy started from."""


@dataclass(frozen=True)
class Subject:
    """What of a run or a model folder is evaluated."""

    rewards: Mapping[str, Path]
    """Name -> folder of an explicit reward."""
    implicit: Mapping[str, Implicit]
    """Name -> an implicit reward (SPIN, DPO)."""
    sft: Path | None = None
    """Language model of the log-prob baselines."""
    view: RunView | None = None
    """The run, where it is one."""


@dataclass(frozen=True)
class Scored:
    """Margins of every scorer on the same pairs, and the calibration of those that are logits."""

    margins: dict[str, np.ndarray]
    calibration: dict[str, float]


def subject(path: Path, sft: Path | None = None, beside: Sequence[Path] = ()) -> Subject:
    """What is at `path`: a run, or a model's folder (a reward, or a policy where `sft` is given).

    beside: other runs or rewards, to score the same pairs; of SPIN and DPO the implicit reward.
    Raises UserError: an unfinished run, or nothing to evaluate.
    """
    what = _of_run(path) if is_run(path) else _of_model(path, sft)
    rewards, implicit = dict(what.rewards), dict(what.implicit)
    for other in beside:
        found = _beside(other)
        name = _unused(other.name, {*RESERVED, *rewards, *implicit})
        if isinstance(found, Implicit):
            implicit[name] = found
        else:
            rewards[name] = found
    return replace(what, rewards=rewards, implicit=implicit, sft=sft or what.sft)


def _of_run(path: Path) -> Subject:
    """A finished run's last reward: an explicit one, or its policy against the one it began with;
    neither, where it had no reward."""
    view = Run.load(path)
    summary = view.require_finished()
    first, _ = first_policy(view)
    rewards, implicit = dict[str, Path](), dict[str, Implicit]()
    if summary["reward"] is not None:
        rewards[OWN_REWARD] = path.parent / str(summary["reward"])
    elif view.recipe["loop"]["iterations"] and view.recipe["reward"]["kind"] == "implicit":
        implicit[IMPLICIT_REWARD] = Implicit(path.parent / str(summary["policy"]), first)
    return Subject(rewards, implicit, first, view)


def _of_model(path: Path, sft: Path | None) -> Subject:
    if is_classifier(path):
        return Subject({OWN_REWARD: path}, {})
    if sft is None:
        raise UserError(
            f"{path}: found a language model, whose implicit reward needs --sft, the model "
            "that it started from; expected that, a reward or a run"
        )
    return Subject({}, {IMPLICIT_REWARD: Implicit(path, sft)})


def _beside(path: Path) -> Path | Implicit:
    """The reward of another run, explicit or implicit, or one in a folder."""
    if not is_run(path):
        if not is_classifier(path):
            raise UserError(f"--beside: {path}: found a language model, expected a run or a reward")
        return path
    found = _of_run(path)
    rewards: list[Path | Implicit] = [*found.rewards.values(), *found.implicit.values()]
    if not rewards:
        raise UserError(f"--beside: {path}: this run has no reward; expected one that has")
    return rewards[0]


def is_classifier(path: Path) -> bool:
    """Whether a model's folder says that it holds a sequence classifier."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: found no config.json to read, expected the folder of a run or a model"
        ) from error
    names = (config.get("architectures") or [""]) if isinstance(config, dict) else [""]
    return any("ForSequenceClassification" in str(name) for name in names)


def reward_of(path: Path) -> Path:
    """Folder of the explicit reward of a run, or a reward's own."""
    found = _of_run(path).rewards if is_run(path) else {OWN_REWARD: path}
    if OWN_REWARD not in found:
        raise UserError(f"{path}: this run has no explicit reward; expected one that has")
    return found[OWN_REWARD]


def _unused(name: str, taken: Collection[str]) -> str:
    numbered = [name, *(f"{name} {i}" for i in range(2, len(taken) + 3))]
    return next(n for n in numbered if n not in taken)


def evaluate(
    what: Subject,
    pairs: PreferenceSet,
    device: str = "auto",
    train: PreferenceSet | None = None,
) -> dict[str, Any]:
    """Report of all scorers on a preference set (see preference_report).

    train: pairs on which a reward of the run's own backbone is trained by the run's own settings;
    its accuracy is what the others' excess over chance is a share of.
    """
    where = pick_device(device)
    rival = None if train is None else preference_reward(what.view, train, where)
    if rival is not None:
        what = replace(what, rewards={**what.rewards, PREFERENCE_REWARD: rival.path})
    rows, dropped = _encoded(what, pairs)
    scored = _score(what, rows, where)
    some = next(iter(rows.values()))
    subsets = list(some["subset"])
    described = PairSet(
        pairs.card.name,
        pairs.split,
        list(some["prompt_key"]),
        subsets,
        list(some["margin"]),
        dropped,
        pairs.only,
        axes_of(pairs.card, subsets),
    )
    report = preference_report(described, scored.margins, scored.calibration)
    if rival is not None and train is not None:
        report |= {"trained_on": _told(rival, train, described.prompts)}
        best = report["scorers"][PREFERENCE_REWARD]["overall"]["mean"]
        for found in report["scorers"].values():
            found["excess_share"] = excess_share(found["overall"]["mean"], best)
    return report


def _told(
    rival: PreferenceBaseline, train: PreferenceSet, prompts: Sequence[str]
) -> dict[str, Any]:
    """What the rival was trained on, and of how many pairs it has seen the prompt."""
    seen = {prompt_key(row["prompt"]) for row in train.rows}
    return {**rival.trained_on, "shared_prompts": sum(key in seen for key in prompts)}


Rows = dict[tuple[Path, bool], Dataset]
"""(A model's folder, whether it is a reward) -> the pairs as its token ids."""


def _encoded(what: Subject, pairs: PreferenceSet) -> tuple[Rows, int]:
    """The pairs that fit into the context of every model, and how many do not."""
    models = [(path, True) for path in what.rewards.values()]
    for one in what.implicit.values():
        models += [(one.policy, False), (one.reference, False)]
    models += [(what.sft, False)] if what.sft is not None else []
    rows = {(path, is_reward): encode(pairs, path, is_reward) for path, is_reward in models}
    fitting = [
        fits(data, path, is_reward and reads_prompt_again(path))
        for (path, is_reward), data in rows.items()
    ]
    kept = np.flatnonzero(np.all(fitting, axis=0))
    if not len(kept):
        raise UserError(
            f"{pairs.card.name}: all {len(pairs.rows)} pairs are longer than the models' context"
        )
    return {model: data.select(kept) for model, data in rows.items()}, len(pairs.rows) - len(kept)


def _score(what: Subject, rows: Rows, device: torch.device) -> Scored:
    """Margins of the rewards, explicit and implicit, and the baselines, one model at a time."""
    scored = Scored({}, {})
    for name, path in what.rewards.items():
        reward = RewardModel.from_pretrained(path, device)
        prompts, completions, at = _distinct(rows[path, True])
        chosen, rejected = reward.score_ids(prompts, completions)[at]
        margin = (chosen - rejected).double()
        scored.margins[name] = margin.numpy()
        # The normaliser divided by std: its logits are what Bradley-Terry was fitted with.
        scored.calibration[name] = calibration_error(margin * reward.settings.std)
    logps = {
        path: _logprobs(path, data, device)
        for (path, is_reward), data in rows.items()
        if not is_reward
    }
    for name, one in what.implicit.items():
        # In pairs of one prompt log Z(x) cancels: log pi/pi_0 of one side less that of the other.
        chosen_ratio, rejected_ratio = _sums(logps[one.policy]) - _sums(logps[one.reference])
        scored.margins[name] = chosen_ratio - rejected_ratio
    sft = logps[what.sft] if what.sft is not None else None
    scored.margins.update(_baselines(next(iter(rows.values())), sft))
    return scored


def _baselines(some: Dataset, sft: list[list[np.ndarray]] | None) -> dict[str, np.ndarray]:
    """Margins of what needs no reward: length in some model's tokens, the SFT model's log-probs."""
    lengths = [np.array([len(ids) for ids in some[c]]) for c in ("chosen_ids", "rejected_ids")]
    longer = (lengths[0] - lengths[1]).astype(np.float64)
    margins = {"longer wins": longer, "shorter wins": -longer}
    if sft is not None:
        for name in ("sum", "mean"):
            by_side = [[getattr(logp.astype(np.float64), name)() for logp in side] for side in sft]
            margins[f"SFT log-prob, {name}"] = np.subtract(by_side[0], by_side[1])
    return margins


def _sums(sides: list[list[np.ndarray]]) -> np.ndarray:
    """Log-prob of both sides' completions: (2, B)."""
    return np.array([[logp.sum(dtype=np.float64) for logp in side] for side in sides])


def _logprobs(path: Path, rows: Dataset, device: torch.device) -> list[list[np.ndarray]]:
    """Per-token log-probs of both sides' completions, preferred first."""
    prompts, completions, at = _distinct(rows)
    model = load_model(path, device)
    found = completion_logprobs(model, prompts, completions, progress="log-probs")
    return [[found[number] for number in side] for side in at]


def _distinct(rows: Dataset) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Prompts and completions of the M texts that pairs are made of, each once, and of every pair
    the numbers of its two, preferred first: (2, B). A text of several pairs is read once."""
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    prompts = [tuple(ids) for ids in column(rows, "prompt_ids")]
    at = []
    for name in ("chosen_ids", "rejected_ids"):
        texts = zip(prompts, map(tuple, column(rows, name)), strict=True)
        at.append([numbers.setdefault(text, len(numbers)) for text in texts])
    return [list(p) for p, _ in numbers], [list(c) for _, c in numbers], np.array(at)
