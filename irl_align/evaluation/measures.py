"""What `irl-align evaluate` found of a run, as measures that a comparison takes over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irl_align.evaluation.lm_eval_tasks import LEADERBOARD
from irl_align.evaluation.preference_tables import BASELINES, split_name
from irl_align.evaluation.tables import read_evaluation
from irl_align.training.run_folder import RunView

OWN = ("reward", "implicit reward")
BESIDE = (*BASELINES, "trained on preferences")


def evaluated_runs(views: Sequence[RunView]) -> dict[Path, dict[str, float]]:
    """Folder -> measures, of the runs that were evaluated as they are now."""
    return {
        view.folder: evaluation_measures(found, view.recipe["seed"])
        for view in views
        if (found := read_evaluation(view)) is not None
    }


def evaluation_measures(found: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Shares by measure: accuracy on preference sets, win rates and benchmarks.

    `preference/CARD/SPLIT/SCORER`, `wins/JUDGE/against_OTHER@TEMPERATURE` and
    `lm_eval/TASK/METRIC/SHOTS`. A judge that is a run of this seed is told by its name alone, so
    that every seed may have its own. What `--beside` named is left out: it is no run's own.
    """
    parts = (_preferences(found), _wins(found, f"-seed{seed}"), _benchmarks(found))
    return {name: float(value) for part in parts for name, value in part if value is not None}


def _preferences(found: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The accuracy of the run's own reward and of what stands beside every one; its excess."""
    for report in found["sets"]:
        if report.get("only"):
            continue  # a part of a set, beside which the whole may stand
        scorers, where = report["scorers"], f"preference/{report['card']}/{split_name(report)}"
        own = next((name for name in OWN if name in scorers), None)
        for name in (own, *BESIDE):
            if name in scorers:
                yield f"{where}/{name}", scorers[name]["overall"]["mean"]
        if own is not None:
            yield f"{where}/excess share", scorers[own].get("excess_share")


def _wins(found: Mapping[str, Any], seed: str) -> Iterator[tuple[str, float | None]]:
    """Win rates by rewards and by chat models, at every temperature."""
    for report in found["judged"]:
        judge = report["judge"].removesuffix(seed)
        for row in report["rows"]:
            for name in ("start", "demonstrations"):
                share = row.get(f"wins_against_{name}")
                measure = f"wins/{judge}/against {name}@{row['temperature']:g}"
                yield measure, None if share is None else share["mean"]
    for report in found.get("judged_by_chat", []):
        for row in report["rows"]:
            measure = f"wins/{report['judge']}/against {row['against']}@{row['temperature']:g}"
            yield measure, None if row["win_rate"] is None else row["win_rate"]["mean"]


def _benchmarks(found: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Every metric of lm-eval's tasks; of the leaderboard's the leaderboard's alone."""
    for result in found.get("benchmarks", []):
        usual = LEADERBOARD.get(result["task"], (None, ""))[1]
        for name, value in result["metrics"].items():
            if name == usual or usual not in result["metrics"]:
                shots = "its own" if result["shots"] is None else result["shots"]
                part = f" of {result['limit']} rows" if result.get("limit") else ""
                metric = name.removesuffix(",none")
                yield f"lm_eval/{result['task']}/{metric}{part}/{shots} shots", value["value"]
