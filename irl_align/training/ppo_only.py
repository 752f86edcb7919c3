"""PPO outside the loop: any policy, any reward model, the prompts of a data card."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.config.policy_update import PPOOptions
from irl_align.config.recipe import make_recipe
from irl_align.config.schema import Recipe
from irl_align.data.columns import column
from irl_align.data.rows import Prompt
from irl_align.errors import UserError
from irl_align.models.loading import pick_device
from irl_align.policy import Policy, Reward
from irl_align.policy.roles import Role
from irl_align.reward.alignment import load_reward
from irl_align.reward.protocol import RewardFunction
from irl_align.training.context import RunContext, open_run
from irl_align.training.evaluation import evaluate_policy
from irl_align.training.extra_prompts import PromptsByIds, with_prompts
from irl_align.training.policy_step import make_update, policy_prompts
from irl_align.training.prepare import Data, prepare
from irl_align.training.run_folder import artefact_folder
from irl_align.training.store import RECORD, Store, environment
from irl_align.training.trackers import LoopTrackers
from irl_align.training.train import check_data, check_trackers
from irl_align.utils import distributed
from irl_align.utils.files import file_checksum, read_json


@dataclass(frozen=True)
class Improved:
    """What PPO left behind."""

    policy: Path
    """Folder of the policy, with its tokenizer."""
    folder: Path
    """Run folder; the stage policy-1 has metrics.jsonl and samples.jsonl."""
    metrics: dict[str, Any]
    """Of the training: see the record `history`."""


def ppo_recipe(policy: str, card: str, output: str, options: Sequence[str]) -> Recipe:
    """The recipe of a PPO run by itself; options are key=value, those of PPO by their own name."""
    own, groups = set(PPOOptions.model_fields), set(Recipe.model_fields)
    overrides = []
    for option in options:
        key = option.split("=")[0].strip()
        # A bare name that is no group's is taken for PPO's: the nearest of its names is told.
        its = key in own or ("." not in key and key not in groups)
        overrides.append(f"policy_update.{option}" if its else option)
    values = {
        "name": "ppo",
        "output_dir": output,
        "data": {"card": card},
        "model": {"path": str(artefact_folder(Path(policy), "policy"))},
        "sft": {"enabled": False},
        "policy_update": {"kind": "ppo"},
        "loop": {"iterations": 1},
    }
    recipe = make_recipe(values, "irl-align ppo", overrides)
    if not isinstance(recipe.policy_update, PPOOptions):
        kind = recipe.policy_update.kind
        raise UserError(f"irl-align ppo: policy_update.kind: found {kind}, expected ppo")
    return recipe


def run_ppo(recipe: Recipe, reward: str, template: str | None = None) -> Improved:
    """Train the recipe's model on a reward; the same call goes on after a kill.

    Before and after, the model answers the evaluation's prompts, as in the loop; the reward of
    the answers after is kept beside them.
    reward: a run with an explicit reward, or any one-label AutoModelForSequenceClassification;
    template: its prompts' (text with {prompt}, or chat), where its tokenizer is not the policy's.
    Raises UserError for what the user can mend.
    """
    check_trackers(recipe)
    check_data(recipe)
    output = Path(recipe.output_dir)
    device, began = distributed.own_device(pick_device(recipe.device)), time.time()
    path = artefact_folder(Path(reward), "reward")
    key = file_checksum(path)[:16] if path.exists() else str(path)
    artefact = Reward("explicit", path, key if template is None else f"{key}+{template}")
    where = path if path.exists() else reward
    with distributed.joined(device), open_run(recipe) as run:
        run.log("environment", {**environment(), "device": recipe.device, "seed": recipe.seed})
        context = RunContext(recipe, Store(output / "store"), run, device)
        trackers = LoopTrackers(recipe, run)
        try:
            improved = _improve(context, artefact, where, template)
            trackers.tell(run.metrics)
        finally:
            context.close()
            trackers.finish()
        record = improved.path.parent / RECORD
        metrics = read_json(record, "the record of a finished stage", "run the command again")
        run.finish(
            {
                "policy": os.path.relpath(improved.path, output),
                "reward": os.path.relpath(path, output) if path.exists() else None,
                "policy_number": 1,
                "ranking": None,
                "ended": metrics["metrics"]["ended"],
                "seconds": round(time.time() - began, 1),
            }
        )
    return Improved(improved.path, run.folder, metrics["metrics"])


def _improve(
    context: RunContext, reward: Reward, where: str | Path, template: str | None
) -> Policy:
    """The policy after PPO on the reward model that is at `where`, evaluated as it was before."""
    data, start = prepare(context)
    evaluate_policy(context, 0, start, start, None, data)
    extra = policy_prompts(context, data)
    prompt_of = raw_prompts(data, extra)

    def load(artefact: Reward) -> RewardFunction:
        return load_reward(
            where, context.tokenizer, context.device, prompt_of.__getitem__, template
        )

    context.reward_from = load
    update = make_update(context.recipe, data)
    demonstrations = with_prompts(data.demonstrations("reward"), extra)
    improved = update(context, 0, start, start, reward, demonstrations)
    context.names.setdefault(improved.identity, str(Role.policy(1)))
    evaluate_policy(context, 1, improved, start, reward, data)
    return improved


def summary_line(improved: Improved) -> str:
    """How the training ended, and what it moved."""
    first, last = improved.metrics["history"][0], improved.metrics["history"][-1]
    return (
        f"{improved.metrics['ended']}; reward {first['reward']:.3f} to {last['reward']:.3f}, "
        f"KL {last['kl']:.2f} nats, length {first['length']:.1f} to {last['length']:.1f}; "
        f"kept: after update {improved.metrics['kept_update']}"
    )


class Prompts(dict[tuple[int, ...], Prompt]):
    """Prompts as they are in the data, by their token ids."""

    def __getitem__(self, ids: Sequence[int]) -> Prompt:
        return super().__getitem__(tuple(ids))


def raw_prompts(data: Data, extra: PromptsByIds) -> Prompts:
    """Of every row that a reward may be asked about, and of the prompts without demonstrations."""
    prompts = Prompts(extra)
    for rows in (data.reward, data.held_out, data.evaluation):
        for ids, text in zip(column(rows, "prompt_ids"), column(rows, "prompt"), strict=True):
            prompts[tuple(ids)] = text
    return prompts
