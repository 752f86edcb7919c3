"""Figures of the gains of gold and reward against KL, with the fitted forms of Gao et al."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from irl_align.evaluation.compare.overoptimization import LEAST_KL, Fit
from irl_align.evaluation.report.figures import Plot, Point, Series

MOST = 8  # figures on a page; its table has the fits of all frontiers
ON_CURVE = 64  # points of a fitted curve
WHICH = {"gold": "gold", "proxy": "the reward optimised on"}


def gain_figures(frontiers: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One figure per frontier: both gains as shares of their largest value, with fitted curves.

    Gold and reward have different units; the figure shows at which KL each starts to fall.
    """
    figures = []
    for number, frontier in enumerate(frontiers):
        series = [
            one
            for at, which in enumerate(WHICH)
            for one in _series(frontier, which, at)
            if one.points
        ]
        if series:
            title = f"{frontier['name']}: gain over the start"
            figures.append(
                Plot(
                    f"gain-{number}",
                    title,
                    "KL to the start, nats",
                    "gain, share of its largest",
                    series,
                    joined=False,
                )
            )
    return figures[:MOST]


def _series(frontier: Mapping[str, Any], which: str, colour: int) -> list[Series]:
    """The points of one gain, and the curve that was fitted to them."""
    places = [place for place in frontier["places"] if place[which] is not None]
    largest = max((abs(place[which]) for place in places), default=0.0)
    if largest == 0.0:
        return []
    points = [
        Point(p["kl"], p[which] / largest, note=f"{p['note']}, gain {p[which]:.4g}") for p in places
    ]
    drawn = [Series(WHICH[which], points, colour)]
    if frontier[which] is not None:
        fit = Fit(**frontier[which])
        ends = min(max(p["kl"], LEAST_KL) for p in places), max(p["kl"] for p in places)
        along = np.linspace(*ends, ON_CURVE)
        curve = [Point(float(kl), fit.at(float(kl)) / largest) for kl in along]
        drawn.append(Series(f"{WHICH[which]}, fitted", curve, colour, joined=True))
    return drawn
