"""Gold, reward and BLEU of PPO's rollouts at the same KL, by method over seeds.

Policies that went further from pi_0 had more to gain, so trainings are compared where they are
equally far. A rollout's gold scatters; all of a training's updates smooth it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np

from irl_align.evaluation.compare.overoptimization import FEWEST, LEAST_KL, gain_features
from irl_align.evaluation.compare.rollouts import judged_updates
from irl_align.training.run_folder import RunView
from irl_align.utils.statistics import Method, estimate


def smoothed_at(kls: Sequence[float], values: Sequence[float], kl: float) -> float | None:
    """The value at a KL of a + d (alpha - beta log d), d = sqrt KL, fitted by least squares: the
    form of Gao et al. 2023 (section 1) with the start's value fitted too, which one rollout tells
    badly.

    kls, values: (U,) of the updates; a k1 estimate may be below 0, where no KL is. None where no
    updates lie on both sides of kl, and for fewer than FEWEST + 1 of them.
    """
    if len(kls) <= FEWEST or not min(kls) <= kl <= max(kls):
        return None
    features, at = (
        np.insert(gain_features("rl", np.maximum(np.asarray(found, np.float64), LEAST_KL)), 0, 1, 1)
        for found in (kls, [kl])
    )
    fitted, *_ = np.linalg.lstsq(features, np.asarray(values, np.float64), rcond=None)
    return float(at[0] @ fitted)


def levels_at_kl(
    views: Sequence[RunView], kls: Sequence[float], headline: str | None, method: Method = "t"
) -> list[dict[str, Any]]:
    """Of every method's PPO trainings and every KL: gold and reward of the rollouts there, and BLEU
    where the task's gold gives it.

    headline: the gold metric, judged on the rollouts. A seed that does not come so far is null in
    `seeds`, and not in the means.
    """
    if headline is None:
        return []
    found: dict[tuple[str, str, float], dict[str, Any]] = {}
    for view in views:
        for role, records in judged_updates(view, f"gold_{headline}"):
            name, seed = view.recipe["name"], str(view.recipe["seed"])
            for kl in kls:
                one = found.setdefault(
                    (name, role, kl),
                    {"method": name, "role": role, "metric": headline, "kl": kl, "seeds": {}},
                )
                one["seeds"][seed] = _levels(records, f"gold_{headline}", kl)
    for one in found.values():
        reached = [levels for levels in one["seeds"].values() if levels is not None]
        for which in ("gold", "reward", "bleu"):
            values = [levels[which] for levels in reached if which in levels]
            one[which] = asdict(estimate(values, method)) if values else None
    return list(found.values())


def _levels(records: Sequence[Mapping[str, Any]], gold: str, kl: float) -> dict[str, float] | None:
    """Gold, reward and BLEU of a training's rollouts at a KL; None where gold or reward are not
    known there. Updates without a number do not count."""
    levels = {
        which: _level(records, field, kl)
        for which, field in (("gold", gold), ("reward", "reward"), ("bleu", "gold_bleu"))
    }
    if levels["gold"] is None or levels["reward"] is None:
        return None
    return {which: level for which, level in levels.items() if level is not None}


def _level(records: Sequence[Mapping[str, Any]], field: str, kl: float) -> float | None:
    rows: list[list[Any]] = [[record.get("kl"), record.get(field)] for record in records]
    known = [row for row in rows if all(isinstance(x, int | float) and isfinite(x) for x in row)]
    return smoothed_at([row[0] for row in known], [row[1] for row in known], kl)
