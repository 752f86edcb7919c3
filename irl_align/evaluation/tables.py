"""Tables, notes and measures of what `irl-align evaluate` measured, from its JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irl_align.evaluation.preference_tables import (
    BASELINES,
    PREFERENCE_REWARD,
    preference_notes,
    preference_report_tables,
    split_name,
)
from irl_align.training.run_folder import RunView
from irl_align.utils.files import read_json
from irl_align.utils.statistics import Estimate, few_clusters, proportion
from irl_align.utils.text_table import Cell, Column, Table, estimate_cell, metric_name, percent

FILE = "evaluation.json"
OPPONENTS = ("start", "demonstrations")
UNSEEN = {"": "", "_unseen": ", prompts not in training"}
OWN_REWARDS = ("reward", "implicit reward")
LEADERBOARD: dict[str, tuple[int, str]] = {
    "arc_challenge": (25, "acc_norm,none"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
}
"""Task -> its shots and metric on the Open LLM Leaderboard (the first one, 2023-24)."""


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
    tables += map(_judge_table, evaluation["judged"])
    tables += map(_chat_judge_table, evaluation["judged_by_chat"])
    if evaluation["benchmarks"]:
        tables.append(benchmark_table(evaluation["benchmarks"]))
    return tables


def evaluation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know, one line each."""
    lines = [line for report in evaluation["sets"] for line in preference_notes(report)]
    lines += curve_notes(evaluation["best_of"]) if evaluation["best_of"] else []
    return [*lines, *_judge_notes(evaluation), *_benchmark_notes(evaluation["benchmarks"])]


def _judge_table(report: Mapping[str, Any]) -> Table:
    """Win rates by a reward, one row per temperature."""
    rows = report["rows"]
    names = {f"{side}{part}": side + words for side in OPPONENTS for part, words in UNSEEN.items()}
    sides = [side for side in names if any(f"wins_against_{side}" in row for row in rows)]
    columns = [Column("policy"), Column("samples", 0)]
    columns += [percent(f"against {names[side]}", brackets=True) for side in sides]
    columns += [Column("judge's score", 3), Column("distinct bigrams", 3)]
    cells: list[list[Cell]] = []
    for row in rows:
        wins = (estimate_cell(row.get(f"wins_against_{side}")) for side in sides)
        scores = (row["judge_score"], row["distinct_bigrams"])
        cells.append([_temperature(row), row["samples"], *wins, *scores])
    return Table(f"{report['policy']}, judged by {report['judge']}: wins %", columns, cells)


def _chat_judge_table(report: Mapping[str, Any]) -> Table:
    """Win rates by a chat model that was asked in both orders."""
    columns = [Column("policy"), Column("against"), Column("pairs", 0), Column("judged", 0)]
    columns += [
        percent("wins %", brackets=True),
        *(Column(name, 0) for name in ("won", "tied", "lost")),
    ]
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
    """Notes on few prompts, and on every comparison in which some pairs have no verdict."""
    by_reward = [row for report in evaluation["judged"] for row in report["rows"]]
    sides = [f"wins_against_{side}{part}" for side in OPPONENTS for part in UNSEEN]
    shares = [estimate_cell(row.get(side)) for row in by_reward for side in sides]
    by_chat = [row for report in evaluation["judged_by_chat"] for row in report["rows"]]
    note = few_clusters([*shares, *(estimate_cell(row["win_rate"]) for row in by_chat)])
    if note is not None:
        yield f"judges: {note}"
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
            cells = [result["task"], name.replace(",none", ""), result["shots"]]
            rows.append([*cells, _benchmark_value(result, name), result["rows"]])
        usual = LEADERBOARD.get(result["task"])
        if usual and result["shots"] == usual[0] and usual[1] in result["metrics"]:
            leaderboard.append(result["metrics"][usual[1]]["value"])
    if len(leaderboard) == len(LEADERBOARD):
        mean = sum(leaderboard) / len(leaderboard)
        rows.append(["Open LLM Leaderboard", "mean", None, mean, None])
    columns = [Column("task"), Column("metric"), Column("shots", 0)]
    columns.append(percent("value %", brackets=True))
    return Table("lm-eval", [*columns, Column("rows", 0)], rows)


def _benchmark_value(result: Mapping[str, Any], name: str) -> Estimate:
    """A metric of a task with 1.96 standard errors, since the harness gives no interval. A share of
    0 or 1, whose standard error is 0, has Wilson's interval."""
    value, error = result["metrics"][name]["value"], result["metrics"][name]["stderr"]
    if error == 0.0 and value in (0.0, 1.0) and result["rows"]:
        return proportion(value * result["rows"], result["rows"])
    low, high = (value + z * error if error else None for z in (-1.96, 1.96))
    return Estimate(value, low, high, result["rows"] or 0)


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


def evaluated_runs(views: Sequence[RunView]) -> dict[Path, dict[str, float]]:
    """Folder -> measures of the runs whose present policy and reward were evaluated."""
    return {
        view.folder: evaluation_measures(evaluation, view.recipe["seed"])
        for view in views
        if (evaluation := read_evaluation(view)) is not None
    }


def evaluation_measures(evaluation: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Shares by measure: accuracy on preference sets, win rates and benchmarks.

    `preference/CARD/SPLIT/SCORER`, `wins/JUDGE/against OTHER@TEMPERATURE` and
    `lm_eval/TASK/METRIC/SHOTS`. The seed is removed from the name of a judge that is a run of this
    seed, so that each seed may have its own judge. Rewards of `--beside` are left out, since they
    belong to no single run.
    """
    measures = [
        *_preference_measures(evaluation),
        *_win_measures(evaluation, f"-seed{seed}"),
        *_benchmark_measures(evaluation),
    ]
    return {name: float(value) for name, value in measures if value is not None}


def _preference_measures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Accuracies of the run's own reward, the baselines and the reward on preferences, and the
    excess share."""
    for report in evaluation["sets"]:
        if report["only"]:
            continue  # the whole set may be there as well
        scorers, where = report["scorers"], f"preference/{report['card']}/{split_name(report)}"
        own = next((name for name in OWN_REWARDS if name in scorers), None)
        for name in (own, *BASELINES, PREFERENCE_REWARD):
            if name in scorers:
                yield f"{where}/{name}", scorers[name]["overall"]["mean"]
        if own is not None:
            yield f"{where}/excess share", scorers[own].get("excess_share")


def _win_measures(evaluation: Mapping[str, Any], seed: str) -> Iterator[tuple[str, float | None]]:
    """Win rates by rewards and by chat models, at every temperature."""
    for report in evaluation["judged"]:
        judge = report["judge"].removesuffix(seed)
        for row in report["rows"]:
            for name in OPPONENTS:
                share = row.get(f"wins_against_{name}")
                measure = f"wins/{judge}/against {name}@{row['temperature']:g}"
                yield measure, None if share is None else share["mean"]
    for report in evaluation["judged_by_chat"]:
        for row in report["rows"]:
            measure = f"wins/{report['judge']}/against {row['against']}@{row['temperature']:g}"
            yield measure, None if row["win_rate"] is None else row["win_rate"]["mean"]


def _benchmark_measures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The metrics of lm-eval's tasks that its table shows."""
    for result in evaluation["benchmarks"]:
        shots = "its own" if result["shots"] is None else result["shots"]
        rows = f" of {result['limit']} rows" if result["limit"] else ""
        for name in benchmark_metrics(result):
            metric = f"{name.removesuffix(',none')}{rows}"
            value = result["metrics"][name]["value"]
            yield f"lm_eval/{result['task']}/{metric}/{shots} shots", value
