"""Score preference sets with rewards, and with baselines from length and log-probs alone.

Preferences are for reporting only: no run selects anything by these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.config.schema import Recipe
from irl_align.data.columns import column, read_parquet
from irl_align.data.splits import data_checksum
from irl_align.errors import UserError
from irl_align.evaluation.inference import first_policy, log_ratio_of, prompt_format
from irl_align.evaluation.preference_data import (
    PreferenceSet,
    axes_of,
    encode,
    fits,
    model_config,
)
from irl_align.evaluation.preference_tables import (
    BASELINES,
    PREFERENCE_REWARD,
    SEEN_AXIS,
    PairSet,
    excess_share,
    preference_report,
)
from irl_align.models.lm_head import completion_logprobs
from irl_align.models.loading import load_model, load_tokenizer, pick_device
from irl_align.models.lora import quantization_config
from irl_align.models.trl import Training
from irl_align.policy.roles import DATA
from irl_align.reward.composed import load_fitted
from irl_align.reward.fit import SIDES, fit_reward, pair_columns
from irl_align.reward.losses import calibration_error
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.training.keys import derive_seed
from irl_align.training.reward_step import pair_loss, scheduled
from irl_align.training.run_folder import Run, RunView, is_run
from irl_align.training.store import Store

OWN_REWARD, IMPLICIT_REWARD = "reward", "implicit reward"
RESERVED = (OWN_REWARD, IMPLICIT_REWARD, PREFERENCE_REWARD, *BASELINES)
"""Names that no run given with --beside can have."""


@dataclass(frozen=True)
class Implicit:
    """The reward log pi(y|x) - log pi_ref(y|x), up to its beta and to terms of the prompt."""

    policy: Path
    references: tuple[tuple[float, Path], ...]
    """Weighted models of pi_ref; for SPIN and DPO the model that the policy started from."""
    mean: bool = False
    """Whether it is divided by the number of tokens."""


@dataclass(frozen=True)
class Scorers:
    """The models that score a preference set."""

    rewards: Mapping[str, Path | Implicit]
    """Name -> folder of an explicit reward, or an implicit reward (SPIN, DPO)."""
    sft: Path | None = None
    """Language model of the log-prob baselines."""
    view: RunView | None = None
    """The run, where it is one."""
    template: str | None = None
    """Template of the models that were not made here, in place of their own chat template."""

    @property
    def models(self) -> list[ModelInput]:
        """Every model that scores, and whether it is read as a reward."""
        models: list[ModelInput] = []
        for reward in self.rewards.values():
            if isinstance(reward, Path):
                models.append((reward, True))
            else:
                models += [
                    (path, False)
                    for path in (reward.policy, *map(itemgetter(1), reward.references))
                ]
        return models if self.sft is None else [*models, (self.sft, False)]


ModelInput = tuple[Path, bool]
"""A model's folder, and whether it is read as a reward or as a language model."""


def find_scorers(path: Path, sft: Path | None = None, beside: Sequence[Path] = ()) -> Scorers:
    """The scorers of a run or of a model's folder: a reward, or a policy where `sft` is given.

    beside: other runs or rewards that score the same pairs; SPIN and DPO give their implicit
    reward. Raises UserError: an unfinished run, or nothing to evaluate.
    """
    own = _of_run(path) if is_run(path) else _of_model(path, sft)
    rewards = dict(own.rewards)
    for other in beside:
        taken = {*RESERVED, *rewards}
        numbered = [other.name, *(f"{other.name} {i}" for i in range(2, len(taken) + 3))]
        name = next(name for name in numbered if name not in taken)
        rewards[name] = _reward_beside(other)
    return replace(own, rewards=rewards, sft=sft or own.sft)


