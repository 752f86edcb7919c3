"""The loop's reward step: fit r_k on the pairs in the window, as a stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import DPOConfig

from irl_align import ranks
from irl_align.batches import context_length
from irl_align.cards import load_card
from irl_align.columns import column
from irl_align.data import data_checksum, load_preferences
from irl_align.files import is_sealed, seal
from irl_align.lab import Lab, derive_seed
from irl_align.pair_step import Pairs
from irl_align.pairs import window
from irl_align.policy import Policy, Reward
from irl_align.prepare import Data
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.model import RewardModel, RewardSettings, score_head, train_adapter
from irl_align.tokens import encode_preferences
from irl_align.trainers import save_model

# Demonstrations, evenly spaced, that the mean and variance of the reward come from: their standard
# errors are 2.2 and 1.6% of a deviation, and scoring more is time beside the fit.
NORMALISED = 2048


@dataclass(frozen=True)
class _Fit:
    """What one fit reads: its pairs, and what its stage is keyed by."""

    train: Dataset
    args: dict[str, Any]
    settings: dict[str, Any]
    inputs: dict[str, str]


def fit_reward_level(
    lab: Lab,
    k: int,
    policy: Policy,
    initial: Policy,
    previous: Reward | None,
    pairs: Sequence[Pairs],
    data: Data,
) -> Reward:
    """Fit r_k on the pairs in the window: an explicit reward model, or SPIN's implicit reward.

    Of kind log_prob nothing is fitted: the reward is pi_0's mean log-prob in every iteration.
    """
    options = lab.recipe.reward
    if options.kind == "log_prob":
        return _log_prob(lab, k, initial, data)
    args = scheduled(options.args, options.schedule, k)
    train = window([p.train for p in pairs], lab.recipe.pairs.window)
    settings: dict[str, Any] = {
        "iteration": k,
        "window": lab.recipe.pairs.window,
        "args": args,
        "reward": options.model_dump(
            exclude={"args", "schedule", "preferences", "max_pairs", "lora"}
        ),
    }
    if options.lora is not None:
        settings["lora"] = options.lora.model_dump()
    # What is the same whatever it is called has one name, so that recipes share it.
    if policy.key == initial.key:
        settings["reward"] |= {"reference": "previous", "mixture": 0.5}
    if previous is None:
        settings["reward"]["init"] = "warm"
    if options.kind == "explicit" and len(pairs) == 1:
        settings["window"] = "all"
    if options.max_pairs is not None:
        settings["max_pairs"] = options.max_pairs
        if options.max_pairs < len(train):
            seed = derive_seed(lab.recipe.seed, f"pairs of {k}") % 2**32
            train = train.shuffle(seed=seed).select(range(options.max_pairs))
    inputs = {f"pairs-{i}": p.key for i, p in enumerate(pairs)} | {"initial": initial.key}
    fit = _Fit(train, args, settings, inputs)
    if options.kind == "implicit":
        return _fit_implicit(lab, k, policy, initial, fit)
    return _fit_explicit(lab, k, initial, previous if options.init == "warm" else None, fit, data)


def _log_prob(lab: Lab, k: int, initial: Policy, data: Data) -> Reward:
    """The control r(x, y) = mean log pi_0(y | x), normalised as fitted rewards are."""

    def build(work: Path) -> dict[str, Any]:
        settings = _settings(lab, data, lm_coef=1.0)
        path, tokenizer = initial.path, lab.tokenizer
        reward = RewardModel.from_policy(path, tokenizer, settings, 0, lab.device)
        with torch.no_grad():
            score_head(reward.model).weight.zero_()
        return _normalise_and_save(reward, data, work)

    inputs = {"initial": initial.key, "demonstrations": data.checksums["reward"]}
    stage = lab.stage(f"reward/{k}", "log-prob", {}, inputs, build)
    std = float(stage.metrics["normaliser"][1])
    return Reward("explicit", stage.path / "model", stage.key, scale=std)


def _normalise_and_save(reward: RewardModel, data: Data, work: Path) -> dict[str, Any]:
    """Give the demonstrations mean 0 and variance 1, and write the reward into work/model."""
    rows = data.reward.select(range(0, len(data.reward), -(-len(data.reward) // NORMALISED)))
    reward.fit_normaliser(column(rows, "prompt_ids"), column(rows, "completion_ids"))
    if ranks.is_main():
        reward.save_pretrained(work / "model")
    return {"normaliser": [reward.settings.mean, reward.settings.std]}


def _settings(lab: Lab, data: Data, lm_coef: float) -> RewardSettings:
    options, card = lab.recipe.reward, data.card
    return RewardSettings(
        lm_coef=lm_coef,
        bound=options.bound,
        echo=options.echo,
        template=card.template,
        lowercase=card.lowercase,
        name=card.name,
    )


def _fit_explicit(
    lab: Lab, k: int, initial: Policy, warm: Reward | None, fit: _Fit, data: Data
) -> Reward:
    """Fit a reward model, from the SFT model or (warm) from the last iteration's reward."""
    preferences = _preferences(lab, initial)
    inputs = dict(fit.inputs)
    inputs |= {"warm": warm.key} if warm is not None else {}
    inputs |= {"preferences": preferences.checksum} if preferences is not None else {}

    def build(work: Path) -> dict[str, Any]:
        reward = _unfitted(lab, k, initial, warm, data)
        columns = pair_columns(fit.train)
        if preferences is not None:
            for name, values in preferences.columns.items():
                columns[name] = values if preferences.alone else columns[name] + values
        training = lab.training(work, f"reward {k}")
        metrics = fit_reward(reward, columns, lab.recipe.reward.loss, fit.args, training)
        return {**metrics, **_normalise_and_save(reward, data, work)}

    stage = lab.stage(f"reward/{k}", "reward", fit.settings, inputs, build)
    lab.run.log(f"reward-fit/{k}", _without_history(stage.metrics))
    std = float(stage.metrics["normaliser"][1])
    return Reward("explicit", stage.path / "model", stage.key, scale=std)


