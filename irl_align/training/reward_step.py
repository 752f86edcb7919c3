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

from irl_align.data.cards import load_card
from irl_align.data.columns import column
from irl_align.data.encoding import encode_preferences
from irl_align.data.loading import load_preferences
from irl_align.data.pairs import window
from irl_align.data.splits import data_checksum
from irl_align.models.loading import save_model
from irl_align.models.packing import context_length
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import Role
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.forward import score_head
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.model import RewardModel, train_adapter
from irl_align.reward.settings import RewardSettings
from irl_align.training.context import RunContext, derive_seed
from irl_align.training.pair_step import IterationPairs
from irl_align.training.prepare import Data
from irl_align.utils import distributed
from irl_align.utils.files import is_sealed, seal

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
    context: RunContext,
    k: int,
    policy: Policy,
    initial: Policy,
    previous: Reward | None,
    pairs: Sequence[IterationPairs],
    data: Data,
) -> Reward:
    """Fit r_k on the pairs in the window: an explicit reward model, or SPIN's implicit reward.

    Of kind log_prob nothing is fitted: the reward is pi_0's mean log-prob in every iteration.
    """
    options = context.recipe.reward
    if options.kind == "log_prob":
        return _log_prob(context, k, initial, data)
    args = scheduled(options.args, options.schedule, k)
    train = window([p.train for p in pairs], context.recipe.pairs.window)
    settings: dict[str, Any] = {
        "iteration": k,
        "window": context.recipe.pairs.window,
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
            seed = derive_seed(context.recipe.seed, f"pairs of {k}") % 2**32
            train = train.shuffle(seed=seed).select(range(options.max_pairs))
    inputs = {f"pairs-{i}": p.key for i, p in enumerate(pairs)} | {"initial": initial.key}
    fit = _Fit(train, args, settings, inputs)
    if options.kind == "implicit":
        return _fit_implicit(context, k, policy, initial, fit)
    return _fit_explicit(
        context, k, initial, previous if options.init == "warm" else None, fit, data
    )


def _log_prob(context: RunContext, k: int, initial: Policy, data: Data) -> Reward:
    """The control r(x, y) = mean log pi_0(y | x), normalised as fitted rewards are."""

    def build(work: Path) -> dict[str, Any]:
        settings = _settings(context, data, lm_coef=1.0)
        path, tokenizer = initial.path, context.tokenizer
        reward = RewardModel.from_policy(path, tokenizer, settings, 0, context.device)
        with torch.no_grad():
            score_head(reward.model).weight.zero_()
        return _normalise_and_save(reward, data, work)

    inputs = {"initial": initial.key, "demonstrations": data.checksums["reward"]}
    stage = context.stage(Role.reward(k), "log-prob", {}, inputs, build)
    std = float(stage.metrics["normaliser"][1])
    return Reward("explicit", stage.path / "model", stage.key, scale=std)


def _normalise_and_save(reward: RewardModel, data: Data, work: Path) -> dict[str, Any]:
    """Give the demonstrations mean 0 and variance 1, and write the reward into work/model."""
    rows = data.reward.select(range(0, len(data.reward), -(-len(data.reward) // NORMALISED)))
    reward.fit_normaliser(column(rows, "prompt_ids"), column(rows, "completion_ids"))
    if distributed.is_main():
        reward.save_pretrained(work / "model")
    return {"normaliser": [reward.settings.mean, reward.settings.std]}


def _settings(context: RunContext, data: Data, lm_coef: float) -> RewardSettings:
    options, card = context.recipe.reward, data.card
    return RewardSettings(
        lm_coef=lm_coef,
        bound=options.bound,
        echo=options.echo,
        template=card.template,
        lowercase=card.lowercase,
        name=card.name,
    )


def _fit_explicit(
    context: RunContext, k: int, initial: Policy, warm: Reward | None, fit: _Fit, data: Data
) -> Reward:
    """Fit a reward model, from the SFT model or (warm) from the last iteration's reward."""
    preferences = _preferences(context, initial)
    inputs = dict(fit.inputs)
    inputs |= {"warm": warm.key} if warm is not None else {}
    inputs |= {"preferences": preferences.checksum} if preferences is not None else {}

    def build(work: Path) -> dict[str, Any]:
        reward = _unfitted(context, k, initial, warm, data)
        columns = pair_columns(fit.train)
        if preferences is not None:
            for name, values in preferences.columns.items():
                columns[name] = values if preferences.alone else columns[name] + values
        training = context.training(work, f"reward {k}")
        metrics = fit_reward(reward, columns, context.recipe.reward.loss, fit.args, training)
        return {**metrics, **_normalise_and_save(reward, data, work)}

    stage = context.stage(Role.reward(k), "reward", fit.settings, inputs, build)
    context.run.log(str(Role.reward_fit(k)), _without_history(stage.metrics))
    std = float(stage.metrics["normaliser"][1])
    return Reward("explicit", stage.path / "model", stage.key, scale=std)


def _unfitted(
    context: RunContext, k: int, initial: Policy, warm: Reward | None, data: Data
) -> RewardModel:
    """The reward model that a fit starts from."""
    lora = context.recipe.reward.lora
    if warm is not None:
        reward = RewardModel.from_pretrained(warm.path, context.device, merge=lora is None)
        if lora is not None:
            train_adapter(reward.model)
        reward.settings = replace(reward.settings, mean=0.0, std=1.0)
        return reward
    settings = _settings(context, data, context.recipe.reward.lm_coef)
    seed = derive_seed(context.recipe.seed, f"head {k}") % 2**63
    quantization = context.quantization if lora is not None else {}
    return RewardModel.from_policy(
        initial.path, context.tokenizer, settings, seed, context.device, lora, **quantization
    )


def _fit_implicit(
    context: RunContext, k: int, policy: Policy, initial: Policy, fit: _Fit
) -> Reward:
    """SPIN's step: move pi_theta from pi_k against the reference the recipe names."""
    options = context.recipe.reward
    paths = {
        "previous": ((1.0, policy.path),),
        "initial": ((1.0, initial.path),),
        "mixture": ((options.mixture, initial.path), (1.0 - options.mixture, policy.path)),
    }[options.reference]
    starts_at_reference = all(path == policy.path for _, path in paths)

    def build(work: Path) -> dict[str, Any]:
        references = [(weight, context.load_policy(path)) for weight, path in paths]
        generator = policy.identity if starts_at_reference else ""
        began = time.perf_counter()
        logps = cached_array(
            work / "scratch" / "reference.npy",
            lambda: reference_logps(references, fit.train, generator),
        )
        took = {"step": 0, "reference_seconds": time.perf_counter() - began}
        model = context.load_trainable(policy.path)
        training = context.training(work, f"SPIN {k}")
        metrics = fit_implicit(
            model,
            context.tokenizer,
            fit.train,
            logps,
            fit.args,
            training,
            expect_ln2=starts_at_reference,
        )
        save_model(model, context.tokenizer, work / "model")
        return {**metrics, "history": [took, *metrics["history"]]}

    stage = context.stage(
        Role.reward(k),
        "implicit-reward",
        {**fit.settings, **context.adapted},
        {**fit.inputs, "policy": policy.key},
        build,
    )
    context.run.log(str(Role.reward_fit(k)), _without_history(stage.metrics))
    beta = float(fit.args.get("beta", DPOConfig.beta))
    return Reward("implicit", stage.path / "model", stage.key, beta=beta, references=paths)


@dataclass(frozen=True)
class Preferences:
    """Preference pairs as trainer columns, and their checksum."""

    columns: dict[str, list[Any]]
    checksum: str
    alone: bool


def _preferences(context: RunContext, initial: Policy) -> Preferences | None:
    options = context.recipe.reward.preferences
    if options is None:
        return None
    card = load_card(options.card)
    rows = load_preferences(card, options.split, options.path)
    limit = context_length(context.load_policy(initial.path))
    encoded = encode_preferences(rows, context.tokenizer, card, context.recipe.data, limit).rows
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
    if not distributed.on_main(lambda: is_sealed(path)):
        found = compute()
        distributed.on_main(lambda: _write(path, found))
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
