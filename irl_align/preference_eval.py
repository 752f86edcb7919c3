"""`irl-align evaluate`: rewards on preference sets, beside what length and log-probs tell alone.

Preferences are for reporting only: no run selects by what is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.cards import Card, load_card
from irl_align.config import DataOptions, Recipe
from irl_align.data import Preference, data_checksum, load_preferences
from irl_align.errors import UserError
from irl_align.lab import derive_seed
from irl_align.maths.losses import calibration_error
from irl_align.models import completion_logprobs, load_model, load_tokenizer, pick_device
from irl_align.preference_report import PairSet, excess_share, preference_report
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.model import RewardModel, RewardSettings
from irl_align.stages import Run, RunView, Store, is_run
from irl_align.tokens import encode_preferences
from irl_align.trainers import Training

UNLIMITED = 2**31 - 1  # tokens; what is too long for a model is dropped here, and counted
PREFERENCE_REWARD = "trained on preferences"


@dataclass(frozen=True)
class Subject:
    """What of a run or a model folder is evaluated."""

    rewards: Mapping[str, Path]
    """Name -> folder of an explicit reward."""
    policy: Path | None = None
    """Policy whose log-ratio to `sft` is the implicit reward (SPIN, DPO)."""
    sft: Path | None = None
    """Language model of the log-prob baselines."""
    view: RunView | None = None
    """The run, where it is one."""


@dataclass(frozen=True)
class PreferenceSet:
    """A card's split: its rows, loaded once."""

    card: Card
    split: str
    rows: list[Preference]


@dataclass(frozen=True)
class Scored:
    """Margins of every scorer on the same pairs, and the calibration of those that are logits."""

    margins: dict[str, np.ndarray]
    calibration: dict[str, float]


def subject(path: Path, sft: Path | None = None, beside: Sequence[Path] = ()) -> Subject:
    """What is at `path`: a run, or a model's folder (a reward, or a policy where `sft` is given).

    beside: other runs or rewards, to score the same pairs. Raises UserError: an unfinished run, or
    nothing to evaluate.
    """
    rewards: dict[str, Path] = {}
    policy, view = None, None
    if is_run(path):
        view = Run.load(path)
        if view.summary is None:
            raise UserError(f"{path}: this run is not finished; run its recipe again to go on")
        if view.summary["reward"] is not None:
            rewards["reward"] = path.parent / str(view.summary["reward"])
        elif view.recipe["loop"]["iterations"] and view.recipe["reward"]["kind"] == "implicit":
            policy = path.parent / str(view.summary["policy"])
        role = "sft" if "sft" in view.stages else "start"
        sft = sft or path / view.stages[role]["path"] / "model"
    elif is_classifier(path):
        rewards["reward"] = path
    else:
        policy = path
        if sft is None:
            raise UserError(
                f"{path}: found a language model, whose implicit reward needs --sft, the model "
                "that it started from; expected that, a reward or a run"
            )
    for other in beside:
        rewards[_unused(other.name, rewards)] = reward_of(other)
    return Subject(rewards, policy, sft, view)


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
    found = subject(path).rewards if is_run(path) else {"reward": path}
    if "reward" not in found:
        raise UserError(f"{path}: this run has no explicit reward; expected one that has")
    return found["reward"]


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    numbered = [name, *(f"{name} {i}" for i in range(2, len(taken) + 3))]
    return next(n for n in numbered if n not in taken)


def load_set(spec: str, split: str | None = None) -> PreferenceSet:
    """The pairs of `CARD` or `CARD=PATH`; split: default test, or the card's only one."""
    name, _, path = spec.partition("=")
    card = load_card(name)
    if split is None:
        split = "test" if "test" in card.split_names else card.split_names[0]
    return PreferenceSet(card, split, load_preferences(card, split, path or None))


def evaluate(
    what: Subject,
    pairs: PreferenceSet,
    device: str = "auto",
    train_split: PreferenceSet | None = None,
) -> dict[str, Any]:
    """Report of all scorers on a preference set (see preference_report).

    train_split: pairs on which a reward of the run's own backbone is trained by the run's own
    settings; its accuracy is what the others' excess over chance is a share of.
    """
    where = pick_device(device)
    rewards = dict(what.rewards)
    if train_split is not None:
        rewards[PREFERENCE_REWARD] = preference_reward(what, train_split, where)
    models = {**rewards, "policy": what.policy, "sft": what.sft}
    folders = {name: path for name, path in models.items() if path is not None}
    encoded = {name: encode(pairs, path, name in rewards) for name, path in folders.items()}
    kept = np.flatnonzero(np.all([_fits(encoded[name], folders[name]) for name in folders], axis=0))
    if not len(kept):
        raise UserError(
            f"{pairs.card.name}: all {len(pairs.rows)} pairs are longer than the models' context"
        )
    rows = {name: data.select(kept) for name, data in encoded.items()}
    scored = _score(rewards, what, rows, where)
    some = next(iter(rows.values()))
    described = PairSet(
        pairs.card.name,
        pairs.split,
        list(some["prompt_key"]),
        list(some["subset"]),
        list(some["margin"]),
        len(pairs.rows) - len(kept),
    )
    report = preference_report(described, scored.margins, scored.calibration)
    if train_split is not None:
        best = report["scorers"][PREFERENCE_REWARD]["overall"]["mean"]
        for found in report["scorers"].values():
            found["excess_share"] = excess_share(found["overall"]["mean"], best)
    return report


