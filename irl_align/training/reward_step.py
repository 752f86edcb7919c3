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

from irl_align.config.reward import RewardOptions
from irl_align.data.cards import load_card
from irl_align.data.columns import column
from irl_align.data.encoding import encode_preferences
from irl_align.data.pairs import window
from irl_align.data.splits import data_checksum
from irl_align.models.loading import save_model
from irl_align.models.packing import context_length
from irl_align.models.sft import CHECKPOINT
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import Role
from irl_align.reward.composed import functions_key, member_folder, save_ensemble
from irl_align.reward.fit import bootstrap_weights, fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.losses import PairLoss, pessimistic
from irl_align.reward.model import RewardModel, train_adapter, train_last_layers
from irl_align.reward.settings import RewardSettings
from irl_align.training.context import RunContext
from irl_align.training.iteration import Data, Iteration
from irl_align.training.keys import derive_seed
from irl_align.training.pair_step import IterationPairs
from irl_align.training.signs import judge_fit
from irl_align.training.store import Stage
from irl_align.utils import distributed
from irl_align.utils.files import is_sealed, seal

# Demonstrations, evenly spaced, that the mean of the reward comes from: its standard error is 2.2%
# of a deviation, and scoring more would cost time after every fit.
CENTRED = 2048
# Options that are no part of what is fitted, or that have an entry of their own in a stage's key.
_OFFSET = ("offset", "offset_coef", "offset_clip", "offset_per_token")
_ELSEWHERE = ("args", "schedule", "numerator", "endogenous", "mean", *_OFFSET)


@dataclass(frozen=True)
class _Fit:
    """One fit of a reward: its pairs, and the settings and inputs of its stage."""

    pairs: Sequence[IterationPairs]
    window: str
    max_pairs: int | None
    seed: int
    args: dict[str, Any]
    settings: dict[str, Any]
    inputs: dict[str, str]

    def train(self) -> Dataset:
        """The pairs in the window, at most max_pairs of them."""
        rows = window([pairs.train for pairs in self.pairs], self.window)
        if self.max_pairs is None or self.max_pairs >= len(rows):
            return rows
        return rows.shuffle(seed=self.seed).select(range(self.max_pairs))


def fit_reward_level(
    context: RunContext, iteration: Iteration, pairs: Sequence[IterationPairs]
) -> Reward:
    """Fit r_k on the pairs in the window: an explicit reward model, or SPIN's implicit reward.

    pairs: those of iterations 0 to k. A log-ratio of two models that the run has needs no fit.
    """
    options = context.recipe.reward
    if not options.is_learned:
        numerator = _model(options.numerator, iteration)
        ratio = _log_ratio(options, numerator, _references(options, iteration), options.beta)
        return with_functions(ratio, options, iteration.data)
    args = scheduled(options.args, options.schedule, iteration.k)
    settings: dict[str, Any] = {
        "iteration": iteration.k,
        "window": context.recipe.pairs.window,
        "args": args,
        "reward": options.model_dump(exclude={*_ELSEWHERE, "preferences", "functions"}),
    }
    if options.ensemble is None:
        del settings["reward"]["ensemble"]
    # Normalise irrelevant settings so that recipes share a key.
    if iteration.policy.key == iteration.initial.key:
        settings["reward"] |= {"reference": "previous", "mixture": 0.5}
    if iteration.reward is None:
        settings["reward"]["init"] = "warm"
    if options.kind == "explicit" and len(pairs) == 1:
        settings["window"] = "all"
    fit = _Fit(
        pairs,
        context.recipe.pairs.window,
        options.max_pairs,
        derive_seed(context.recipe.seed, f"pairs of {iteration.k}") % 2**32,
        args,
        settings,
        {f"pairs-{i}": p.key for i, p in enumerate(pairs)} | {"initial": iteration.initial.key},
    )
    fit_level = _fit_implicit if options.kind == "implicit" else _fit_explicit
    return with_functions(fit_level(context, iteration, fit), options, iteration.data)


def with_functions(reward: Reward, options: RewardOptions, data: Data) -> Reward:
    """The reward with the recipe's functions added, whose hash ends its key.

    Raises UserError: a function cannot be imported.
    """
    functions = options.named_functions
    if not functions:
        return reward
    columns = "".join(data.raw.checksums.values()) if data.card.extra else ""
    key = f"{reward.key}+{functions_key(functions, columns)}"
    return replace(reward, key=key, functions=functions)


def functions_only(options: RewardOptions, data: Data) -> Reward | None:
    """The reward of kind functions, of which nothing is fitted; None for another kind."""
    if options.kind != "functions":
        return None
    return with_functions(Reward("functions", Path(), "functions"), options, data)


