"""Run a recipe from Python: `train(load_recipe(path, ["seed=1"]))`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from irl_align import ranks
from irl_align.cards import import_object, load_card
from irl_align.config import Recipe
from irl_align.data import check_source
from irl_align.errors import UserError
from irl_align.lab import Lab, open_run
from irl_align.loop import bilevel
from irl_align.models import pick_device
from irl_align.recipe import load_recipe
from irl_align.stages import Run, RunView, Store, environment


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


def train(recipe: Recipe | str | Path) -> Result:
    """Run a recipe to its end; what is already in the store is reused.

    Raises UserError for what the user can mend. After an interruption call it again: it goes on
    from the last stage, or from the last checkpoint within it. In processes that `accelerate
    launch` has started, each calls it, and they share the work.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    check_trackers(recipe)
    check_data(recipe)
    device = ranks.own_device(pick_device(recipe.device))
    output = Path(recipe.output_dir)
    began = time.time()
    with ranks.joined(device), open_run(recipe) as run:
        run.log("environment", {**environment(), "device": str(device), "seed": recipe.seed})
        lab = Lab(recipe, Store(output / "store"), run, device)
        try:
            outcome = bilevel(lab)
        finally:
            lab.close()
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


def check_trackers(recipe: Recipe) -> None:
    """Raise UserError where a tracker of report_to is not installed, before any work is done."""
    for tracker in recipe.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                f"recipe: report_to: {tracker} is not installed; install irl-align[tracking], or "
                "leave it out"
            )