def _of_run(path: Path) -> Scorers:
    """The last reward of a finished run: an explicit one, or the final policy against the first
    one; neither if the run has no reward."""
    view = Run.load(path)
    summary = view.require_finished()
    first, _ = first_policy(view)
    rewards: dict[str, Path | Implicit] = {}
    if summary["reward"] is not None:
        rewards[OWN_REWARD] = path.parent / str(summary["reward"])
    elif ratio := log_ratio_of(path):
        rewards[IMPLICIT_REWARD] = Implicit(ratio.path, ratio.references, ratio.mean)
    return Scorers(rewards, first, view)


def _of_model(path: Path, sft: Path | None) -> Scorers:
    if is_classifier(path):
        return Scorers({OWN_REWARD: path})
    if sft is None:
        raise UserError(
            f"{path}: found a language model, whose implicit reward needs --sft, the model "
            "that it started from; expected --sft as well, or a reward, or a run"
        )
    return Scorers({IMPLICIT_REWARD: Implicit(path, ((1.0, sft),))})


def _reward_beside(path: Path) -> Path | Implicit:
    """The reward of another run, explicit or implicit, or the reward in a folder."""
    if not is_run(path):
        if not is_classifier(path):
            raise UserError(f"--beside: {path}: found a language model, expected a run or a reward")
        return path
    for reward in _of_run(path).rewards.values():
        return reward
    raise UserError(f"--beside: {path}: this run has no reward; expected a run with one")


def is_classifier(path: Path) -> bool:
    """Whether a model's folder holds a sequence classifier, by its config.json."""
    names = model_config(path).get("architectures") or []
    return any("ForSequenceClassification" in str(name) for name in names)


def reward_of(path: Path) -> Path:
    """Folder of the explicit reward of a run, or of the reward in a folder."""
    reward = _of_run(path).rewards.get(OWN_REWARD) if is_run(path) else path
    if not isinstance(reward, Path):
        raise UserError(f"{path}: this run has no explicit reward; expected a run with one")
    return reward


def evaluate_preferences(
    scorers: Scorers,
    pairs: PreferenceSet,
    device: str = "auto",
    train: PreferenceSet | None = None,
) -> dict[str, Any]:
    """Report of all scorers on a preference set (see preference_report).

    train: pairs on which a reward is trained for comparison, from the run's own backbone with the
    run's own settings; the excess of the others over chance is given as a share of its excess.
    """
    where = pick_device(device)
    trained_on = None
    if train is not None:
        path, trained_on = _preference_reward(scorers.view, train, where)
        scorers = replace(scorers, rewards={**scorers.rewards, PREFERENCE_REWARD: path})
    encoded = _encode_for_all(scorers, pairs)
    margins, calibration = _score(scorers, encoded, where)
    rows = next(iter(encoded.values()))
    subsets = column(rows, "subset")
    described = PairSet(
        pairs.card.name,
        pairs.split,
        column(rows, "prompt_key"),
        subsets,
        column(rows, "margin"),
        len(pairs.rows) - len(rows),
        pairs.only,
        axes_of(pairs.card, subsets) | _seen(scorers, encoded),
    )
    report = preference_report(described, margins, calibration)
    if train is not None and trained_on is not None:
        trained = set(map(tuple, column(encode(train, *next(iter(encoded))), "prompt_ids")))
        shared = sum(tuple(ids) in trained for ids in column(rows, "prompt_ids"))
        report["trained_on"] = {**trained_on, "shared_prompts": shared}
        best = report["scorers"][PREFERENCE_REWARD]["overall"]["mean"]
        for scorer in report["scorers"].values():
            scorer["excess_share"] = excess_share(scorer["overall"]["mean"], best)
    return report


def _seen(scorers: Scorers, encoded: Mapping[ModelInput, Dataset]) -> dict[str, list[str]]:
    """Whether each pair's prompt is among those that the run was trained on, as an axis of the
    pairs; none if there is no run, or no such prompt."""
    if scorers.view is None:
        return {}
    folder = scorers.view.folder / scorers.view.stages[str(DATA)]["path"]
    files = [path for use in ("sft", "reward") if (path := folder / f"{use}.parquet").is_file()]
    trained = {tuple(ids) for path in files for ids in column(read_parquet(path), "prompt_ids")}
    rows = encoded.get((first_policy(scorers.view)[0], False))
    known = [tuple(ids) in trained for ids in column(rows, "prompt_ids")] if rows else []
    return {SEEN_AXIS: ["seen" if one else "unseen" for one in known]} if any(known) else {}


