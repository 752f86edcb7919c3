"""What `irl-align evaluate` found, as tables and lines. Reads its JSON, never models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from irl_align.evaluation.lm_eval_tasks import LEADERBOARD
from irl_align.evaluation.preference_tables import half, preference_grids, preference_notes
from irl_align.training.run_folder import RunView
from irl_align.utils.files import read_json
from irl_align.utils.text_table import Grid, spelt

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
    """Tables of all sets, of the best-of-n curve, of all judges and of benchmarks."""
    grids = [grid for report in found["sets"] for grid in preference_grids(report)]
    grids += [curve_grid(found["best_of"])] if found["best_of"] else []
    grids += map(judge_grid, found["judged"])
    grids += map(chat_judge_grid, found.get("judged_by_chat", []))
    harness = found.get("benchmarks", [])
    return [*grids, *([benchmark_grid(harness)] if harness else [])]


def evaluation_notes(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    sets = [line for report in found["sets"] for line in preference_notes(report)]
    told = curve_notes(found["best_of"]) if found["best_of"] else []
    return [*sets, *told, *map(_unjudged, _without_verdict(found)), *benchmark_notes(found)]


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


def chat_judge_grid(report: Mapping[str, Any]) -> Grid:
    """Win rates by a chat model that was asked in both orders."""
    grid = Grid(
        f"{report['policy']}, judged by {report['judge']}: wins %, ties counting half",
        ["policy", "against", "pairs", "judged", "wins %", "won", "tied", "lost", "inconsistent %"],
        [],
    )
    for row in report["rows"]:
        won, judged = row["win_rate"], row["judged"]
        grid.rows.append(
            [
                "greedy" if row["temperature"] == 0 else f"T={row['temperature']:g}",
                row["against"],
                *map(str, (row["pairs"], judged)),
                "-" if won is None else f"{100 * won['mean']:.1f}{half(won)}",
                *(str(row[name]) for name in ("wins", "ties", "losses")),
                f"{100 * row['inconsistent'] / judged:.1f}" if judged else "-",
            ]
        )
    return grid


def _without_verdict(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(judge, row) of every comparison in which some pairs have no verdict."""
    return [
        (str(report["judge"]), row)
        for report in found.get("judged_by_chat", [])
        for row in report["rows"]
        if row["judged"] < row["pairs"]
    ]


def _unjudged(judge_and_row: tuple[str, Mapping[str, Any]]) -> str:
    judge, row = judge_and_row
    return (
        f"{judge}: of {row['pairs']} pairs against {row['against']}, {row['unreadable']} had a "
        f"reply without a verdict and {row['unanswered']} no reply: left out"
    )


def benchmark_grid(results: Sequence[Mapping[str, Any]]) -> Grid:
    """Every metric of lm-eval's tasks; of the leaderboard's the leaderboard's, and their mean."""
    grid = Grid("lm-eval", ["task", "metric", "shots", "value %", "rows"], [])
    whole = []
    for result in results:
        usual = LEADERBOARD.get(result["task"])
        own = [usual[1]] if usual and usual[1] in result["metrics"] else list(result["metrics"])
        for name in own:
            found = result["metrics"][name]
            error = found["stderr"]
            # 1.96 standard errors: the harness gives no other interval
            spread = "" if error is None else f"±{196.0 * error:.1f}"
            value, rows = f"{100 * found['value']:.1f}{spread}", result["limit"] or "all"
            shots = "-" if result["shots"] is None else str(result["shots"])
            grid.rows.append([result["task"], name.replace(",none", ""), shots, value, str(rows)])
        if usual and result["shots"] == usual[0] and usual[1] in result["metrics"]:
            whole.append(result["metrics"][usual[1]]["value"])
    if len(whole) == len(LEADERBOARD):
        mean = f"{100 * sum(whole) / len(whole):.1f}"
        grid.rows.append(["Open LLM Leaderboard", "mean", "-", mean, "-"])
    return grid


def benchmark_notes(found: Mapping[str, Any]) -> list[str]:
    """The harness's version, and which numbers are of a part of a task's rows."""
    results = found.get("benchmarks", [])
    notes = [f"lm-eval {version}" for version in dict.fromkeys(r["lm_eval"] for r in results)]
    part = [f"{r['task']} ({r['limit']} rows)" for r in results if r["limit"]]
    return notes + ([f"lm-eval: of a part of the rows: {', '.join(part)}"] if part else [])


def curve_grid(report: Mapping[str, Any]) -> Grid:
    """A curve as a table: one row per n."""
    names = list(report["gold"])
    grid = Grid(
        "best of n by the reward: means over prompts",
        ["n", "KL at most", "reward", *(spelt(name) for name in names)],
        [],
    )
    for at, (n, kl) in enumerate(zip(report["n"], report["kl"], strict=True)):
        cells = [report["reward"][at], *(report["gold"][name]["estimates"][at] for name in names)]
        grid.rows.append([str(n), f"{kl:.2f}", *map(_shown, cells)])
    return grid


def curve_notes(report: Mapping[str, Any]) -> list[str]:
    """One line for every gold field that the reward is overoptimised on, and one for those of which
    it is not known whether high or low is better."""
    unknown = [
        spelt(name) for name, found in report["gold"].items() if found["lower_is_better"] is None
    ]
    over = [
        f"overoptimised: {spelt(name)} is best at n = {found['peak_n']} and worse at "
        f"n = {report['n'][-1]}, while the reward still rises"
        for name, found in report["gold"].items()
        if found["overoptimised"]
    ]
    if unknown:
        over.append(
            "best of n: not judged for overoptimisation, since the gold does not say whether high "
            f"or low is good: {', '.join(unknown)}"
        )
    return over


def _shown(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f}±{found['high'] - found['mean']:.3f}"
