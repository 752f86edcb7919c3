"""Gain against KL: fits of the forms of Gao et al. 2023 (arXiv:2210.10760), and overoptimisation.

With d = sqrt(KL(pi || pi_0)), the gain over pi_0 is d (alpha - beta d) for best-of-n and
d (alpha - beta log d) for reinforcement learning (their section 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from irl_align.evaluation.compare.policies import final_policy, policy_measures
from irl_align.training.run_folder import RunView

Form = Literal["best_of_n", "rl"]
FEWEST = 4  # points to which the two coefficients are fitted
LEAST_KL = 1e-6


@dataclass(frozen=True)
class Fit:
    """A form's two coefficients, and how well they fit."""

    form: Form
    alpha: float
    beta: float
    rmse: float
    peak_kl: float | None
    """KL at which the curve is highest; None if it only rises or only falls."""

    def at(self, kl: float) -> float:
        """The curve's gain at a KL."""
        return float(gain_features(self.form, np.array([kl]))[0] @ [self.alpha, self.beta])


def fit_gain(form: Form, kls: Sequence[float], gains: Sequence[float]) -> Fit | None:
    """Fit by least squares, which is exact: both forms are linear in alpha and beta.

    gains: over pi_0; higher is better. None for fewer than FEWEST points with a KL above 0, or if
    all of these are at one KL.
    """
    kl, gain = np.asarray(kls, np.float64), np.asarray(gains, np.float64)
    used = kl > LEAST_KL
    kl, gain = kl[used], gain[used]
    if len(kl) < FEWEST or np.ptp(kl) < LEAST_KL:
        return None
    features = gain_features(form, kl)
    (alpha, beta), *_ = np.linalg.lstsq(features, gain, rcond=None)
    rmse = float(np.sqrt(np.mean((features @ [alpha, beta] - gain) ** 2)))
    return Fit(form, float(alpha), float(beta), rmse, _peak(form, float(alpha), float(beta)))


def gain_features(form: Form, kl: np.ndarray) -> np.ndarray:
    """The factors of alpha and beta, (N, 2). kl: (N,), above 0."""
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
    """Whether gold falls by more than the noise of its points while the proxy still rises."""
    if gold is None or proxy is None or gold.peak_kl is None or gold.peak_kl >= largest_kl:
        return False
    fall = gold.at(gold.peak_kl) - gold.at(largest_kl)
    return fall > gold.rmse and proxy.at(largest_kl) > proxy.at(gold.peak_kl)


def frontiers(
    views: Sequence[RunView],
    sweeps: Mapping[str, Mapping[str, Any]],
    headline: str | None,
    lower_is_better: Mapping[str, bool],
) -> list[dict[str, Any]]:
    """One frontier for each swept recipe, over its values and seeds, and for each PPO training,
    over its updates.

    sweeps: method -> {family, value}. headline: the gold metric.
    """
    if headline is None:
        return []
    sign = -1.0 if lower_is_better.get(f"{headline}@1") else 1.0
    families = dict.fromkeys(sweep["family"] for sweep in sweeps.values())
    made = [_swept(views, sweeps, family, headline, sign) for family in families]
    made += [frontier for view in views for frontier in _trainings(view, headline, sign)]
    return [frontier for frontier in made if frontier["places"]]


def _frontier(name: str, form: Form, places: list[dict[str, Any]]) -> dict[str, Any]:
    """Policies on one curve: their places, the fits, and whether the reward is overoptimised.

    places: `kl` to pi_0, gains `gold` and `proxy` over pi_0 (None if unknown), and a `note`.
    """
    fits = {}
    for which in ("gold", "proxy"):
        known = [place for place in places if place[which] is not None]
        fits[which] = fit_gain(form, [p["kl"] for p in known], [p[which] for p in known])
    largest = max((place["kl"] for place in places), default=0.0)
    return {
        "name": name,
        "places": places,
        **{which: asdict(fit) if fit else None for which, fit in fits.items()},
        "overoptimised": overoptimised(fits["gold"], fits["proxy"], largest),
    }


def _swept(
    views: Sequence[RunView],
    sweeps: Mapping[str, Mapping[str, Any]],
    family: str,
    headline: str,
    sign: float,
) -> dict[str, Any]:
    """The final policies of a family's runs, each compared with the policy it started from."""
    places: list[dict[str, Any]] = []
    form: Form = "rl"
    for view in views:
        sweep = sweeps.get(view.recipe["name"], {})
        if sweep.get("family") != family or (last := final_policy(view)) == 0:
            continue
        first, own = policy_measures(view, 0), policy_measures(view, last)
        kl = own.get("kl", own.get("kl_bound"))
        if kl is None:
            continue
        if view.recipe["policy_update"].get("use") == "select":
            form = "best_of_n"
        measure = f"{headline}@1"
        known = measure in own and measure in first
        places.append(
            {
                "kl": kl,
                "gold": sign * (own[measure] - first[measure]) if known else None,
                "proxy": own.get("reward_gain"),
                "note": f"{sweep['value']}, seed {view.recipe['seed']}",
            }
        )
    return _frontier(family, form, places)


def _trainings(view: RunView, headline: str, sign: float) -> Iterator[dict[str, Any]]:
    """The rollouts of each PPO training, with their own KL, reward and gold; gains are over the
    first rollout."""

    def gain(field: str, row: Mapping[str, Any]) -> float | None:
        value, start = row.get(field), rows[0].get(field)
        if isinstance(value, int | float) and isinstance(start, int | float):
            return value - start
        return None

    for role, records in view.ppo_records().items():
        rows = [record for record in records if isinstance(record.get("kl"), int | float)]
        places = [
            {
                "kl": max(float(row["kl"]), 0.0),
                "gold": None if (g := gain(f"gold_{headline}", row)) is None else sign * g,
                "proxy": gain("reward", row),
                "note": f"update {number}",
            }
            for number, row in enumerate(rows, 1)
        ]
        name = f"{view.recipe['name']}, seed {view.recipe['seed']}, {role}"
        yield _frontier(name, "rl", places)