def _preference_reward(
    view: RunView | None, pairs: PreferenceSet, device: torch.device
) -> tuple[Path, dict[str, Any]]:
    """A reward fitted on preference pairs from a run's first policy, with the settings of the run's
    own reward; a stage of the run's store, so it is trained once.

    Returns the reward's folder, and what it was trained on: card, split, number of pairs, and how
    many more were too long for the context. Raises UserError: the run has no explicit reward, or
    no pair fits into the context.
    """
    view, recipe = require_explicit_reward(view)
    options, (policy, policy_key) = recipe.reward, first_policy(view)
    rows = _training_rows(pairs, policy, options.echo)
    prompt = asdict(prompt_format(policy))
    args = scheduled(options.args, options.schedule, 0)
    quantization = recipe.model.quantization if options.lora is not None else None
    seed = derive_seed(recipe.seed, "head of the preference reward")

    def build(work: Path) -> dict[str, Any]:
        settings = RewardSettings(options.lm_coef, options.bound, options.echo, **prompt)
        loading: dict[str, Any] = {}
        if quantization:
            loading = {"quantization_config": quantization_config(quantization)}
        tokenizer = load_tokenizer(policy)
        reward = RewardModel.from_policy(
            policy, tokenizer, settings, seed % 2**63, device, options.lora, **loading
        )
        training = Training(work, seed % 2**31, device, label="preference reward")
        metrics = fit_reward(reward, pair_columns(rows), pair_loss(options), args, training)
        prompts, completions = SIDES[0]
        reward.centre(column(rows, prompts), column(rows, completions))
        reward.save_pretrained(work / "model")
        return metrics

    stage = Store(view.folder.parent / "store").stage(
        "preference-reward",
        {
            "seed": recipe.seed,
            "args": args,
            "loss": vars(pair_loss(options)),
            "reward": options.model_dump(include={"bound", "lm_coef", "echo", "lora"}),
            "quantization": None if quantization is None else quantization.model_dump(),
            "prompt": prompt,
        },
        {"sft": policy_key, "pairs": data_checksum(pairs.rows)},
        build,
    )
    dropped = len(pairs.rows) - len(rows)
    trained_on = {"card": pairs.card.name, "split": pairs.split}
    return stage.path / "model", {**trained_on, "pairs": len(rows), "dropped": dropped}


def require_explicit_reward(view: RunView | None) -> tuple[RunView, Recipe]:
    """A run and its recipe. Raises UserError if there is no run, or the run has no explicit reward,
    whose settings the baseline takes."""
    if view is not None and (view.summary or {}).get("reward") is not None:
        recipe = Recipe.model_validate(view.recipe)
        if recipe.reward.kind == "explicit":
            return view, recipe
    raise UserError(
        "--train-set, --train-split: found no run with an explicit reward, expected one: the "
        "reward on preferences is trained from its first policy with its settings"
    )


def _training_rows(pairs: PreferenceSet, policy: Path, echo: bool) -> Dataset:
    """The pairs that fit into the context, as token ids for the fit."""
    encoded = encode(pairs, policy, is_reward=False)
    rows = encoded.select(np.flatnonzero(fits(encoded, policy, echo)))
    if not len(rows):
        raise UserError(
            f"{pairs.card.name}, {pairs.split}: all {len(encoded)} pairs to train on are longer "
            "than the model's context"
        )
    return rows.map(lambda row: {"rejected_prompt_ids": row["prompt_ids"]})


