"""The steps of the loop, each a stage: what goes in, what is computed, what is reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import DPOConfig

from irl_align.cards import import_object, load_card
from irl_align.config import PairSource, Recipe
from irl_align.data import (
    choose_prompts,
    data_checksum,
    load_preferences,
)
from irl_align.errors import UserError
from irl_align.generate import Completion, Sampling
from irl_align.lab import Lab, derive_seed
from irl_align.models import context_length
from irl_align.pairs import (
    Pairs as MadePairs,
)
from irl_align.pairs import (
    contrast_pairs,
    load_pairs,
    policy_pairs,
    sample_pairs,
    save_pairs,
    stats,
    window,
)
from irl_align.policy import Demonstrations, Policy, PolicyUpdate, Reward
from irl_align.policy.best_of_n import BestOfN
from irl_align.policy.identity import Identity
from irl_align.policy.ppo.update import PPO
from irl_align.policy.sft import MoreSFT
from irl_align.policy_options import (
    BestOfNOptions,
    IdentityOptions,
    MoreSFTOptions,
    PPOOptions,
)
from irl_align.prepare import Data
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.implicit import fit_implicit, reference_logps
from irl_align.reward.model import RewardModel, RewardSettings
from irl_align.tasks.gold import GoldMetric
from irl_align.tokens import (
    encode_preferences,
    encode_prompts,
)
from irl_align.trainers import save_model

logger = logging.getLogger(__name__)
NORMALISED = 4096  # demonstrations, evenly spaced, that the reward's mean and variance come from


@dataclass(frozen=True)
class Pairs:
    """Pairs of one iteration: what the reward is fitted on, and held-out ones to judge it by."""

    key: str
    train: Dataset
    held_out: Dataset


def make_pairs(
    lab: Lab, k: int, policy: Policy, initial: Policy, start: Policy, data: Data
) -> Pairs:
    """Sample y_hat ~ pi_k and pair every demonstration with a sample (and the recipe's extras)."""
    options = lab.recipe.pairs
    generation = lab.recipe.generation
    if generation.temperature == 0:
        logger.warning("generation.temperature is 0: greedy negatives, all the same per prompt")
    sampling = lab.sampling(generation.samples_per_prompt, generation.temperature)
    samplers = {"policy": policy, "init": start, "sft": initial}
    used = {side for source in options.sources for side in source.split("/")}
    uses = {"train": "reward", "held_out": "held_out"}
    parts: dict[str, Dataset] = {part: getattr(data, use) for part, use in uses.items()}
    drawn = {
        (name, part): samples_by_key(lab, samplers[name], rows, sampling, part)
        for name in sorted(used & set(samplers))
        for part, rows in parts.items()
    }

    def from_source(source: PairSource, part: str) -> MadePairs:
        common: dict[str, Any] = {"iteration": k, "seed": lab.recipe.seed}
        chosen, rejected = source.split("/")
        if rejected == "contrast":
            return contrast_pairs(
                parts[part],
                options.contrast,
                per_demonstration=options.contrast_per_demonstration,
                edit=import_object(data.card.edit, "edit") if data.card.edit else None,
                encode=lambda texts: encode_prompts(texts, lab.tokenizer, data.card),
                context=data.context,
                **common,
            )
        common |= {
            "source": source,
            "generator": samplers[rejected].identity,
            "sampling": sampling,
            "truncated": options.truncated,
        }
        samples = drawn[rejected, part]
        if chosen == "demonstration":
            limit = options.demonstrations_per_prompt
            return policy_pairs(parts[part], samples, demonstrations_per_prompt=limit, **common)
        prompts = dict(zip(parts[part]["prompt_key"], parts[part]["prompt_ids"], strict=True))
        return sample_pairs(prompts, drawn[chosen, part], samples, **common)

    def build(work: Path) -> dict[str, Any]:
        metrics = {}
        for part in parts:
            made = [from_source(source, part) for source in options.sources]
            dropped: Counter[str] = Counter()
            for some in made:
                dropped.update(some.dropped)
            rows = concatenate_datasets([some.rows for some in made])
            save_pairs(rows, work / f"{part}.parquet")
            metrics[part] = stats(rows, dropped)
        return metrics

    stage = lab.stage(
        f"pairs/{k}",
        "pairs",
        {
            "iteration": k,
            "pairs": options.model_dump(exclude={"window"}),
            "sampling": vars(sampling),
        },
        {
            **{part: data.checksums[use] for part, use in uses.items()},
            **{name: samplers[name].identity for name, _ in drawn},
        },
        build,
    )
    lab.run.log(f"pairs/{k}", stage.metrics)
    train, held_out = (load_pairs(stage.path / f"{part}.parquet") for part in parts)
    return Pairs(stage.key, train, held_out)


def samples_by_key(
    lab: Lab, policy: Policy, rows: Dataset, sampling: Sampling, role: str
) -> dict[str, list[Completion]]:
    """Samples of every distinct prompt of these rows, by prompt key."""
    prompts = dict(zip(rows["prompt_key"], rows["prompt_ids"], strict=True))
    samples = lab.sample(policy, list(prompts.values()), sampling, role)
    return dict(zip(prompts, samples.completions, strict=True))


def fit_reward_level(
    lab: Lab,
    k: int,
    policy: Policy,
    initial: Policy,
    previous: Reward | None,
    pairs: Sequence[Pairs],
    data: Data,
) -> Reward:
    """Fit r_k on the pairs in the window: an explicit reward model, or SPIN's implicit reward."""
    options = lab.recipe.reward
    args = scheduled(options.args, options.schedule, k)
    train = window([p.train for p in pairs], lab.recipe.pairs.window)
    if options.max_pairs is not None and options.max_pairs < len(train):
        seed = derive_seed(lab.recipe.seed, f"pairs of {k}") % 2**32
        train = train.shuffle(seed=seed).select(range(options.max_pairs))
    inputs = {f"pairs-{i}": p.key for i, p in enumerate(pairs)} | {"initial": initial.key}
    settings = {
        "iteration": k,
        "window": lab.recipe.pairs.window,
        "args": args,
        "reward": options.model_dump(exclude={"args", "schedule", "preferences", "max_pairs"}),
    }
    if options.max_pairs is not None:
        settings["max_pairs"] = options.max_pairs
    if options.kind == "implicit":
        return _fit_implicit(lab, k, policy, initial, train, args, settings, inputs)
    warm = previous if options.init == "warm" else None
    preferences = _preferences(lab, initial)
    inputs |= {"warm": warm.key} if warm is not None else {}
    inputs |= {"preferences": preferences.checksum} if preferences is not None else {}

    def build(work: Path) -> dict[str, Any]:
        if warm is not None:
            reward = RewardModel.from_pretrained(warm.path, lab.device)
            reward.settings = replace(reward.settings, mean=0.0, std=1.0)
        else:
            reward_settings = RewardSettings(
                lm_coef=options.lm_coef,
                bound=options.bound,
                template=data.card.template,
                lowercase=data.card.lowercase,
                name=data.card.name,
            )
            seed = derive_seed(lab.recipe.seed, f"head {k}") % 2**63
            reward = RewardModel.from_policy(
                initial.path, lab.tokenizer, reward_settings, seed, lab.device
            )
        columns = pair_columns(train)
        if preferences is not None:
            for name, values in preferences.columns.items():
                columns[name] = columns[name] + values
        metrics = fit_reward(reward, columns, options.loss, args, lab.training(work, f"reward {k}"))
        rows = data.reward.select(range(0, len(data.reward), -(-len(data.reward) // NORMALISED)))
        reward.fit_normaliser(list(rows["prompt_ids"]), list(rows["completion_ids"]))
        reward.save_pretrained(work / "model")
        return {**metrics, "normaliser": [reward.settings.mean, reward.settings.std]}

    stage = lab.stage(f"reward/{k}", "reward", settings, inputs, build)
    lab.run.log(f"reward-fit/{k}", _without_history(stage.metrics))
    std = float(stage.metrics["normaliser"][1])
    return Reward("explicit", stage.path / "model", stage.key, scale=std)


def _fit_implicit(
    lab: Lab,
    k: int,
    policy: Policy,
    initial: Policy,
    train: Dataset,
    args: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> Reward:
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
        logps = cached_array(
            work / "scratch" / "reference.npy",
            lambda: reference_logps(references, train, generator),
        )
        model = lab.load_policy(policy.path)
        training = lab.training(work, f"SPIN {k}")
        metrics = fit_implicit(
            model, lab.tokenizer, train, logps, args, training, starts_at_reference
        )
        save_model(model, lab.tokenizer, work / "model")
        return metrics

    stage = lab.stage(
        f"reward/{k}", "implicit-reward", settings, {**inputs, "policy": policy.key}, build
    )
    lab.run.log(f"reward-fit/{k}", _without_history(stage.metrics))
    beta = float(args.get("beta", DPOConfig.beta))
    return Reward("implicit", stage.path / "model", stage.key, beta=beta, references=paths)


@dataclass(frozen=True)
class Preferences:
    """Preference pairs as trainer columns, and their checksum."""

    columns: dict[str, list[Any]]
    checksum: str


def _preferences(lab: Lab, initial: Policy) -> Preferences | None:
    options = lab.recipe.reward.preferences
    if options is None:
        return None
    card = load_card(options.card)
    rows = load_preferences(card, options.split, options.path)
    context = context_length(lab.load_policy(initial.path))
    encoded = encode_preferences(rows, lab.tokenizer, card, lab.recipe.data, context).rows
    pairs = encoded.add_column("rejected_prompt_ids", list(encoded["prompt_ids"]))
    return Preferences(
        pair_columns(pairs, options.weight), f"{data_checksum(rows)}*{options.weight}"
    )


def improve_policy(
    lab: Lab, k: int, policy: Policy, initial: Policy, reward: Reward | None, data: Data
) -> Policy:
    """pi_{k+1} = improve(pi_k, r_k), by the recipe's policy update."""
    part = "sft" if reward is None else "reward"
    update = make_update(lab.recipe, data)
    improved = update(lab, k, policy, initial, reward, data.demonstrations(part))
    lab.names.setdefault(improved.identity, f"policy-{k + 1}")
    return improved


def make_update(recipe: Recipe, data: Data) -> PolicyUpdate:
    """The recipe's policy update: built in, or made by a factory given by import path."""
    options = recipe.policy_update
    if isinstance(options, BestOfNOptions):
        return BestOfN(options)
    if isinstance(options, PPOOptions):
        gold = data.card.gold if recipe.evaluation.gold else None
        judge = rollout_judge(gold, data.reward) if gold is not None else None
        return PPO(options, some_held_out(data, options.held_out_prompts, recipe.seed), judge, gold)
    if isinstance(options, MoreSFTOptions):
        return MoreSFT(options.args)
    if isinstance(options, IdentityOptions):
        return Identity()
    factory = import_object(options.kind, "policy_update.kind")
    try:
        update: PolicyUpdate = factory(**options.options)
    except TypeError as error:
        raise UserError(f"policy_update.options: {options.kind} refused them: {error}") from error
    return update


def some_held_out(data: Data, prompts: int, seed: int) -> Demonstrations:
    """Demonstrations of at most so many held-out prompts, chosen by hash."""
    keys = choose_prompts(data.held_out["prompt_key"], prompts, seed)
    rows = data.held_out.filter(lambda key: key in keys, input_columns="prompt_key")
    checksum = f"{data.checksums['held_out']}/{prompts}/{seed}"
    return Demonstrations(list(rows["prompt_ids"]), list(rows["completion_ids"]), checksum)


def rollout_judge(gold: str, rows: Dataset) -> Callable[..., Mapping[str, float]]:
    """The card's gold metric of samples for these rows' prompts, given as token ids, and texts."""
    metric: GoldMetric = import_object(gold, "gold")
    texts: dict[tuple[int, ...], str] = {}
    references: dict[tuple[int, ...], list[str]] = {}
    for ids, prompt, completion in zip(
        rows["prompt_ids"], rows["prompt"], rows["completion"], strict=True
    ):
        texts.setdefault(tuple(ids), prompt)
        references.setdefault(tuple(ids), []).append(completion)

    def judge(prompts: Sequence[Sequence[int]], completions: Sequence[str]) -> Mapping[str, float]:
        keys = [tuple(ids) for ids in prompts]
        asked = [texts[key] for key in keys]
        return metric(asked, completions, [references[key] for key in keys]).corpus

    return judge


def scheduled(
    args: Mapping[str, Any], schedule: Mapping[str, Sequence[Any]], k: int
) -> dict[str, Any]:
    """args with iteration k's value of every scheduled field; the last value repeats."""
    return {**args, **{name: values[min(k, len(values) - 1)] for name, values in schedule.items()}}


def cached_array(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in `path`, computed and written aside and renamed in where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".writing.npy")
        np.save(aside, compute())
        aside.rename(path)
    array: np.ndarray = np.load(path)
    return array


def _without_history(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "history"}
