"""The baseline of a run's reward: the same backbone and settings, trained on preferences."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.config.schema import Recipe
from irl_align.data.columns import column
from irl_align.data.splits import data_checksum
from irl_align.errors import UserError
from irl_align.evaluation.inference import first_policy, prompt_format
from irl_align.evaluation.preference_data import PreferenceSet, encode, fits
from irl_align.models.loading import load_tokenizer
from irl_align.models.lora import quantization_config
from irl_align.models.trl import Training
from irl_align.reward.fit import fit_reward, pair_columns
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.training.keys import derive_seed
from irl_align.training.reward_step import scheduled
from irl_align.training.run_folder import RunView
from irl_align.training.store import Store


def preference_reward(
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
        loading = {"quantization_config": quantization_config(quantization)} if quantization else {}
        tokenizer = load_tokenizer(policy)
        reward = RewardModel.from_policy(
            policy, tokenizer, settings, seed % 2**63, device, options.lora, **loading
        )
        training = Training(work, seed % 2**31, device, label="preference reward")
        metrics = fit_reward(reward, pair_columns(rows), options.loss, args, training)
        reward.fit_normaliser(column(rows, "prompt_ids"), column(rows, "chosen_ids"))
        reward.save_pretrained(work / "model")
        return metrics

    stage = Store(view.folder.parent / "store").stage(
        "preference-reward",
        {
            "seed": recipe.seed,
            "args": args,
            "reward": options.model_dump(include={"loss", "bound", "lm_coef", "echo", "lora"}),
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
