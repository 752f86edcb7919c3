"""The set-up that `train` and `ppo` share: checks, device, run folder, context and trackers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import trl

from irl_align.config.recipe import to_dict, to_yaml
from irl_align.config.schema import Recipe
from irl_align.config.trl_args import trl_config
from irl_align.data.cards import import_object, load_card
from irl_align.data.loading import check_source
from irl_align.errors import UserError
from irl_align.models.loading import pick_device
from irl_align.models.trl import Training
from irl_align.models.trl_options import check_args, training_args
from irl_align.policy import Policy, Reward
from irl_align.reward.composed import load_functions
from irl_align.training.context import RunContext
from irl_align.training.run_folder import FollowedRun, Run
from irl_align.training.stages import BuiltStages
from irl_align.training.store import Store
from irl_align.training.trackers import LoopTrackers
from irl_align.utils import distributed
from irl_align.utils.files import require_writable_folder
from irl_align.utils.hardware import environment

logger = logging.getLogger(__name__)


def run_folder(recipe: Recipe) -> Path:
    """The run folder of a recipe."""
    return Path(recipe.output_dir) / f"{recipe.name}-seed{recipe.seed}"


@contextmanager
def open_run(
    recipe: Recipe, replace: bool = False, inputs: Mapping[str, str] | None = None
) -> Iterator[tuple[RunContext, LoopTrackers]]:
    """Check a recipe and open its run, whose stages are built; close what it started at the end.

    replace, inputs: see ``Run.open``. Raises UserError: the recipe cannot be run here, a finished
    run of other settings is in its folder, or another process has the run.
    """
    output = Path(recipe.output_dir)
    for folder in (output, output / "store", run_folder(recipe)):
        require_writable_folder(folder, "output_dir")
    check_trackers(recipe)
    check_data(recipe)
    for contradiction in recipe.contradictions():
        logger.warning("%s", contradiction)
    device = distributed.own_device(pick_device(recipe.device))
    check_trainers(recipe, device)
    with distributed.joined(device), _open_folder(recipe, replace, inputs) as run:
        run.log("environment", {**environment(), "device": str(device), "seed": recipe.seed})
        store = Store(Path(recipe.output_dir) / "store")
        context = RunContext(recipe, BuiltStages(store, run, recipe.seed), run, device)
        trackers = LoopTrackers(recipe, run)
        try:
            yield context, trackers
        finally:
            context.close()
            trackers.finish()


@contextmanager
def _open_folder(recipe: Recipe, replace: bool, inputs: Mapping[str, str] | None) -> Iterator[Run]:
    """The run folder of a recipe; of several processes only the main one holds and writes it."""
    folder = run_folder(recipe)
    if not distributed.is_main():
        yield FollowedRun(folder)
        return
    with Run.open(folder, to_dict(recipe), to_yaml(recipe), replace, inputs) as run:
        yield run


def finish_run(
    context: RunContext,
    *,
    policy: Policy,
    number: int,
    reward: Reward | None,
    ended: str,
    began: float,
) -> None:
    """Write the summary of a run: its final policy and its number, its reward, why it ended.

    `reward` is the folder of an explicit reward, and `log_ratio` has the models of another one.
    began: ``time.time()`` at the start.
    """
    output, ranking = Path(context.recipe.output_dir), policy.ranking
    explicit = reward is not None and reward.kind == "explicit"
    summary: dict[str, Any] = {
        "policy": os.path.relpath(policy.path, output),
        "reward": os.path.relpath(reward.path, output) if reward and explicit else None,
        "log_ratio": None,
        "policy_number": number,
        "ranking": None,
        "ended": ended,
        "seconds": round(time.time() - began, 1),
    }
    if reward is not None and reward.kind in ("implicit", "log_ratio"):
        models = [(weight, os.path.relpath(path, output)) for weight, path in reward.references]
        names = ("beta", "endogenous", "mean")
        summary["log_ratio"] = {
            "numerator": os.path.relpath(reward.path, output),
            "references": models,
            **{name: getattr(reward, name) for name in names},
        }
    if ranking is not None:
        names = ("n", "score", "temperature")
        summary["ranking"] = {name: getattr(ranking, name) for name in names}
    context.run.finish(summary)


def check_trackers(recipe: Recipe) -> None:
    """Raise UserError if a tracker of report_to is not installed."""
    for tracker in recipe.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                f"recipe: report_to: {tracker} is not installed; install irl-align[tracking], or "
                "leave it out"
            )


def check_data(recipe: Recipe) -> None:
    """Raise UserError if card, files, edit or functions cannot be what the recipe asks for."""
    data, card = recipe.data, load_card(recipe.data.card)
    check_source(card, "train", data.path, data.task)
    if data.edit is not None and not callable(import_object(data.edit, "data.edit")):
        raise UserError(
            f"data.edit: found {data.edit}, expected a function of a prompt and a Random"
        )
    load_functions(recipe.reward.named_functions)
    if recipe.evaluation.match_entropy and card.gold is None:
        raise UserError(
            f"evaluation.match_entropy: it compares gold metrics, and card {card.name} names none"
        )


def check_trainers(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError if options of TRL contradict each other."""
    values = to_dict(recipe)
    groups = ("sft", "reward", "policy_update") if recipe.loop.iterations else ("sft",)
    for group in groups:
        config, options = trl_config(values, group), values[group]
        if config is None or options.get("enabled") is False:
            continue
        first = {name: each[0] for name, each in options.get("schedule", {}).items()}
        training = Training(Path(recipe.output_dir), recipe.seed, device)
        try:
            merged = {**options.get("args", {}), **first}
            check_args(training_args(getattr(trl, config), merged, training))
        except UserError as error:
            raise UserError(f"{group}: {error}") from error
