"""PPO's rollouts compared by method over seeds: how soon they reach a level of gold, and what they
reach at the same KL.

Policies that moved further from pi_0 had more to gain, so trainings are also compared at equal KL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np

from irl_align.evaluation.compare.overoptimization import FEWEST, LEAST_KL, gain_features
from irl_align.training.run_folder import RunView
from irl_align.utils.statistics import Method, estimate

WINDOW = 5
"""Number of updates whose mean gold must reach a level, since the gold of one rollout is noisy."""


def first_reaching(
    golds: Sequence[float], level: float, lower_is_better: bool, window: int = WINDOW
) -> int | None:
    """Number, from 1, of the first update at which the mean gold of the last `window` updates
    reaches a level; None if no update does."""
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
    """Updates and samples until a level is reached, for every method's PPO training and level.

    headline: the gold metric, measured on the rollouts. A seed that never reaches a level is null.
    """
    lower = lower_is_better.get(f"{headline}@1", False)
    speeds: dict[tuple[str, str, float], dict[str, Any]] = {}
    for name, role, seed, records in _trainings(views, headline):
        golds = [record[f"gold_{headline}"] for record in records]
        for level in levels:
            speed = speeds.setdefault(
                (name, role, level),
                {"method": name, "role": role, "metric": headline}
                | {"level": level, "updates": {}, "samples": {}},
            )
            at = first_reaching(golds, level, lower)
            record = {} if at is None else records[at - 1]
            speed["updates"][seed] = record.get("update")
            speed["samples"][seed] = record.get("episodes_done")
    return list(speeds.values())


def levels_at_kl(
    views: Sequence[RunView], kls: Sequence[float], headline: str | None, method: Method = "t"
) -> list[dict[str, Any]]:
    """Gold, reward and (if measured) BLEU of the rollouts, for every method's PPO training and KL.

    headline: the gold metric, measured on the rollouts. A seed that does not reach the KL is null
    in `seeds` and not part of the means.
    """
    levels: dict[tuple[str, str, float], dict[str, Any]] = {}
    for name, role, seed, records in _trainings(views, headline):
        for kl in kls:
            level = levels.setdefault(
                (name, role, kl),
                {"method": name, "role": role, "metric": headline, "kl": kl, "seeds": {}},
            )
            level["seeds"][seed] = _level(records, f"gold_{headline}", kl)
    for level in levels.values():
        reached = [values for values in level["seeds"].values() if values is not None]
        for which in ("gold", "reward", "bleu"):
            known = [values[which] for values in reached if which in values]
            level[which] = asdict(estimate(known, method)) if known else None
    return list(levels.values())


def _trainings(
    views: Sequence[RunView], headline: str | None
) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """(method, role, seed, updates with gold) of each PPO training whose rollouts have gold."""
    for view in views:
        for role, records in view.ppo_records().items():
            judged = [r for r in records if isinstance(r.get(f"gold_{headline}"), int | float)]
            if judged:
                yield view.recipe["name"], role, str(view.recipe["seed"]), judged


def smoothed_at(kls: Sequence[float], values: Sequence[float], kl: float) -> float | None:
    """The value at a KL of a + d (alpha - beta log d), d = sqrt KL, fitted by least squares.

    This is the form of Gao et al. 2023 (section 1) with a fitted start value a, since one rollout
    measures the start poorly. kls, values: (U,) of the updates; a k1 estimate of the KL may be
    below 0. None unless there are updates on both sides of kl, and more than FEWEST of them.
    """
    if len(kls) <= FEWEST or not min(kls) <= kl <= max(kls):
        return None
    features, at = (
        np.insert(gain_features("rl", np.maximum(np.asarray(own, np.float64), LEAST_KL)), 0, 1, 1)
        for own in (kls, [kl])
    )
    fitted, *_ = np.linalg.lstsq(features, np.asarray(values, np.float64), rcond=None)
    return float(at[0] @ fitted)


def _level(records: Sequence[Mapping[str, Any]], gold: str, kl: float) -> dict[str, float] | None:
    """Gold, reward and BLEU of a training's rollouts at a KL; None unless gold and reward are known
    there. Updates without a number are left out."""
    level = {}
    for which, field in (("gold", gold), ("reward", "reward"), ("bleu", "gold_bleu")):
        rows: list[tuple[Any, Any]] = [(r.get("kl"), r.get(field)) for r in records]
        known = [
            row for row in rows if all(isinstance(x, int | float) and isfinite(x) for x in row)
        ]
        value = smoothed_at([x for x, _ in known], [y for _, y in known], kl)
        if value is not None:
            level[which] = value
    return level if {"gold", "reward"} <= level.keys() else None
