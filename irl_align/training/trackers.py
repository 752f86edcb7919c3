"""The loop's own numbers in the trackers of `report_to`; trainers send their losses themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from irl_align.config.schema import Recipe
from irl_align.policy.roles import Role
from irl_align.training.run_folder import Run
from irl_align.utils import distributed

PROJECT = "irl-align"
"""Project of wandb and trackio, and the folder of tensorboard's events in RUN/tensorboard."""
# Kinds of records at step k: about pi_k, and about the reward that pi_k was trained on.
_OF_POLICY = ("vitals", "evaluation", "matched-entropy")
_OF_REWARD = ("pairs", "reward-fit", "reward")
_WITHOUT = {"policy", "temperature", "steps"}  # these name the record or count the trainer's steps


class LoopTrackers:
    """One tracker run per training run: KL, entropy, gold, pairs and reward by policy number.

    The tracker run is opened at the first numbers, separately from those of the trainers. A resumed
    run sends all its numbers again.
    """

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self._recipe, self._run = recipe, run
        self._open: list[GeneralTracker] = []
        self._sent = -1  # the last policy whose numbers were sent

    def send(self, metrics: Sequence[Mapping[str, Any]], last: int | None = None) -> None:
        """Send the numbers of every new policy up to `last` in these records of metrics.jsonl."""
        if not self._recipe.report_to or not distributed.is_main():
            return
        steps = by_policy(metrics)
        new = [s for s in sorted(steps) if s > self._sent and (last is None or s <= last)]
        if not new:
            return
        # Accelerate's trackers need it, and no trainer made it if all stages were reused.
        PartialState()
        if not self._open:
            self._open = [self._start(name) for name in self._recipe.report_to]
        for step in new:
            for tracker in self._open:
                _send(tracker, steps[step], step)
        self._sent = max([self._sent, *new])

    def finish(self) -> None:
        """Close the open trackers."""
        for tracker in self._open:
            tracker.finish()
        self._open = []

    def _start(self, name: str) -> GeneralTracker:
        tracker: GeneralTracker
        if name == "tensorboard":
            folder = self._run.folder / "tensorboard"
            shutil.rmtree(folder / PROJECT, ignore_errors=True)  # of an interrupted run
            tracker = TensorBoardTracker(PROJECT, folder)
        else:
            named = f"{self._recipe.name}-seed{self._recipe.seed}"
            options: dict[str, Any] = {"name": named, "config": {"seed": self._recipe.seed}}
            if name == "wandb":
                options["reinit"] = "create_new"  # the trainers' run stays theirs
                tracker = WandBTracker(PROJECT, **options)
            else:
                tracker = TrackioTracker(PROJECT, **options)
        tracker.start()
        return tracker


def by_policy(metrics: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Policy number -> name -> number; names such as vitals/kl or evaluation/t1/metrics/bleu.

    Pairs and reward of iteration k are listed under k + 1, the policy that is trained on them.
    """
    steps: dict[int, dict[str, float]] = {}
    for record in metrics:
        role = Role.parse(record["key"])
        if role.kind not in _OF_POLICY + _OF_REWARD or role.number is None:
            continue
        values = {name: value for name, value in record.items() if name not in _WITHOUT}
        numbers = dict(_numbers(values, str(replace(role, number=None))))
        if numbers:
            steps.setdefault(role.number + (role.kind in _OF_REWARD), {}).update(numbers)
    return steps


def _send(tracker: GeneralTracker, values: dict[str, float], step: int) -> None:
    if tracker.name == "trackio":  # by its own run: Accelerate's tracker drops the step up to 1.13
        tracker.tracker.log(values, step=step)
    else:
        tracker.log(values, step=step)


def _numbers(values: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name}/{key}", value