def _log_ratio(
    options: RewardOptions,
    numerator: Policy,
    references: Sequence[tuple[float, Policy]],
    beta: float,
) -> Reward:
    """The reward beta log(numerator / references), which no stage has to compute."""
    parts = [numerator.key, "log_ratio", beta, options.endogenous, options.mean]
    parts += [f"{weight}+{model.key}" for weight, model in references]
    return Reward(
        "log_ratio",
        numerator.path,
        "+".join(map(str, parts)),
        beta,
        tuple((weight, model.path) for weight, model in references),
        options.endogenous,
        options.mean,
    )


def _explicit(stage: Stage, beta: float) -> Reward:
    """The reward of a stage."""
    return Reward("explicit", stage.path / "model", stage.key, beta)


def _centring_rows(data: Data) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of the demonstrations, evenly spaced, that a reward is centred on."""
    rows = data.reward.select(range(0, len(data.reward), -(-len(data.reward) // CENTRED)))
    return column(rows, "prompt_ids"), column(rows, "completion_ids")


def _centre_and_save(reward: RewardModel, data: Data, folder: Path) -> dict[str, Any]:
    """Give the demonstrations mean 0, and write the reward into a folder."""
    mean, std = reward.centre(*_centring_rows(data))
    if distributed.is_main():
        reward.save_pretrained(folder)
    return {"demonstration_scores": [mean, std]}


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


def _fit_explicit(context: RunContext, iteration: Iteration, fit: _Fit) -> Reward:
    """Fit a reward model, from the SFT model or (warm) from the last iteration's reward."""
    options, k = context.recipe.reward, iteration.k
    warm = iteration.reward.learned if iteration.reward and options.init == "warm" else None
    preferences = options.preferences
    inputs = dict(fit.inputs)
    if warm is not None:
        inputs["warm"] = warm.key
    if preferences is not None:
        how = "alone" if preferences.use == "alone" else preferences.weight
        inputs["preferences"] = f"{data_checksum(iteration.data.raw.preferences)}*{how}"

    def build(work: Path) -> dict[str, Any]:
        pairs = fit.train()
        columns = pair_columns(pairs)
        if preferences is not None:
            for name, values in _preference_columns(context, iteration).items():
                columns[name] = values if preferences.use == "alone" else columns[name] + values
        ensemble = options.ensemble
        if ensemble is not None and ensemble.kind == "models":
            return _fit_models(context, iteration, fit, work, columns, warm)
        if ensemble is not None:
            seed = derive_seed(context.recipe.seed, f"bootstrap {k}")
            columns["weight"] = bootstrap_weights(columns["weight"], ensemble.members, seed)
        reward = _unfitted(context, iteration, None if warm is None else warm.path)
        training = context.training(work, f"reward {k}")
        metrics = fit_reward(reward, columns, pair_loss(options), fit.args, training)
        return {**metrics, **_centre_and_save(reward, iteration.data, work / "model")}

    stage = context.stage(Role.reward(k), "reward", fit.settings, inputs, build)
    context.log(Role.reward_fit(k), _without_history(stage.metrics))
    judge_fit(context, k, stage.metrics)
    return _explicit(stage, options.beta)


def pair_loss(options: RewardOptions) -> PairLoss:
    """The pair loss of a recipe's reward."""
    return PairLoss(options.loss, options.beta, options.label_smoothing, options.margin_cap)


def _fit_models(
    context: RunContext,
    iteration: Iteration,
    fit: _Fit,
    work: Path,
    columns: dict[str, list[Any]],
    warm: Reward | None,
) -> dict[str, Any]:
    """Fit the models of an ensemble one after the other; they differ by seed: head and order."""
    options, ensemble, k = context.recipe.reward, context.recipe.reward.ensemble, iteration.k
    assert ensemble is not None
    members, scores, folder = [], [], work / "model"
    for i in range(ensemble.members):
        start = None if warm is None else member_folder(warm.path, i)
        reward = _unfitted(context, iteration, start, f" member {i}")
        training = context.training(work / "scratch" / f"{i}", f"reward {k} member {i}")
        metrics = fit_reward(reward, columns, pair_loss(options), fit.args, training)
        centred = _centre_and_save(reward, iteration.data, member_folder(folder, i))
        members.append({**_without_history(metrics), **centred})
        scores.append(reward.score_ids(*_centring_rows(iteration.data)))
    combined = pessimistic(torch.stack(scores, -1), ensemble.penalty).double()
    mean, std = float(combined.mean()), float(combined.std(correction=0))
    if distributed.is_main():
        save_ensemble(reward, ensemble.penalty, mean, folder)
    return {"members": members, "demonstration_scores": [mean, std]}


