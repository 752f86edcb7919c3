"""Which stages of a recipe the store has: its loop gone through without building anything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

from irl_align.config.schema import Recipe
from irl_align.policy import Reward
from irl_align.policy.roles import Role
from irl_align.training.context import RunContext
from irl_align.training.evaluation import evaluate_policy, measure_policy, measure_reward
from irl_align.training.pair_step import IterationPairs, make_pairs
from irl_align.training.policy_step import improve_policy
from irl_align.training.prepare import prepare, supervise
from irl_align.training.reward_step import fit_reward_level
from irl_align.training.run_folder import Run
from irl_align.training.store import RECORD, Stage, Store, stage_key
from irl_align.utils.files import read_json


class _Missing(Exception):
    """The store does not have a stage."""


class _FindingStore(Store):
    """A store that builds nothing."""

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], Mapping[str, Any] | None],
    ) -> Stage:
        """The committed stage; raises _Missing where there is none."""
        key = stage_key(name, settings, inputs)
        folder = self.root / f"{name}-{key}"
        if not folder.is_dir():
            raise _Missing(name)
        record = read_json(folder / RECORD, "the record of a finished stage", "run the recipe")
        return Stage(name, key, folder, record["metrics"], record, reused=True)


class _Notes:
    """In place of a run folder: the roles of the stages that were found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: set[str] = set()

    def link(self, role: Role, stage: Stage) -> None:
        """Note a stage."""
        self.found.add(str(role))

    def log(self, key: str, record: Mapping[str, Any]) -> None:
        """Nothing is written."""

    def save_samples(self, name: str, rows: Any) -> None:
        """Nothing is written."""


def found_stages(recipe: Recipe, local: bool) -> tuple[set[str], str]:
    """Roles of the stages that the store has, and what was looked at, in words.

    Training stages are looked for until the first that is missing, since the names of later ones
    follow from it; what is measured, each by itself.
    """
    root = Path(recipe.output_dir) / "store"
    if not root.is_dir():
        return set(), f"no store at {root}"
    if not local:
        return set(), f"{root} was not searched: what it holds follows from data that is not local"
    notes = _Notes(root.parent / f"{recipe.name}-seed{recipe.seed}")
    try:
        context = RunContext(recipe, _FindingStore(root), cast(Run, notes), torch.device("cpu"))
        with suppress(_Missing), unsaid():
            _walk(context)
    except Exception as error:  # what is damaged is mended by a run; libraries raise many kinds
        cause = " ".join(f"{error}".split()) or type(error).__name__
        return notes.found, f"{root} was searched until: {cause}"
    return notes.found, f"{root} was searched"


@contextmanager
def unsaid() -> Iterator[None]:
    """Nothing is said of data and stages gone through: the run says it when it uses them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _walk(context: RunContext) -> None:
    """As irl_align.training.loop.bilevel, to the last iteration, whatever the signs say."""
    recipe = context.recipe
    data, start = prepare(context)
    initial = policy = supervise(context, start, data)
    pairs = list[IterationPairs]()
    reward: Reward | None = None
    with suppress(_Missing):
        measure_policy(context, 0, initial, initial, None, data)
    with suppress(_Missing):
        evaluate_policy(context, 0, initial, initial, None, data)
    for k in range(recipe.loop.iterations):
        if recipe.reward.kind != "none":
            pairs.append(make_pairs(context, k, policy, initial, start, data))
            before = reward
            reward = fit_reward_level(context, k, policy, initial, before, pairs, data)
            with suppress(_Missing):
                measure_reward(context, k, reward, before, initial, pairs)
        policy = improve_policy(context, k, policy, initial, reward, data)
        with suppress(_Missing):
            measure_policy(context, k + 1, policy, initial, reward, data)
        with suppress(_Missing):
            evaluate_policy(context, k + 1, policy, initial, reward, data)
