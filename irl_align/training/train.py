"""Run a recipe from Python: `train(load_recipe(path, ["seed=1"]))`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from irl_align.config.recipe import load_recipe
from irl_align.config.schema import Recipe
from irl_align.policy import Reward
from irl_align.training.loop import bilevel
from irl_align.training.prepare import load_data
from irl_align.training.run_folder import Run, RunView
from irl_align.training.setup import finish_run, open_run
from irl_align.utils import distributed


@dataclass(frozen=True)
class Result:
    """What a run produced."""

    folder: Path
    """The run folder, for Run.load(folder) and `irl-align show`."""
    policy: Path
    """Folder of the final policy: a causal language model with its tokenizer."""
    reward: Path | None
    """Folder of the last explicit reward (RewardModel.from_pretrained), if there is one."""

    def view(self) -> RunView:
        """Recipe, metrics, stages and summary of the run."""
        return Run.load(self.folder)


def train(
    recipe: Recipe | str | Path,
    evaluated: Callable[[RunView], None] | None = None,
    *,
    replace: bool = False,
) -> Result:
    """Run a recipe to its end; stages that are already in the store are reused.

    After an interruption call it again: it resumes from the last stage, or from the last checkpoint
    of a stage. Processes that `accelerate launch` has started all call it, and share the work.

    evaluated: called in the first process, with the run so far, when a policy other than the last
    was evaluated. replace: a finished run with the same name and seed and other settings is
    replaced; without it, such a run is refused.

    Raises UserError: a mistake or fault that the user can fix.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    began = time.time()
    with open_run(recipe, replace) as (context, trackers):
        run = context.run

        def report(k: int) -> None:
            trackers.send(run.metrics, k)
            _report(run, k, evaluated)

        outcome = bilevel(context, load_data(recipe), report)
        trackers.send(run.metrics)
        reward = outcome.reward
        if reward is not None and reward.kind == "implicit":  # of all iterations together
            references = ((1.0, outcome.policies[0].path),)
            last = outcome.policy
            reward = Reward("implicit", last.path, last.key, reward.beta, references)
        finish_run(
            context,
            policy=outcome.policy,
            number=outcome.policies.index(outcome.policy),
            reward=reward,
            ended=outcome.ended,
            began=began,
        )
    explicit = reward is not None and reward.kind == "explicit"
    return Result(
        run.folder, outcome.policy.path, reward.path if reward is not None and explicit else None
    )


def _report(run: Run, k: int, evaluated: Callable[[RunView], None] | None) -> None:
    """Pass on the run so far, unless the run reuses the evaluation of a later policy."""
    if evaluated is None or not distributed.reports_errors():
        return
    view = Run.load(run.folder)
    if not any(record["policy"] > k for record in view.evaluations()):
        evaluated(view)