def _unfitted(lab: Lab, k: int, initial: Policy, warm: Reward | None, data: Data) -> RewardModel:
    """The reward model that a fit starts from."""
    lora = lab.recipe.reward.lora
    if warm is not None:
        reward = RewardModel.from_pretrained(warm.path, lab.device, merge=lora is None)
        if lora is not None:
            train_adapter(reward.model)
        reward.settings = replace(reward.settings, mean=0.0, std=1.0)
        return reward
    settings = _settings(lab, data, lab.recipe.reward.lm_coef)
    seed = derive_seed(lab.recipe.seed, f"head {k}") % 2**63
    quantization = lab.quantization if lora is not None else {}
    return RewardModel.from_policy(
        initial.path, lab.tokenizer, settings, seed, lab.device, lora, **quantization
    )


def _fit_implicit(lab: Lab, k: int, policy: Policy, initial: Policy, fit: _Fit) -> Reward:
    """SPIN's step: move pi_theta from pi_k against the reference the recipe names."""
    options = lab.recipe.reward
    paths = {
        "previous": ((1.0, policy.path),),
        "initial": ((1.0, initial.path),),
        "mixture": ((options.mixture, initial.path), (1.0 - options.mixture, policy.path)),
    }[options.reference]
    starts_at_reference = all(path == policy.path for _, path in paths)

    def build(work: Path) -> dict[str, Any]:
        references = [(weight, lab.load_policy(path)) for weight, path in paths]
        generator = policy.identity if starts_at_reference else ""
        began = time.perf_counter()
        logps = cached_array(
            work / "scratch" / "reference.npy",
            lambda: reference_logps(references, fit.train, generator),
        )
        took = {"step": 0, "reference_seconds": time.perf_counter() - began}
        model = lab.load_trainable(policy.path)
        training = lab.training(work, f"SPIN {k}")
        metrics = fit_implicit(
            model, lab.tokenizer, fit.train, logps, fit.args, training, starts_at_reference
        )
        save_model(model, lab.tokenizer, work / "model")
        return {**metrics, "history": [took, *metrics["history"]]}

    stage = lab.stage(
        f"reward/{k}",
        "implicit-reward",
        {**fit.settings, **lab.adapted},
        {**fit.inputs, "policy": policy.key},
        build,
    )
    lab.run.log(f"reward-fit/{k}", _without_history(stage.metrics))
    beta = float(fit.args.get("beta", DPOConfig.beta))
    return Reward("implicit", stage.path / "model", stage.key, beta=beta, references=paths)


@dataclass(frozen=True)
class Preferences:
    """Preference pairs as trainer columns, and their checksum."""

    columns: dict[str, list[Any]]
    checksum: str
    alone: bool


def _preferences(lab: Lab, initial: Policy) -> Preferences | None:
    options = lab.recipe.reward.preferences
    if options is None:
        return None
    card = load_card(options.card)
    rows = load_preferences(card, options.split, options.path)
    context = context_length(lab.load_policy(initial.path))
    encoded = encode_preferences(rows, lab.tokenizer, card, lab.recipe.data, context).rows
    pairs = encoded.add_column("rejected_prompt_ids", column(encoded, "prompt_ids"))
    alone = options.use == "alone"
    how = "alone" if alone else options.weight
    return Preferences(pair_columns(pairs, options.weight), f"{data_checksum(rows)}*{how}", alone)


def scheduled(
    args: Mapping[str, Any], schedule: Mapping[str, Sequence[Any]], k: int
) -> dict[str, Any]:
    """args with iteration k's value of every scheduled field; the last value repeats."""
    return {**args, **{name: values[min(k, len(values) - 1)] for name, values in schedule.items()}}


def cached_array(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `path`, computed, written aside, renamed in and sealed where it is missing."""
    if not ranks.on_main(lambda: is_sealed(path)):
        found = compute()
        ranks.on_main(lambda: _write(path, found))
    array: np.ndarray = np.load(path)
    return array


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing.npy")
    np.save(aside, array)
    aside.rename(path)
    seal(path)


def _without_history(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "history"}