def _encode_for_all(scorers: Scorers, pairs: PreferenceSet) -> dict[ModelInput, Dataset]:
    """The pairs that fit into the context of every model, as each model's token ids."""
    rows = {model: encode(pairs, *model, scorers.template) for model in scorers.models}
    fitting = np.all([fits(data, path) for (path, _), data in rows.items()], axis=0)
    if not fitting.any():
        raise UserError(
            f"{pairs.card.name}: all {len(pairs.rows)} pairs are longer than the models' context"
        )
    return {model: data.select(np.flatnonzero(fitting)) for model, data in rows.items()}


def _score(
    scorers: Scorers, encoded: Mapping[ModelInput, Dataset], device: torch.device
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scorer -> margins (B,), one model at a time, and scorer -> calibration error of logits."""
    margins: dict[str, np.ndarray] = {}
    calibration: dict[str, float] = {}
    logprobs = {
        path: _logprobs(path, rows, device)
        for (path, is_reward), rows in encoded.items()
        if not is_reward
    }
    explicit_first = sorted(scorers.rewards.items(), key=lambda item: isinstance(item[1], Implicit))
    for name, scorer in explicit_first:
        if isinstance(scorer, Implicit):
            # Within one prompt log Z(x) cancels: the margin is the difference of log pi/pi_ref.
            ratios = _sums(logprobs[scorer.policy])
            for weight, reference in scorer.references:
                ratios = ratios - weight * _sums(logprobs[reference])
            if scorer.mean:
                ratios = ratios / _lengths(logprobs[scorer.policy])
            margins[name] = ratios[0] - ratios[1]
            continue
        reward = load_fitted(scorer, device)
        prompts, completions, at = _distinct(encoded[scorer, True])
        chosen, rejected = reward.score_ids(prompts, completions)[at]
        margin = (chosen - rejected).double()
        margins[name] = margin.numpy()
        calibration[name] = calibration_error(margin)
    rows = next(iter(encoded.values()))
    chosen_lengths, rejected_lengths = (
        np.array([len(ids) for ids in column(rows, f"{side}_ids")], dtype=np.float64)
        for side in ("chosen", "rejected")
    )
    longer = chosen_lengths - rejected_lengths
    margins |= {"longer wins": longer, "shorter wins": -longer}
    if scorers.sft is not None:
        sums = _sums(logprobs[scorers.sft])
        means = sums / _lengths(logprobs[scorers.sft])
        margins["SFT log-prob, sum"] = sums[0] - sums[1]
        margins["SFT log-prob, mean"] = means[0] - means[1]
    return margins, calibration


def _sums(sides: list[list[np.ndarray]]) -> np.ndarray:
    """Log-prob of both sides' completions: (2, B)."""
    return np.array([[logprob.sum(dtype=np.float64) for logprob in side] for side in sides])


def _lengths(sides: list[list[np.ndarray]]) -> np.ndarray:
    """Number of tokens of both sides' completions: (2, B)."""
    return np.array([[len(logprob) for logprob in side] for side in sides])


def _logprobs(path: Path, rows: Dataset, device: torch.device) -> list[list[np.ndarray]]:
    """Per-token log-probs of both sides' completions, preferred first."""
    prompts, completions, at = _distinct(rows)
    model = load_model(path, device)
    logprobs = completion_logprobs(model, prompts, completions, progress="log-probs")
    return [[logprobs[number] for number in side] for side in at]


def _distinct(rows: Dataset) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Prompts and completions of the M distinct texts in B pairs, and the numbers of each pair's
    two texts, preferred first: (2, B). A text of several pairs is scored once."""
    numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    prompts = [tuple(ids) for ids in column(rows, "prompt_ids")]
    at = []
    for name in ("chosen_ids", "rejected_ids"):
        texts = zip(prompts, map(tuple, column(rows, name)), strict=True)
        at.append([numbers.setdefault(text, len(numbers)) for text in texts])
    return [list(p) for p, _ in numbers], [list(c) for _, c in numbers], np.array(at)
