"""The stages of a run, in order, without a run: the loop itself on a store that is only read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from irl_align.config.schema import Recipe
from irl_align.policy.roles import DATA, Role
from irl_align.training.context import RunContext
from irl_align.training.iteration import RawData
from irl_align.training.loop import bilevel
from irl_align.training.prepare import USES, recipe_card
from irl_align.training.run_folder import FollowedRun
from irl_align.training.setup import run_folder
from irl_align.training.stages import Build, LookedUpStages
from irl_align.training.store import Stage


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run asks for."""

    role: Role
    reads: tuple[Role, ...]
    """Stages that it reads, in their order."""
    found: bool
    """Whether the store has it."""


def planned_stages(recipe: Recipe, raw: RawData | None) -> tuple[list[PlannedStage], str]:
    """The stages that a run asks for, and what was looked at in the store, in words.

    raw: the data, if it is local. Without it the store is not searched: keys follow from the data.
    """
    root = Path(recipe.output_dir) / "store"
    if raw is None:
        note = f"{root} was not searched: its keys follow from data that is not local"
        note = note if root.is_dir() else f"no store at {root}"
        return _walk(recipe, unknown_data(recipe), None), note
    if not root.is_dir():
        return _walk(recipe, raw, None), f"no store at {root}"
    try:
        return _walk(recipe, raw, root), f"{root} was searched"
    except Exception as error:  # a run repairs what is damaged; libraries raise many kinds
        cause = " ".join(f"{error}".split()) or type(error).__name__
        return _walk(recipe, raw, None), f"{root} was not searched: {cause}"


def unknown_data(recipe: Recipe) -> RawData:
    """Data whose texts are not known, so that no stage of it is in a store."""
    unknown = dict.fromkeys(USES, "unknown")
    return RawData(recipe_card(recipe), {}, unknown, {}, {}, [], [], [])


class _Recorder(LookedUpStages):
    """Looks stages up, and notes which stages each one reads."""

    def __init__(self, root: Path | None, seed: int) -> None:
        super().__init__(root, seed)
        self.planned: dict[Role, PlannedStage] = {}
        self._roles: dict[str, Role] = {}
        """Key of a stage, or of data that it wrote -> role of the stage."""
        self._drawn: list[Role] = []
        """Samples that the next stage reads."""

    def stage(
        self,
        role: Role,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Build,
        *,
        main_only: bool = False,
    ) -> Stage:
        """The committed stage or a missing one."""
        stage = super().stage(role, name, settings, inputs, build, main_only=main_only)
        reads = self._inputs(inputs)
        drawn = self._drawn
        if role.kind != "samples":
            # Only training reads both samples and the policy that drew them.
            for sample in drawn if role.kind != "policy" else ():
                reads -= {read for read in self.planned[sample].reads if read != DATA}
            reads.update(drawn)
            self._drawn = drawn if role.kind == "candidate-rewards" else []
        if role.kind in ("samples", "selected", "candidate-rewards"):
            self._drawn.append(role)
        self._roles.setdefault(stage.key, role)
        if role == DATA:
            checksums = stage.metrics.get("token_checksums", {})
            self._roles |= dict.fromkeys(checksums.values(), DATA)
        order = list(self.planned)
        by_order = tuple(sorted(reads, key=order.index))
        self.planned.setdefault(role, PlannedStage(role, by_order, not stage.missing))
        return stage

    def _inputs(self, inputs: Mapping[str, str]) -> set[Role]:
        # A selecting policy's identity joins keys by "+"; "/" adds prompts to demonstrations.
        keys = [key for value in inputs.values() for key in re.split("[+/]", value)]
        roles = {self._roles[key] for key in keys if key in self._roles}
        return roles | {DATA} if "prompts" in inputs else roles


def _walk(recipe: Recipe, raw: RawData, root: Path | None) -> list[PlannedStage]:
    if root is None:  # keys are not used, so nothing that they depend on need be installed
        generation = recipe.generation.model_copy(update={"backend": "transformers"})
        model = recipe.model.model_copy(update={"quantization": None})
        recipe = recipe.model_copy(update={"generation": generation, "model": model})
    stages = _Recorder(root, recipe.seed)
    run = FollowedRun(run_folder(recipe))  # writes nothing
    with quiet():
        bilevel(RunContext(recipe, stages, run, torch.device("cpu")), raw)
    return list(stages.planned.values())


@contextmanager
def quiet() -> Iterator[None]:
    """A block without progress bars, and without warnings, which the run itself logs."""
    before, hidden = logging.root.manager.disable, are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(before)
        if not hidden:
            enable_progress_bars()
