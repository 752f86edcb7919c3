"""Tables and notes of what `irl-align evaluate` measured, from its JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from irl_align.evaluation.lm_eval_tasks import LEADERBOARD
from irl_align.evaluation.preference_tables import preference_notes, preference_report_tables
from irl_align.training.run_folder import RunView
from irl_align.utils.files import read_json
from irl_align.utils.statistics import Estimate
from irl_align.utils.text_table import Cell, Column, Table, estimate_cell, metric_name, percent

FILE = "evaluation.json"


def read_evaluation(view: RunView) -> dict[str, Any] | None:
    """The evaluation of a run's present policy and reward; None if there is none."""
    path = view.folder / FILE
    if not path.is_file():
        return None
    evaluation = read_json(path, "an evaluation", "run irl-align evaluate again")
    return evaluation if evaluation.get("of") == subject_of(view) else None


def subject_of(view: RunView) -> dict[str, Any]:
    """The policy and reward that an evaluation of a run evaluates."""
    summary = view.summary or {}
    return {"policy": summary.get("policy"), "reward": summary.get("reward")}


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Tables of all preference sets, of the best-of-n curve, of all judges and of benchmarks."""
    tables = [table for report in evaluation["sets"] for table in preference_report_tables(report)]
    if evaluation["best_of"]:
        tables.append(curve_table(evaluation["best_of"]))
    tables += map(judge_table, evaluation["judged"])
    tables += map(chat_judge_table, evaluation["judged_by_chat"])
    if evaluation["benchmarks"]:
        tables.append(benchmark_table(evaluation["benchmarks"]))
    return tables


def evaluation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    lines = [line for report in evaluation["sets"] for line in preference_notes(report)]
    lines += curve_notes(evaluation["best_of"]) if evaluation["best_of"] else []
    return [*lines, *_judge_notes(evaluation), *_benchmark_notes(evaluation["benchmarks"])]


def judge_table(report: Mapping[str, Any]) -> Table:
    """Win rates by a reward, one row per temperature."""
    sides = [
        name
        for name in ("start", "demonstrations")
        if any(f"wins_against_{name}" in row for row in report["rows"])
    ]
    columns = [Column("policy"), Column("samples", 0)]
    columns += [percent(f"against {name}") for name in sides]
    rows: list[list[Cell]] = [
        [
            _temperature(row),
            row["samples"],
            *(estimate_cell(row.get(f"wins_against_{name}")) for name in sides),
            row["judge_score"],
            row["distinct_bigrams"],
        ]
        for row in report["rows"]
    ]
    title = f"{report['policy']}, judged by {report['judge']}: wins %"
    return Table(title, [*columns, Column("judge's score", 3), Column("distinct bigrams", 3)], rows)


def chat_judge_table(report: Mapping[str, Any]) -> Table:
    """Win rates by a chat model that was asked in both orders."""
    columns = [Column("policy"), Column("against"), Column("pairs", 0), Column("judged", 0)]
    columns += [percent("wins %"), *(Column(name, 0) for name in ("won", "tied", "lost"))]
    rows: list[list[Cell]] = []
    for row in report["rows"]:
        judged = row["judged"]
        cells = [_temperature(row), row["against"], row["pairs"], judged]
        cells += [estimate_cell(row["win_rate"]), row["wins"], row["ties"], row["losses"]]
        rows.append([*cells, row["inconsistent"] / judged if judged else None])
    title = f"{report['policy']}, judged by {report['judge']}: wins %, ties counting half"
    return Table(title, [*columns, percent("inconsistent %")], rows)


def _temperature(row: Mapping[str, Any]) -> str:
    return "greedy" if row["temperature"] == 0 else f"T={row['temperature']:g}"


def _judge_notes(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """A note on every comparison in which some pairs have no verdict."""
    for report in evaluation["judged_by_chat"]:
        for row in report["rows"]:
            if row["judged"] < row["pairs"]:
                yield (
                    f"{report['judge']}: {row['pairs']} pairs against {row['against']}, without "
                    f"{row['unreadable']} whose reply had no verdict and {row['unanswered']} that "
                    "had no reply"
                )


def benchmark_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Every metric of lm-eval's tasks.

    Tasks of the Open LLM Leaderboard have its metric only, and a mean if all of them are there.
    """
    rows: list[list[Cell]] = []
    leaderboard = []
    for result in results:
        for name in benchmark_metrics(result):
            value = result["metrics"][name]["value"]
            # 1.96 standard errors, since the harness gives no interval.
            error = result["metrics"][name]["stderr"]
            spread = None if error is None else 1.96 * error
            low, high = (None, None) if spread is None else (value - spread, value + spread)
            shots, limit = result["shots"], result["limit"] or "all"
            cells = [result["task"], name.replace(",none", ""), shots]
            rows.append([*cells, Estimate(value, low, high, 0), limit])
        usual = LEADERBOARD.get(result["task"])
        if usual and result["shots"] == usual[0] and usual[1] in result["metrics"]:
            leaderboard.append(result["metrics"][usual[1]]["value"])
    if len(leaderboard) == len(LEADERBOARD):
        mean = sum(leaderboard) / len(leaderboard)
        rows.append(["Open LLM Leaderboard", "mean", None, mean, None])
    columns = [Column("task"), Column("metric"), Column("shots", 0), percent("value %")]
    return Table("lm-eval", [*columns, Column("rows", 0)], rows)


def benchmark_metrics(result: Mapping[str, Any]) -> list[str]:
    """The metrics shown of a task: the leaderboard's if it has one, else all."""
    usual = LEADERBOARD.get(result["task"], (None, ""))[1]
    return [usual] if usual in result["metrics"] else list(result["metrics"])


def _benchmark_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The harness's version, and the tasks that were limited to some of their rows."""
    notes = [f"lm-eval {version}" for version in dict.fromkeys(r["lm_eval"] for r in results)]
    limited = [f"{r['task']} ({r['limit']} rows)" for r in results if r["limit"]]
    return notes + ([f"lm-eval: limited to some rows: {', '.join(limited)}"] if limited else [])


def curve_table(report: Mapping[str, Any]) -> Table:
    """A best-of-n curve, one row per n."""
    names = list(report["gold"])
    rows: list[list[Cell]] = []
    for at, (n, kl) in enumerate(zip(report["n"], report["kl"], strict=True)):
        golds = (report["gold"][name]["estimates"][at] for name in names)
        rows.append([str(n), kl, *map(estimate_cell, (report["reward"][at], *golds))])
    columns = [Column("n"), Column("KL at most", 2), Column("reward", 3)]
    columns += [Column(metric_name(name), 3) for name in names]
    return Table("best of n by the reward: means over prompts", columns, rows)


def curve_notes(report: Mapping[str, Any]) -> list[str]:
    """Notes on the gold fields for which the reward is overoptimised, and on those whose better
    direction is unknown."""
    notes = [
        f"overoptimised: {metric_name(name)} is best at n = {gold['peak_n']} and worse at "
        f"n = {report['n'][-1]}, while the reward still rises"
        for name, gold in report["gold"].items()
        if gold["overoptimised"]
    ]
    unknown = [
        metric_name(n) for n, gold in report["gold"].items() if gold["lower_is_better"] is None
    ]
    if unknown:
        notes.append(
            "best of n: not judged for overoptimisation, since the gold does not say whether high "
            f"or low is good: {', '.join(unknown)}"
        )
    return notes
