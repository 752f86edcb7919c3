"""Run a recipe from Python: `train(load_recipe(path, ["seed=1"]))`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import trl

from irl_align.config.recipe import load_recipe, to_dict
from irl_align.config.schema import Recipe
from irl_align.config.trl_args import trl_config
from irl_align.data.cards import import_object, load_card
from irl_align.data.loading import check_source
from irl_align.errors import UserError
from irl_align.models.loading import pick_device
from irl_align.models.trl import Training, training_args
from irl_align.training.context import RunContext, open_run
from irl_align.training.loop import bilevel
from irl_align.training.run_folder import Run, RunView
from irl_align.training.store import Store, environment
from irl_align.training.trackers import LoopTrackers
from irl_align.utils import distributed


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    folder: Path
    """The run folder; Run.load(folder) and `irl-align show` read it."""
    policy: Path
    """Folder of the final policy: a causal language model with its tokenizer."""
    reward: Path | None
    """Folder of the last explicit reward (RewardModel.from_pretrained), if there is one."""

    def view(self) -> RunView:
        """Recipe, metrics, stages and summary of the run."""
        return Run.load(self.folder)


def train(
    recipe: Recipe | str | Path, evaluated: Callable[[RunView], None] | None = None
) -> Result:
    """Run a recipe to its end; what is already in the store is reused.

    Raises UserError for what the user can mend. After an interruption call it again: it goes on
    from the last stage, or from the last checkpoint within it. In processes that `accelerate
    launch` has started, each calls it, and they share the work.

    evaluated: called with the run so far when a policy was evaluated that is not the last, in the
    first process alone.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_trackers(recipe)
    check_data(recipe)
    device = distributed.own_device(pick_device(recipe.device))
    check_trainers(recipe, device)
    output = Path(recipe.output_dir)
    began = time.time()
    with distributed.joined(device), open_run(recipe) as run:
        run.log("environment", {**environment(), "device": str(device), "seed": recipe.seed})
        context = RunContext(recipe, Store(output / "store"), run, device)
        trackers = LoopTrackers(recipe, run)

        def so_far(k: int) -> None:
            trackers.tell(run.metrics, k)
            _tell(run, k, evaluated)

        try:
            outcome = bilevel(context, so_far)
            trackers.tell(run.metrics)
        finally:
            context.close()
            trackers.finish()
        explicit = outcome.reward is not None and outcome.reward.kind == "explicit"
        reward = outcome.reward.path if outcome.reward is not None and explicit else None
        result = Result(run.folder, outcome.policy.path, reward)
        ranking = outcome.policy.ranking
        run.finish(
            {
                "policy": os.path.relpath(result.policy, output),
                "reward": os.path.relpath(reward, output) if reward else None,
                "policy_number": outcome.policies.index(outcome.policy)
                if outcome.policy in outcome.policies
                else len(outcome.policies) - 1,
                "ranking": None
                if ranking is None
                else {"n": ranking.n, "score": ranking.score, "temperature": ranking.temperature},
                "ended": outcome.ended,
                "seconds": round(time.time() - began, 1),
            }
        )
    return result


def _tell(run: Run, k: int, evaluated: Callable[[RunView], None] | None) -> None:
    """Hand over the run so far; of one that is run again only what is new."""
    if evaluated is None or not distributed.reports_errors():
        return
    view = Run.load(run.folder)
    if not any(record["policy"] > k for record in view.evaluations()):
        evaluated(view)


def check_data(recipe: Recipe) -> None:
    """Raise UserError where the card, the files or the edit cannot be what the recipe asks for."""
    data, card = recipe.data, load_card(recipe.data.card)
    check_source(card, "train", data.path, data.task)
    if data.edit is not None and not callable(import_object(data.edit, "data.edit")):
        raise UserError(
            f"data.edit: found {data.edit}, expected a function of a prompt and a Random"
        )
    if recipe.evaluation.match_entropy and card.gold is None:
        raise UserError(
            f"evaluation.match_entropy: it compares gold, and card {card.name} names no gold"
        )


def check_trainers(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError for options of TRL's that contradict each other, before any work."""
    values = to_dict(recipe)
    groups = ("sft", "reward", "policy_update") if recipe.loop.iterations else ("sft",)
    for group in groups:
        config, options = trl_config(values, group), values[group]
        if config is None or options.get("enabled") is False:
            continue
        first = {name: each[0] for name, each in options.get("schedule", {}).items()}
        training = Training(Path(recipe.output_dir), recipe.seed, device)
        try:
            training_args(getattr(trl, config), {**options.get("args", {}), **first}, training)
        except UserError as error:
            raise UserError(f"{group}: {error}") from error


def check_trackers(recipe: Recipe) -> None:
    """Raise UserError where a tracker of report_to is not installed, before any work is done."""
    for tracker in recipe.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                f"recipe: report_to: {tracker} is not installed; install irl-align[tracking], or "
                "leave it out"
            )
