"""Tables of what a comparison's methods cost: seconds, tokens and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from irl_align.policy.roles import PARTS
from irl_align.utils.text_table import Cell, Column, Table

TOKENS = ("trained", "sampled")


def costs(analysis: Mapping[str, Any]) -> Table:
    """Seconds of every method by part, and seconds and tokens of its iterations.

    `relative` compares the seconds of an iteration with those of the first method that has any.
    """
    methods = [cost for cost in analysis["costs"] if cost["by_part"]]
    parts = [part for part in PARTS if any(part in cost["by_part"] for cost in methods)]
    tokens = [name for name in TOKENS if any(_per_iteration(cost, name) for cost in methods)]
    first = next((s for cost in methods if (s := _per_iteration(cost, "seconds"))), None)
    rows: list[list[Cell]] = []
    for cost in methods:
        by_part = cost["by_part"]
        each = _per_iteration(cost, "seconds")
        rows.append(
            [
                cost["method"],
                *(by_part[part]["seconds"] if part in by_part else None for part in parts),
                sum(total["seconds"] for total in by_part.values()),
                each,
                each / first if each and first else None,
                *(_per_iteration(cost, name) for name in tokens),
                max((total.get("peak_mib", 0) for total in by_part.values()), default=0) or None,
            ]
        )
    columns = [Column("policy"), *(_column(_part_name(part), "seconds") for part in parts)]
    columns += [_column("total", "seconds"), _column("per iteration", "seconds")]
    columns += [Column("relative", 2), *(_column(f"tokens {n}, thousands", n) for n in tokens)]
    columns.append(_column("peak MiB", "peak_mib"))
    return Table("seconds, mean over seeds, as if nothing were shared", columns, rows)


def memory_by_part(analysis: Mapping[str, Any]) -> Table:
    """The largest peak of every method's stages, by part."""
    title = "peak MiB by part (without a GPU: of the process until then)"
    return _by_part(analysis, title, ["peak_mib"])


def tokens_by_part(analysis: Mapping[str, Any]) -> Table:
    """Tokens that every method trained on, counted in every pass, and sampled, by part."""
    title = "thousands of tokens by part, mean over seeds, as if nothing were shared"
    return _by_part(analysis, title, TOKENS)


def _by_part(analysis: Mapping[str, Any], title: str, measures: Sequence[str]) -> Table:
    """One row per method, one column per part and measure that any method has."""
    methods = [(cost["method"], cost["by_part"]) for cost in analysis["costs"] if cost["by_part"]]
    cells = [
        (part, name)
        for part in PARTS
        for name in measures
        if any(name in by_part.get(part, {}) for _, by_part in methods)
    ]
    columns = [
        _column(_part_name(part) + (f" {name}" if name in TOKENS else ""), name)
        for part, name in cells
    ]
    rows = [
        [method, *(by_part.get(part, {}).get(name) for part, name in cells)]
        for method, by_part in methods
    ]
    return Table(title, [Column("policy"), *columns], rows if cells else [])


def costs_by_iteration(analysis: Mapping[str, Any]) -> Table:
    """Seconds, tokens and peak memory of every iteration, if a method has more than one."""
    names = {
        "seconds": "seconds",
        "trained": "tokens trained, thousands",
        "sampled": "tokens sampled, thousands",
        "peak_mib": "peak MiB",
    }
    rows: list[list[Cell]] = [
        [f"{cost['method']}, iteration {k}", *(total.get(name) for name in names)]
        for cost in analysis["costs"]
        for k, total in cost["by_iteration"].items()
    ]
    several = any(len(cost["by_iteration"]) > 1 for cost in analysis["costs"])
    columns = [Column("policy"), *(_column(header, name) for name, header in names.items())]
    return Table("by iteration, without measuring", columns, rows if several else [])


def _column(header: str, name: str) -> Column:
    if name in TOKENS:
        return Column(header, 0, scale=0.001, grouped=True)
    return Column(header, 0)


def _part_name(part: str) -> str:
    return "policy step" if part == "policy" else part


def _per_iteration(cost: Mapping[str, Any], name: str) -> float | None:
    """Mean over a method's iterations; None without any."""
    values = [total.get(name, 0.0) for total in cost["by_iteration"].values()]
    return sum(values) / len(values) if any(values) else None
