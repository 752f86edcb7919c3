"""How the stages of a run are obtained: built, or only looked up.

The loop asks for every stage here, so the same loop trains, or shows what a run would do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from irl_align.errors import TryAgain
from irl_align.policy.roles import Role, stage_record_key
from irl_align.training.run_folder import Run
from irl_align.training.store import RECORD, Stage, Store, stage_key
from irl_align.utils import distributed
from irl_align.utils.files import read_json

logger = logging.getLogger(__name__)
Build = Callable[[Path], Mapping[str, Any] | None]
_COSTS = ("seconds", "peak_rss_mib", "peak_cuda_mib", "resumed")
_TOKENS = ("tokens_trained", "tokens_sampled")


class Stages(Protocol):
    """A source of stages."""

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
        """The stage with these settings and inputs; see ``Store.stage``.

        main_only: of several processes only the main one builds, and the others wait.
        """


class BuiltStages:
    """Builds the stages that the store does not have, and logs every stage in the run.

    The recipe's seed is part of the settings. In a run of several processes all build, and only
    the main one writes.
    """

    def __init__(self, store: Store, run: Run, seed: int) -> None:
        self.store, self.run, self.seed = store, run, seed

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
        """Return the committed stage; it is built if the store has none."""

        def announced(work: Path) -> Mapping[str, Any] | None:
            logger.info("%s", role)
            return build(work)

        def ask(shared: Build) -> Stage:
            return self.store.stage(name, {"seed": self.seed, **settings}, inputs, shared)

        stage = _shared_stage(ask, announced, main_only)
        if stage.reused:
            logger.info("%s: reused", role)
        self.run.link(role, stage)
        costs = {cost: stage.record[cost] for cost in _COSTS if cost in stage.record}
        tokens = {count: stage.metrics[count] for count in _TOKENS if count in stage.metrics}
        record = {"stage": stage.name, "stage_key": stage.key, "reused": stage.reused}
        self.run.log(stage_record_key(role), {**record, **costs, **tokens})
        return stage


@dataclass(frozen=True)
class Request:
    """A stage that the loop asked for."""

    role: Role
    inputs: Mapping[str, str]
    """Name -> key of another stage, or a checksum."""
    stage: Stage
    """The committed stage, or one that is ``missing``."""


class LookedUpStages:
    """Builds nothing: a stage that the store does not have is ``missing`` and has no metrics.

    ``requests`` holds every stage that was asked for, in order, each role once.
    """

    def __init__(self, root: Path | None, seed: int) -> None:
        """root: the store's folder; None looks nowhere, so that every stage is missing."""
        self.root, self.seed = root, seed
        self.requests: dict[Role, Request] = {}

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
        """Return the committed stage or a missing one.

        Raises UserError: the record of a committed stage is damaged.
        """
        key = stage_key(name, {"seed": self.seed, **settings}, inputs)
        folder = (self.root or Path("no-store")) / f"{name}-{key}"
        stage = Stage(name, key, folder, {}, {}, reused=False, missing=True)
        if self.root is not None and folder.is_dir():
            record = read_json(folder / RECORD, "the record of a finished stage", "run the recipe")
            stage = Stage(name, key, folder, record["metrics"], record, reused=True)
        self.requests.setdefault(role, Request(role, inputs, stage))
        return stage


def _shared_stage(ask: Callable[[Build], Stage], build: Build, main_only: bool) -> Stage:
    """The stage that `ask` gives or has built, in every process; only the main one asks."""
    if distributed.count() == 1:
        return ask(build)
    if distributed.is_main():

        def led(work: Path) -> Mapping[str, Any] | None:
            if main_only:
                with distributed.alone():
                    return build(work)
            distributed.broadcast(work)
            metrics = build(work)
            distributed.barrier()  # all processes have written their files
            return metrics

        return distributed.broadcast(ask(led))
    while isinstance(message := distributed.broadcast(None), Path):
        with suppress(TryAgain):  # all processes raise it; the next message starts the next try
            build(message)
            distributed.barrier()
    assert isinstance(message, Stage)
    return message
