"""What `irl-align evaluate` found, as tables and lines. Reads its JSON, never models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irl_align.comparison_tables import Grid
from irl_align.files import read_json
from irl_align.preference_report import half, preference_grids
from irl_align.stages import RunView

FILE = "evaluation.json"


def read_evaluation(view: RunView) -> dict[str, Any] | None:
    """What was evaluated of a run, if it was, and of the policy and reward that it has now."""
    path = view.folder / FILE
    if not path.is_file():
        return None
    found = read_json(path, "an evaluation", "run irl-align evaluate again")
    return found if found.get("of") == subject_of(view) else None


def subject_of(view: RunView) -> dict[str, Any]:
    """What an evaluation of a run is of."""
    summary = view.summary or {}
    return {"policy": summary.get("policy"), "reward": summary.get("reward")}


def evaluation_grids(found: Mapping[str, Any]) -> list[Grid]:
    """Tables of all sets, of the best-of-n curve, and of all judges."""
    grids = [grid for report in found["sets"] for grid in preference_grids(report)]
    grids += [curve_grid(found["best_of"])] if found["best_of"] else []
    return [*grids, *map(judge_grid, found["judged"])]


def evaluation_notes(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    dropped = [
        f"{report['card']}: {report['dropped']} pairs too long for a model, left out"
        for report in found["sets"]
        if report["dropped"]
    ]
    return dropped + (curve_notes(found["best_of"]) if found["best_of"] else [])


def judge_grid(report: Mapping[str, Any]) -> Grid:
    """Win rates by a judge, one row per temperature."""
    sides = [
        name
        for name in ("start", "demonstrations")
        if any(f"wins_against_{name}" in row for row in report["rows"])
    ]
    grid = Grid(
        f"{report['policy']}, judged by {report['judge']}: wins %",
        [
            "policy",
            "samples",
            *(f"against {name}" for name in sides),
            "judge's score",
            "distinct bigrams",
        ],
        [],
    )
    for row in report["rows"]:
        at = "greedy" if row["temperature"] == 0 else f"T={row['temperature']:g}"
        wins = [row.get(f"wins_against_{name}") for name in sides]
        grid.rows.append(
            [
                at,
                str(row["samples"]),
                *("-" if won is None else f"{100 * won['mean']:.1f}{half(won)}" for won in wins),
                f"{row['judge_score']:.3f}",
                f"{row['distinct_bigrams']:.3f}",
            ]
        )
    return grid


def curve_grid(report: Mapping[str, Any]) -> Grid:
    """A curve as a table: one row per n."""
    names = list(report["gold"])
    grid = Grid(
        "best of n by the reward: means over prompts",
        ["n", "KL at most", "reward", *(name.replace("_", " ") for name in names)],
        [],
    )
    for at, (n, kl) in enumerate(zip(report["n"], report["kl"], strict=True)):
        cells = [report["reward"][at], *(report["gold"][name]["estimates"][at] for name in names)]
        grid.rows.append([str(n), f"{kl:.2f}", *map(_shown, cells)])
    return grid


def curve_notes(report: Mapping[str, Any]) -> list[str]:
    """One line for every gold field that the reward is overoptimised on."""
    return [
        f"overoptimised: {name.replace('_', ' ')} is best at n = {found['peak_n']} and worse at "
        f"n = {report['n'][-1]}, while the reward still rises"
        for name, found in report["gold"].items()
        if found["overoptimised"]
    ]


def _shown(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f}±{found['high'] - found['mean']:.3f}"