def _unfitted(
    context: RunContext, iteration: Iteration, warm: Path | None, member: str = ""
) -> RewardModel:
    """The reward model that a fit starts from. member: of an ensemble, part of the head's seed."""
    options = context.recipe.reward
    if warm is not None:
        reward = RewardModel.from_pretrained(warm, context.device, merge=options.lora is None)
        if options.lora is not None:
            train_adapter(reward.model)
        reward.settings = replace(reward.settings, centres=[], mean=0.0)
        if options.train_layers is not None:
            train_last_layers(reward.model, options.train_layers)
        return reward
    ensemble, settings = options.ensemble, _settings(context, iteration.data, options.lm_coef)
    heads = 1
    if ensemble is not None and ensemble.kind == "heads":
        heads, settings = ensemble.members, replace(settings, penalty=ensemble.penalty)
    reward = RewardModel.from_policy(
        iteration.initial.path,
        context.tokenizer,
        settings,
        derive_seed(context.recipe.seed, f"head {iteration.k}{member}") % 2**63,
        context.device,
        options.lora,
        heads=heads,
        **(context.models.quantization if options.lora is not None else {}),
    )
    if options.train_layers is not None:
        train_last_layers(reward.model, options.train_layers)
    return reward


def _preference_columns(context: RunContext, iteration: Iteration) -> dict[str, list[Any]]:
    """The recipe's preference pairs as trainer columns."""
    options = context.recipe.reward.preferences
    assert options is not None
    card, texts = load_card(options.card), iteration.data.raw.preferences
    limit = context_length(context.models.load_policy(iteration.initial.path))
    encoded = encode_preferences(texts, context.tokenizer, card, context.recipe.data, limit).rows
    pairs = encoded.add_column("rejected_prompt_ids", column(encoded, "prompt_ids"))
    return pair_columns(pairs, options.weight)


def _model(name: str, iteration: Iteration) -> Policy:
    """A model of the run by its name in the recipe's reward.numerator and reward.reference."""
    initial = iteration.initial
    match name:
        case "initial":
            return initial
        case "previous":
            return iteration.policy
        case "older":
            return iteration.earlier[-1]
        case "start":
            return iteration.earlier[0]
    return Policy(initial.path.parent / CHECKPOINT, f"{initial.key}/{CHECKPOINT}")


def _references(options: RewardOptions, iteration: Iteration) -> tuple[tuple[float, Policy], ...]:
    """Weighted models whose mixture an implicit reward is measured against."""
    if options.reference == "none":
        return ()
    if options.reference != "mixture":
        return ((1.0, _model(options.reference, iteration)),)
    share = options.mixture
    return ((share, iteration.initial), (1.0 - share, iteration.policy))


def _fit_implicit(context: RunContext, iteration: Iteration, fit: _Fit) -> Reward:
    """SPIN's step: move pi_theta from pi_k against the recipe's reference."""
    k, policy, models = iteration.k, iteration.policy, context.models
    weighted = _references(context.recipe.reward, iteration)
    starts_at_reference = all(model.path == policy.path for _, model in weighted)

    def build(work: Path) -> dict[str, Any]:
        train = fit.train()
        references = [(weight, models.load_policy(model.path)) for weight, model in weighted]
        generator = policy.identity if starts_at_reference else ""
        began = time.perf_counter()
        logps = cached_array(
            work / "scratch" / "reference.npy",
            lambda: reference_logps(references, train, generator),
        )
        seconds = {"step": 0, "reference_seconds": time.perf_counter() - began}
        model = models.load_trainable(policy.path)
        training = context.training(work, f"SPIN {k}")
        metrics = fit_implicit(
            model,
            context.tokenizer,
            train,
            logps,
            fit.args,
            training,
            at_reference=starts_at_reference,
        )
        save_model(model, context.tokenizer, work / "model")
        return {**metrics, "history": [seconds, *metrics["history"]]}

    known = (policy.key, iteration.initial.key)
    others = {f"reference-{i}": m.key for i, (_, m) in enumerate(weighted) if m.key not in known}
    stage = context.stage(
        Role.reward(k),
        "implicit-reward",
        {**fit.settings, **models.adapted},
        {**fit.inputs, "policy": policy.key, **others},
        build,
    )
    context.log(Role.reward_fit(k), _without_history(stage.metrics))
    beta = float(fit.args.get("beta", DPOConfig.beta))
    fitted = Policy(stage.path / "model", stage.key)
    reward = _log_ratio(context.recipe.reward, fitted, weighted, beta)
    if context.recipe.policy_update.kind != "identity":
        return reward
    return replace(reward, kind="implicit", key=stage.key)


def scheduled(
    args: Mapping[str, Any], schedule: Mapping[str, Sequence[Any]], k: int
) -> dict[str, Any]:
    """args with iteration k's value of every scheduled field; the last value repeats."""
    return {**args, **{name: values[min(k, len(values) - 1)] for name, values in schedule.items()}}


def cached_array(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `path`; a missing one is computed and written, whole or not at all."""
    if not distributed.on_main(lambda: is_sealed(path)):
        values = compute()
        distributed.on_main(lambda: _write(path, values))
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
