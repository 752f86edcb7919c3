"""PPO outside the loop: any policy, any reward model, the prompts of a data card."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irl_align.config.policy_update import PPOOptions
from irl_align.config.recipe import make_recipe
from irl_align.config.schema import Recipe
from irl_align.errors import UserError
from irl_align.policy import Policy, Reward, UpdateRequest
from irl_align.policy.roles import Role
from irl_align.reward.foreign import load_reward
from irl_align.training.context import RunContext
from irl_align.training.evaluation import evaluate_policy
from irl_align.training.extra_prompts import with_prompts
from irl_align.training.function_inputs import run_format
from irl_align.training.iteration import Iteration
from irl_align.training.policy_step import make_update, policy_prompts
from irl_align.training.prepare import load_data, prepare
from irl_align.training.reward_step import with_functions
from irl_align.training.run_folder import artefact_folder
from irl_align.training.setup import finish_run, open_run
from irl_align.training.store import RECORD
from irl_align.utils.files import file_checksum, read_json


@dataclass(frozen=True)
class Improved:
    """What PPO produced."""

    policy: Path
    """Folder of the policy, with its tokenizer."""
    folder: Path
    """Run folder; the stage policy-1 has metrics.jsonl and samples.jsonl."""
    metrics: dict[str, Any]
    """Metrics of the training; `history` has one record per update."""


def ppo_recipe(policy: str, card: str, output: str, options: Sequence[str]) -> Recipe:
    """The recipe of a PPO run; options are key=value, and PPO's own options need no group.

    Raises UserError: an option is not known, or another policy update is asked for.
    """
    own, groups = set(PPOOptions.model_fields), set(Recipe.model_fields)
    overrides = []
    for option in options:
        key = option.split("=")[0].strip()
        # An unknown bare name counts as PPO's, so that the error suggests the nearest PPO option.
        of_ppo = key in own or ("." not in key and key not in groups)
        overrides.append(f"policy_update.{option}" if of_ppo else option)
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


def run_ppo(
    recipe: Recipe, reward: str, template: str | None = None, *, replace: bool = False
) -> Improved:
    """Train the recipe's model on a reward; the same call resumes after a kill.

    Before and after, the model answers the evaluation prompts as in the loop; the answers after
    training are saved with their rewards.

    reward: a run with an explicit reward, or any AutoModelForSequenceClassification with one label.
    template: that of a reward which was not fitted here (text with {prompt}, or chat), in place of
    its own chat template. replace: a finished run with the same name and seed that has other
    settings or another reward is replaced; without it, such a run is refused.

    Raises UserError: a mistake or fault that the user can fix.
    """
    began = time.time()
    path = artefact_folder(Path(reward), "reward")
    key = file_checksum(path)[:16] if path.exists() else str(path)
    artefact = Reward("explicit", path, f"{key}+{template or 'its own template'}")
    with open_run(recipe, replace, {"reward": artefact.key}) as (context, trackers):
        where = path if path.exists() else reward
        improved = _improve(context, artefact, where, template)
        trackers.send(context.run.metrics)
        record = improved.path.parent / RECORD
        stage = read_json(record, "the record of a finished stage", "run the command again")
        metrics = stage["metrics"]
        finish_run(
            context,
            policy=improved,
            number=1,
            reward=artefact if path.exists() else None,
            ended=metrics["ended"],
            began=began,
        )
    return Improved(improved.path, context.run.folder, metrics)


def _improve(
    context: RunContext, reward: Reward, where: str | Path, template: str | None
) -> Policy:
    """The policy after PPO on the reward model at `where`, evaluated before and after."""
    data, start = prepare(context, load_data(context.recipe))
    evaluate_policy(context, Iteration(0, start, start, None, data))
    form = run_format(context, data)
    context.models.load_rewards_with(lambda _: load_reward(where, form, context.device, template))
    reward = with_functions(reward, context.recipe.reward, data)
    extra = policy_prompts(context, data)
    demonstrations = with_prompts(data.demonstrations("reward"), extra)
    request = UpdateRequest(0, start, start, reward, demonstrations)
    improved = make_update(context.recipe, data)(context, request)
    context.models.name(improved, str(Role.policy(1)))
    evaluate_policy(context, Iteration(1, improved, start, reward, data))
    return improved


def summary_line(improved: Improved) -> str:
    """How the training ended, and how reward, KL and length changed."""
    first, last = improved.metrics["history"][0], improved.metrics["history"][-1]
    return (
        f"{improved.metrics['ended']}; reward {first['reward']:.3f} to {last['reward']:.3f}, "
        f"KL {last['kl']:.2f} nats, length {first['length']:.1f} to {last['length']:.1f}; "
        f"kept: after update {improved.metrics['kept_update']}"
    )
