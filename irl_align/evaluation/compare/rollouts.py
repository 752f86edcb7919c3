"""How soon PPO's rollouts reach a level of gold: its updates and samples, by method over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from irl_align.training.run_folder import RunView

WINDOW = 5
"""Gold of a rollout scatters, so a level is reached by the mean of so many updates."""


def first_reaching(
    golds: Sequence[float], level: float, lower_is_better: bool, window: int = WINDOW
) -> int | None:
    """Number, from 1, of the first update with which the last `window` ones reach a level of gold
    in the mean; None where none does."""
    sign = -1.0 if lower_is_better else 1.0
    for end in range(window, len(golds) + 1):
        if sign * (sum(golds[end - window : end]) / window - level) >= 0.0:
            return end
    return None


def learning_speeds(
    views: Sequence[RunView],
    levels: Sequence[float],
    headline: str | None,
    lower_is_better: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """Of every method's PPO trainings and every level: the updates and samples until it is reached.

    headline: the gold metric, judged on the rollouts. A seed that does not reach it is null.
    """
    if headline is None:
        return []
    lower = lower_is_better.get(f"{headline}@1", False)
    found: dict[tuple[str, str, float], dict[str, Any]] = {}
    for view in views:
        for role, records in judged_updates(view, f"gold_{headline}"):
            golds = [record[f"gold_{headline}"] for record in records]
            for level in levels:
                speed = found.setdefault(
                    (view.recipe["name"], role, level),
                    {"method": view.recipe["name"], "role": role, "metric": headline}
                    | {"level": level, "updates": {}, "samples": {}},
                )
                at, seed = first_reaching(golds, level, lower), str(view.recipe["seed"])
                record = {} if at is None else records[at - 1]
                speed["updates"][seed] = record.get("update")
                speed["samples"][seed] = record.get("episodes_done")
    return list(found.values())


def judged_updates(view: RunView, field: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Role and updates of each PPO training whose rollouts were judged."""
    for role, records in view.ppo_records().items():
        judged = [r for r in records if isinstance(r.get(field), int | float)]
        if judged:
            yield role, judged