def encode(pairs: PreferenceSet, path: Path, is_reward: bool) -> Dataset:
    """A set's pairs as a model's token ids, by the prompt template that the model was trained with;
    by the card's own where the model tells none."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    own = config.get("irl_reward" if is_reward else "irl_prompt") or {}
    changed = {k: own[k] for k in ("template", "lowercase") if k in own}
    card = pairs.card.model_copy(update=changed)
    return _encode(pairs.rows, load_tokenizer(path), card)


def _encode(rows: list[Preference], tokenizer: PreTrainedTokenizerBase, card: Card) -> Dataset:
    limits = DataOptions(
        card=card.name, max_prompt_tokens=UNLIMITED, max_completion_tokens=UNLIMITED
    )
    return encode_preferences(rows, tokenizer, card, limits).rows


def _fits(rows: Dataset, path: Path) -> np.ndarray:
    """Which pairs fit into a model's context, both completions: (B,)."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings") or config.get("n_positions") or UNLIMITED
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in rows[column]])
        for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return prompt + np.maximum(chosen, rejected) <= limit


def _score(
    rewards: Mapping[str, Path], what: Subject, rows: Mapping[str, Dataset], device: torch.device
) -> Scored:
    """Margins of the rewards, the implicit reward and the baselines, one model at a time."""
    scored = Scored({}, {})
    for name, path in rewards.items():
        reward = RewardModel.from_pretrained(path, device)
        own = rows[name]
        chosen, rejected = (
            reward.score_ids(own["prompt_ids"], own[column])
            for column in ("chosen_ids", "rejected_ids")
        )
        margin = (chosen - rejected).double()
        scored.margins[name] = margin.numpy()
        # The normaliser divided by std: its logits are what Bradley-Terry was fitted with.
        scored.calibration[name] = calibration_error(margin * reward.settings.std)
    sft = _logprobs(what.sft, rows["sft"], device) if what.sft is not None else None
    if what.policy is not None and sft is not None:
        policy = _logprobs(what.policy, rows["policy"], device)
        ratio = [
            [(p.sum(dtype=np.float64) - s.sum(dtype=np.float64)) for p, s in zip(a, b, strict=True)]
            for a, b in zip(policy, sft, strict=True)
        ]
        scored.margins["implicit reward"] = np.subtract(ratio[0], ratio[1])
    some = next(iter(rows.values()))
    lengths = [np.array([len(ids) for ids in some[c]]) for c in ("chosen_ids", "rejected_ids")]
    scored.margins["longer wins"] = (lengths[0] - lengths[1]).astype(np.float64)
    scored.margins["shorter wins"] = -scored.margins["longer wins"]
    if sft is not None:
        for name in ("sum", "mean"):
            by_side = [[getattr(logp.astype(np.float64), name)() for logp in side] for side in sft]
            scored.margins[f"SFT log-prob, {name}"] = np.subtract(by_side[0], by_side[1])
    return scored


def _logprobs(path: Path, rows: Dataset, device: torch.device) -> list[list[np.ndarray]]:
    """Per-token log-probs of both sides' completions, preferred first."""
    model = load_model(path, device)
    return [
        completion_logprobs(model, rows["prompt_ids"], rows[column], progress="log-probs")
        for column in ("chosen_ids", "rejected_ids")
    ]


def preference_reward(what: Subject, pairs: PreferenceSet, device: torch.device) -> Path:
    """Folder of a reward fitted on preference pairs from the run's SFT model, with the settings of
    the run's own reward; a stage of the run's store, so it is trained once."""
    sft = what.sft
    if what.view is None or sft is None or "reward" not in what.rewards:
        raise UserError(
            "--train-split: found no run with an explicit reward, expected one: the reward on "
            "preferences is trained from its SFT model with its settings"
        )
    recipe = Recipe.model_validate(what.view.recipe)
    args = {**recipe.reward.args, **{k: v[0] for k, v in recipe.reward.schedule.items()}}
    rows = encode(pairs, sft, is_reward=False)
    rows = rows.select(np.flatnonzero(_fits(rows, sft)))
    with_both_prompts = rows.map(lambda row: {"rejected_prompt_ids": row["prompt_ids"]})
    prompt_of = json.loads((sft / "config.json").read_text(encoding="utf-8"))["irl_prompt"]
    options = recipe.reward

    def build(work: Path) -> dict[str, Any]:
        seed = derive_seed(recipe.seed, "head of the preference reward")
        settings = RewardSettings(options.lm_coef, options.bound, **prompt_of)
        reward = RewardModel.from_policy(sft, load_tokenizer(sft), settings, seed % 2**63, device)
        columns = pair_columns(with_both_prompts)
        training = Training(work, seed % 2**31, device, label="preference reward")
        metrics = fit_reward(reward, columns, options.loss, args, training)
        reward.fit_normaliser(list(rows["prompt_ids"]), list(rows["chosen_ids"]))
        reward.save_pretrained(work / "model")
        return metrics

    store = Store(what.view.folder.parent / "store")
    stage = store.stage(
        "preference-reward",
        {
            "seed": recipe.seed,
            "args": args,
            "reward": options.model_dump(include={"loss", "bound", "lm_coef"}),
            "prompt": prompt_of,
        },
        {"sft": what.view.stages["sft"]["key"], "pairs": data_checksum(pairs.rows)},
        build,
    )
    return stage.path / "model"
