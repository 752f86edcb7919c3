"""What was evaluated of runs, over seeds, on run folders written by hand."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_runs import synthetic_run

from irl_align.evaluation.compare.aggregate import AnalysisOptions, analyse, compare_runs
from irl_align.evaluation.compare.tables import comparison_tables, notes, to_csv
from irl_align.evaluation.tables import (
    benchmark_table,
    evaluated_runs,
    evaluation_measures,
    evaluation_notes,
    evaluation_tables,
)
from irl_align.training.run_folder import Run, RunView


def share(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 50}


def evaluation(accuracy: float, wins: float, **of: Any) -> dict[str, Any]:
    """An evaluation.json of one set, one judge of each kind, and one benchmark."""
    scorers = {
        "reward": {"overall": share(accuracy), "excess_share": 0.8},
        "longer wins": {"overall": share(0.55)},
        "a run beside": {"overall": share(0.9)},
    }
    row = {"temperature": 1.0, "wins_against_start": share(wins)}
    chat = {"temperature": 0.0, "against": "start", "win_rate": share(0.6)}
    silent = {"temperature": 0.0, "against": "demonstrations", "win_rate": None}
    return {
        "of": {"policy": None, "reward": None, **of},
        "best_of": None,
        "sets": [{"card": "pairs", "split": "test", "scorers": scorers, "only": None}],
        "judged": [{"judge": "judge-seed1", "policy": "m", "rows": [row]}],
        "judged_by_chat": [{"judge": "chat", "url": "u", "rows": [chat, silent]}],
        "benchmarks": [
            {
                "task": "arc_challenge",
                "shots": 25,
                "limit": None,
                "rows": 9,
                "metrics": {"acc,none": {"value": 0.3}, "acc_norm,none": {"value": 0.4}},
            },
            {"task": "own", "shots": None, "limit": 9, "metrics": {"acc,none": {"value": 0.7}}},
        ],
    }


def run_of(root: Path, name: str, seed: int, actual: dict[str, Any] | None) -> RunView:
    folder = synthetic_run(root, name, seed, [(0.3, 0.2), (0.2, 0.1)])
    if actual is not None:
        (folder / "evaluation.json").write_text(json.dumps(actual), encoding="utf-8")
    return Run.load(folder)


def test_measures_of_an_evaluation() -> None:
    assert evaluation_measures(evaluation(0.7, 0.65), seed=1) == {
        "preference/pairs/test/reward": 0.7,
        "preference/pairs/test/longer wins": 0.55,
        "preference/pairs/test/excess share": 0.8,
        "wins/judge/against start@1": 0.65,
        "wins/chat/against start@0": 0.6,
        "lm_eval/arc_challenge/acc_norm/25 shots": 0.4,
        "lm_eval/own/acc of 9 rows/its own shots": 0.7,
    }
    assert "wins/judge-seed1/against start@1" in evaluation_measures(evaluation(0.7, 0.6), seed=2)


def test_evaluations_over_seeds(tmp_path: Path) -> None:
    views = [
        run_of(tmp_path, name, seed, evaluation(base + seed / 100, 0.6))
        for name, base in (("a", 0.60), ("b", 0.70))
        for seed in (1, 2, 3)
    ]
    comparison = compare_runs(views, evaluated=evaluated_runs(views))
    analysis = analyse(comparison, AnalysisOptions("preference/pairs/test/reward", "a"))
    assert [r["label"] for r in analysis["ranking"]] == ["b", "a"]
    (grid,) = [g for g in comparison_tables(analysis) if g.title.startswith("evaluations")]
    lines = {tuple(line[:2]): line[2:] for line in grid.texts()}
    accuracy = "preference, pairs, test, reward %"
    assert lines["a", accuracy] == ["62.0±2.5", "-", "-"]
    assert lines["b", accuracy] == ["72.0±2.5", "+10.0", "-"]
    assert lines["b", "wins, chat, against start % greedy"][0] == "60.0"
    # Judged by a run of seed 1 in every seed: another judge than seed 1's own, so not in all.
    assert not any("judge" in metric for _, metric in lines)
    equal = "the same difference in all seeds, which gives no interval and no t-test: "
    (line,) = [line for line in notes(analysis) if line.startswith(equal)]
    assert "b (preference/pairs/test/reward)" in line
    few = "3 seeds are few: the sign-flip test cannot give p below 0.25, t intervals rely on normal"
    assert any(line.startswith(few) for line in notes(analysis))
    message = "b: not evaluated in all of its runs: wins/judge-seed1/against start@1, "
    assert any(message in line for line in notes(analysis))
    rows = list(csv.DictReader(io.StringIO(to_csv(analysis))))
    (cells,) = [
        r for r in rows if (r["policy"], r["measure"]) == ("b", "preference/pairs/test/reward")
    ]
    assert float(cells["mean"]) == pytest.approx(0.72) and cells["seeds"] == "3"


def test_what_some_runs_lack_or_was_of_another_policy_is_no_mean(tmp_path: Path) -> None:
    views = [
        run_of(tmp_path, "a", 1, evaluation(0.6, 0.6)),
        run_of(tmp_path, "a", 2, evaluation(0.9, 0.6, policy="store/gone")),
        run_of(tmp_path, "b", 1, None),
    ]
    actual = evaluated_runs(views)
    assert list(actual) == [views[0].folder]
    analysis = analyse(compare_runs(views, evaluated=actual))
    assert not [g for g in comparison_tables(analysis) if g.title.startswith("evaluations")]
    (line,) = [line for line in notes(analysis) if "not evaluated in all" in line]
    assert line.startswith("not compared: a: ") and "preference/pairs/test/reward" in line


def test_benchmark_table_gives_a_share_of_all_rows_wilsons_interval() -> None:
    metrics = {"acc,none": {"value": 1.0, "stderr": 0.0}}
    result = {"task": "own", "shots": 0, "limit": None, "rows": 5, "metrics": metrics}
    ((*_, value, rows),) = benchmark_table([result]).texts()
    # 5 / (5 + 1.96^2) is the lower bound.
    assert (value, rows) == ("100.0 [56.6, 100.0]", "5")


def test_judge_tables_have_win_rates_on_unseen_prompts_and_say_that_prompts_are_few() -> None:
    measured = evaluation(0.7, 0.65)
    (row,) = measured["judged"][0]["rows"]
    row |= {"samples": 60, "judge_score": 0.5, "distinct_bigrams": 0.5}
    row["wins_against_start_unseen"] = {**share(0.5), "n": 12, "clusters": 12}
    measured |= {"sets": [], "judged_by_chat": [], "benchmarks": []}
    (table,) = evaluation_tables(measured)
    assert table.columns[3].name == "against start, prompts not in training"
    assert table.texts()[0][3] == "50.0 [40.0, 60.0] n=12"
    (note,) = evaluation_notes(measured)
    assert note.startswith("judges: accuracies over fewer than 30 prompts (the fewest: 12)")
