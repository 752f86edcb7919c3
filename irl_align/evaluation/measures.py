"""The results of `irl-align evaluate` as measures that a comparison averages over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from irl_align.evaluation.preference_tables import BASELINES, PREFERENCE_REWARD, split_name
from irl_align.evaluation.tables import benchmark_metrics, read_evaluation
from irl_align.training.run_folder import RunView

OWN_REWARDS = ("reward", "implicit reward")


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
    parts = (
        _preferences(evaluation),
        _wins(evaluation, f"-seed{seed}"),
        _benchmarks(evaluation),
    )
    return {name: float(value) for part in parts for name, value in part if value is not None}


def _preferences(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
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


def _wins(evaluation: Mapping[str, Any], seed: str) -> Iterator[tuple[str, float | None]]:
    """Win rates by rewards and by chat models, at every temperature."""
    for report in evaluation["judged"]:
        judge = report["judge"].removesuffix(seed)
        for row in report["rows"]:
            for name in ("start", "demonstrations"):
                share = row.get(f"wins_against_{name}")
                measure = f"wins/{judge}/against {name}@{row['temperature']:g}"
                yield measure, None if share is None else share["mean"]
    for report in evaluation["judged_by_chat"]:
        for row in report["rows"]:
            measure = f"wins/{report['judge']}/against {row['against']}@{row['temperature']:g}"
            yield measure, None if row["win_rate"] is None else row["win_rate"]["mean"]


def _benchmarks(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The metrics of lm-eval's tasks that its table shows."""
    for result in evaluation["benchmarks"]:
        shots = "its own" if result["shots"] is None else result["shots"]
        rows = f" of {result['limit']} rows" if result["limit"] else ""
        for name in benchmark_metrics(result):
            metric = f"{name.removesuffix(',none')}{rows}"
            value = result["metrics"][name]["value"]
            yield f"lm_eval/{result['task']}/{metric}/{shots} shots", value
