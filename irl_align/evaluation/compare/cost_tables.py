"""What a comparison's methods cost: seconds, tokens and memory, by part and by iteration.

Reads what comparison.analyse says of costs, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from irl_align.policy.roles import PARTS
from irl_align.utils.text_table import MISSING, Grid

Analysis = Mapping[str, Any]


def costs(analysis: Analysis) -> Grid:
    """Seconds of every method by part, and seconds and tokens of its iterations, the seconds beside
    those of the first method that has any."""
    found = [cost for cost in analysis["costs"] if cost["parts"]]
    parts = [part for part in PARTS if any(part in cost["parts"] for cost in found)]
    tokens = [n for n in ("trained", "sampled") if any(n in c.get("tokens", {}) for c in found)]
    columns = ["policy", *map(_part_name, parts), "total", "per iteration", "relative"]
    columns += [*(f"tokens {name}, thousands" for name in tokens), "peak MiB"]
    grid = Grid("seconds, mean over seeds, as if nothing were shared", columns, [])
    first = next((_per_iteration(cost) for cost in found if cost["iterations"]), 0.0)
    for cost in found:
        each = _per_iteration(cost)
        peak = cost["peak_mib"]
        grid.rows.append(
            [
                cost["method"],
                *(f"{cost['parts'][p]:.0f}" if p in cost["parts"] else MISSING for p in parts),
                f"{sum(cost['parts'].values()):.0f}",
                f"{each:.0f}" if each else MISSING,
                f"{each / first:.2f}" if each and first else MISSING,
                *(_thousands(cost.get("tokens", {}).get(name)) for name in tokens),
                MISSING if peak is None else f"{peak:.0f}",
            ]
        )
    return grid


def memory_by_part(analysis: Analysis) -> Grid:
    """The largest peak of every method's stages, by part."""
    title = "peak MiB by part (without a GPU: of the process up to there)"
    return _by_part(analysis, title, ["peak_mib"])


def tokens_by_part(analysis: Analysis) -> Grid:
    """Tokens that every method trained on and sampled, by part, every pass counted."""
    title = "thousands of tokens by part, mean over seeds, as if nothing were shared"
    return _by_part(analysis, title, ["trained", "sampled"])


def _by_part(analysis: Analysis, title: str, measures: Sequence[str]) -> Grid:
    """One row per method, one column per part and measure that any of them tells."""
    found = [(cost["method"], cost.get("by_part", {})) for cost in analysis["costs"]]
    columns = [
        (part, name)
        for part in PARTS
        for name in measures
        if any(name in told.get(part, {}) for _, told in found)
    ]
    names = [_part_name(p) + ("" if n == "peak_mib" else f" {n}") for p, n in columns]
    rows = [
        [method, *(_cost(told.get(part, {}), name) for part, name in columns)]
        for method, told in found
        if told
    ]
    return Grid(title, ["policy", *names], rows if columns else [])


def costs_by_iteration(analysis: Analysis) -> Grid:
    """Seconds, tokens and peak memory of every iteration, where a method has more than one."""
    columns = ["policy", "seconds", "tokens trained, thousands", "tokens sampled, thousands"]
    grid = Grid("by iteration, without measuring", [*columns, "peak MiB"], [])
    if all(len(cost["iterations"]) < 2 for cost in analysis["costs"]):
        return grid
    for cost in analysis["costs"]:
        for k, seconds in cost["iterations"].items():
            told = cost.get("by_iteration", {}).get(k, {})
            cells = [_cost(told, name) for name in ("trained", "sampled", "peak_mib")]
            grid.rows.append([f"{cost['method']}, iteration {k}", f"{seconds:.0f}", *cells])
    return grid


def _part_name(part: str) -> str:
    return "policy step" if part == "policy" else part


def _cost(told: Mapping[str, float], name: str) -> str:
    if name == "peak_mib" and name in told:
        return f"{told[name]:.0f}"
    return _thousands(told.get(name))


def _thousands(value: float | None) -> str:
    return MISSING if value is None else f"{value / 1000:,.0f}"


def _per_iteration(cost: Mapping[str, Any]) -> float:
    """Mean seconds of an iteration's samples, reward and policy; 0 without iterations."""
    seconds = cost["iterations"].values()
    return sum(seconds) / len(seconds) if seconds else 0.0
