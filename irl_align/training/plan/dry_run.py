"""Which stages of a recipe the store has: the loop runs on a store that is only looked at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from irl_align.config.schema import Recipe
from irl_align.training.context import RunContext
from irl_align.training.loop import bilevel
from irl_align.training.prepare import load_data
from irl_align.training.run_folder import FollowedRun
from irl_align.training.setup import run_folder
from irl_align.training.stages import LookedUpStages


def found_stages(recipe: Recipe, local: bool) -> tuple[set[str], str]:
    """Roles of the stages that the store has, and where they were looked up, in words."""
    root = Path(recipe.output_dir) / "store"
    if not root.is_dir():
        return set(), f"no store at {root}"
    if not local:
        return (
            set(),
            f"{root} was not searched: the keys of stages depend on data that is not local",
        )
    stages, searched = LookedUpStages(root, recipe.seed), f"{root} was searched"
    try:
        run = FollowedRun(run_folder(recipe))
        context = RunContext(recipe, stages, run, torch.device("cpu"))
        with unsaid():
            bilevel(context, load_data(recipe))
    except Exception as error:  # a run repairs damaged stages; libraries raise many kinds
        cause = " ".join(f"{error}".split()) or type(error).__name__
        searched = f"{root} was searched until: {cause}"
    found = {str(role) for role, each in stages.requests.items() if not each.stage.missing}
    return found, searched


@contextmanager
def unsaid() -> Iterator[None]:
    """Suppress log messages about data and stages: the run logs them when it uses them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
