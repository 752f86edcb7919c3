"""The rival of a run's reward: the same backbone and settings, trained on human preferences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.config.schema import Recipe
from irl_align.data.columns import column
from irl_align.data.loading import data_checksum
from irl_align.errors import UserError
from irl_align.evaluation.preference_data import PreferenceSet, encode, fits
from irl_align.models.loading import load_tokenizer
from irl_align.models.lora import quantization_config
from irl_align.models.trl import Training
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.training.context import derive_seed
from irl_align.training.run_folder import RunView
from irl_align.training.store import Store
from irl_align.utils.files import read_json


@dataclass(frozen=True)
class PreferenceBaseline:
    """A reward trained on preferences."""

    path: Path
    trained_on: dict[str, Any]
    """Card, split, number of pairs, and how many of them were too long for the context."""


def first_policy(view: RunView) -> tuple[Path, str]:
    """Folder and stage key of the model that a run's loop began with: SFT's, or the start model."""
    stage = view.stages["sft" if "sft" in view.stages else "start"]
    return view.folder / stage["path"] / "model", stage["key"]


def preference_reward(
    view: RunView | None, pairs: PreferenceSet, device: torch.device
) -> PreferenceBaseline:
    """A reward fitted on preference pairs from a run's first policy, with the settings of the run's
    own reward; a stage of the run's store, so it is trained once.

    Raises UserError: no run whose reward was fitted on pairs, or no pair fits into the context.
    """
    view, recipe = with_reward(view)
    options, (policy, key) = recipe.reward, first_policy(view)
    rows, dropped = _rows(pairs, policy, options.echo)
    config = read_json(policy / "config.json", "a model's config", "run the recipe again")
    prompt_of = config["irl_prompt"]
    args = {**options.args, **{name: values[0] for name, values in options.schedule.items()}}

    def build(work: Path) -> dict[str, Any]:
        settings = RewardSettings(options.lm_coef, options.bound, options.echo, **prompt_of)
        reward = _unfitted(recipe, policy, settings, device)
        training = Training(work, _seed(recipe) % 2**31, device, label="preference reward")
        metrics = fit_reward(reward, pair_columns(rows), options.loss, args, training)
        reward.fit_normaliser(column(rows, "prompt_ids"), column(rows, "chosen_ids"))
        reward.save_pretrained(work / "model")
        return metrics

    stage = Store(view.folder.parent / "store").stage(
        "preference-reward",
        {
            "seed": recipe.seed,
            "args": args,
            "reward": options.model_dump(include={"loss", "bound", "lm_coef"}),
            "prompt": prompt_of,
            **_unusual(recipe),
        },
        {"sft": key, "pairs": data_checksum(pairs.rows)},  # sft, or the start model without it
        build,
    )
    told = {"card": pairs.card.name, "split": pairs.split, "pairs": len(rows), "dropped": dropped}
    return PreferenceBaseline(stage.path / "model", told)


def with_reward(view: RunView | None) -> tuple[RunView, Recipe]:
    """A run and its recipe; UserError where it fitted no explicit reward, which a rival goes by."""
    if view is not None and (view.summary or {}).get("reward") is not None:
        recipe = Recipe.model_validate(view.recipe)
        if recipe.reward.kind == "explicit":
            return view, recipe
    raise UserError(
        "--train-set, --train-split: found no run with an explicit reward, expected one: the "
        "reward on preferences is trained from its first policy with its settings"
    )


def _rows(pairs: PreferenceSet, policy: Path, echo: bool) -> tuple[Dataset, int]:
    """Pairs as token ids for the fit, and how many were too long for the context."""
    encoded = encode(pairs, policy, is_reward=False)
    rows = encoded.select(np.flatnonzero(fits(encoded, policy, echo)))
    if not len(rows):
        raise UserError(
            f"{pairs.card.name}, {pairs.split}: all {len(encoded)} pairs to train on are longer "
            "than the model's context"
        )
    both = rows.map(lambda row: {"rejected_prompt_ids": row["prompt_ids"]})
    return both, len(encoded) - len(rows)


def _seed(recipe: Recipe) -> int:
    return derive_seed(recipe.seed, "head of the preference reward")


def _unfitted(
    recipe: Recipe, policy: Path, settings: RewardSettings, device: torch.device
) -> RewardModel:
    """The reward that the fit starts from; as the run's own, of 4 bits only under an adapter."""
    lora, quantization = recipe.reward.lora, recipe.model.quantization
    options: dict[str, Any] = {}
    if lora is not None and quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    tokenizer = load_tokenizer(policy)
    seed = _seed(recipe) % 2**63
    return RewardModel.from_policy(policy, tokenizer, settings, seed, device, lora, **options)


def _unusual(recipe: Recipe) -> dict[str, Any]:
    """Settings that a plain reward has not, so that its key says nothing of them."""
    options, quantization = recipe.reward, recipe.model.quantization
    found: dict[str, Any] = {"echo": True} if options.echo else {}
    if options.lora is not None:
        found["lora"] = options.lora.model_dump()
        if quantization is not None:
            found["quantization"] = quantization.model_dump()
    return found
