"""Gain against KL: the forms of Gao et al. 2023 (arXiv:2210.10760) fitted, and overoptimisation.

With d = sqrt(KL(pi || pi_0)), the gain over pi_0 is d (alpha - beta d) for best-of-n and
d (alpha - beta log d) for reinforcement learning (their section 1). Reads run folders, no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from irl_align.evaluation.compare.aggregate import policy_measures
from irl_align.training.run_folder import RunView

Form = Literal["best_of_n", "rl"]
FEWEST = 4  # points that a curve of two numbers is fitted to
LEAST_KL = 1e-6


@dataclass(frozen=True)
class Fit:
    """A form's two numbers, and how well they fit."""

    form: Form
    alpha: float
    beta: float
    rmse: float
    peak_kl: float | None
    """KL at which the curve is highest; None where it only rises, or only falls."""

    def at(self, kl: float) -> float:
        """The curve's gain at a KL."""
        return float(gain_features(self.form, np.array([kl]))[0] @ [self.alpha, self.beta])


def fit_gain(form: Form, kls: Sequence[float], gains: Sequence[float]) -> Fit | None:
    """Least squares, which is exact: both forms are linear in alpha and beta.

    gains: over pi_0, higher is better. None for fewer than FEWEST points with a KL above 0, or when
    these are all at one KL.
    """
    from scipy.linalg import lstsq

    kl, gain = np.asarray(kls, np.float64), np.asarray(gains, np.float64)
    used = kl > LEAST_KL
    kl, gain = kl[used], gain[used]
    if len(kl) < FEWEST or np.ptp(kl) < LEAST_KL:
        return None
    features = gain_features(form, kl)
    (alpha, beta), *_ = lstsq(features, gain)
    rmse = float(np.sqrt(np.mean((features @ [alpha, beta] - gain) ** 2)))
    return Fit(form, float(alpha), float(beta), rmse, _peak(form, float(alpha), float(beta)))


def gain_features(form: Form, kl: np.ndarray) -> np.ndarray:
    """(N, 2): what alpha and beta are multiplied with. kl: (N,), above 0."""
    d = np.sqrt(kl)
    return np.stack([d, -d * d if form == "best_of_n" else -d * np.log(d)], 1)


def _peak(form: Form, alpha: float, beta: float) -> float | None:
    """The KL where the derivative is 0: d = alpha / 2 beta, or d = exp(alpha / beta - 1)."""
    if beta <= 0.0 or (form == "best_of_n" and alpha <= 0.0):
        return None
    if form == "best_of_n":
        return (alpha / (2.0 * beta)) ** 2
    exponent = 2.0 * (alpha / beta - 1.0)
    return math.exp(exponent) if exponent < 700.0 else None


def overoptimised(gold: Fit | None, proxy: Fit | None, largest_kl: float) -> bool:
    """Whether gold falls, by more than its points scatter, where the proxy still rises."""
    if gold is None or proxy is None or gold.peak_kl is None or gold.peak_kl >= largest_kl:
        return False
    fall = gold.at(gold.peak_kl) - gold.at(largest_kl)
    return fall > gold.rmse and proxy.at(largest_kl) > proxy.at(gold.peak_kl)


@dataclass(frozen=True)
class Place:
    """A policy on a frontier: its KL to pi_0, and its gains over pi_0 where they are known."""

    kl: float
    gold: float | None
    proxy: float | None
    note: str = ""


@dataclass(frozen=True)
class Frontier:
    """Policies that lie on one curve, by KL."""

    name: str
    form: Form
    places: list[Place]

    def summary(self) -> dict[str, Any]:
        """Places, fits and whether it is overoptimised, as plain data."""
        gold, proxy = (self._fit(which) for which in ("gold", "proxy"))
        largest = max((place.kl for place in self.places), default=0.0)
        return {
            "name": self.name,
            "places": [asdict(place) for place in self.places],
            "gold": asdict(gold) if gold else None,
            "proxy": asdict(proxy) if proxy else None,
            "overoptimised": overoptimised(gold, proxy, largest),
        }

    def _fit(self, which: str) -> Fit | None:
        known = [(p.kl, g) for p in self.places if (g := getattr(p, which)) is not None]
        return fit_gain(self.form, [kl for kl, _ in known], [gain for _, gain in known])


def frontiers(
    views: Sequence[RunView],
    sweeps: Mapping[str, Mapping[str, Any]],
    headline: str | None,
    lower_is_better: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """Of every swept recipe, over its values and seeds; and of every PPO training, over updates.

    sweeps: method -> {family, value}. headline: the gold metric.
    """
    if headline is None:
        return []
    sign = -1.0 if lower_is_better.get(f"{headline}@1") else 1.0
    families = list(dict.fromkeys(sweep["family"] for sweep in sweeps.values()))
    found = [_swept(views, sweeps, family, headline, sign) for family in families]
    found += [one for view in views for one in _trainings(view, headline, sign)]
    return [one.summary() for one in found if one.places]


def _swept(
    views: Sequence[RunView],
    sweeps: Mapping[str, Mapping[str, Any]],
    family: str,
    headline: str,
    sign: float,
) -> Frontier:
    """The last policies of all runs of a family, beside the policy that each started from."""
    places: list[Place] = []
    form: Form = "rl"
    for view in views:
        sweep = sweeps.get(view.recipe["name"])
        if sweep is None or sweep["family"] != family or view.summary is None:
            continue
        last = int(view.summary["policy_number"])
        first, own = policy_measures(view, 0), policy_measures(view, last)
        kl = own.get("kl", own.get("kl_bound"))
        if last == 0 or kl is None:
            continue
        if view.recipe["policy_update"].get("use") == "select":
            form = "best_of_n"
        measure = f"{headline}@1"
        known = measure in own and measure in first
        places.append(
            Place(
                kl,
                sign * (own[measure] - first[measure]) if known else None,
                own.get("reward_gain"),
                f"{sweep['value']}, seed {view.recipe['seed']}",
            )
        )
    return Frontier(family, form, places)


def _trainings(view: RunView, headline: str, sign: float) -> Iterator[Frontier]:
    """A PPO training's rollouts, with their own KL, reward and gold; gains are over the first."""
    for role, records in view.ppo_records().items():
        rows = [r for r in records if isinstance(r.get("kl"), int | float)]
        if not rows:
            continue
        start, field = rows[0], f"gold_{headline}"
        places = [
            Place(
                max(float(row["kl"]), 0.0),
                sign * (row[field] - start[field]) if _numbers(field, row, start) else None,
                row["reward"] - start["reward"] if _numbers("reward", row, start) else None,
                f"update {number}",
            )
            for number, row in enumerate(rows, 1)
        ]
        yield Frontier(f"{view.recipe['name']}, seed {view.recipe['seed']}, {role}", "rl", places)


def _numbers(name: str, *rows: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), int | float) for row in rows)
