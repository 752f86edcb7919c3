"""What runs measured of each of their policies and rewards, read from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from irl_align.policy.roles import Role
from irl_align.reward.health import accuracy
from irl_align.training.run_folder import RunView
from irl_align.utils.statistics import Estimate, clustered_ratio

VITALS = ("kl", "kl_bound", "entropy", "length", "truncated")
AT_ENTROPY, BEYOND_ENTROPY = "first-at-entropy", "beyond-entropy"
"""They follow a gold metric's name in place of a temperature: the value of the first policy sampled
at a policy's entropy, and the policy's value at temperature 1 minus that."""


FRESH = ("fresh", "two_sample")
PARTS = ("unseen", "seen")
"""Evaluation prompts by whether they are in the training data as well."""
# Corpus metric -> (numerator, denominator) in a sample's row; other metrics are means of rows.
RATIOS = {"slot_error_rate": ("slot_errors", "slots")}


def by_method(views: Sequence[RunView]) -> dict[str, list[RunView]]:
    """Recipe name -> its runs, in the order of the runs."""
    methods: dict[str, list[RunView]] = {}
    for view in views:
        methods.setdefault(view.recipe["name"], []).append(view)
    return methods


def policy_label(view: RunView, number: int) -> str:
    """Name of a policy in tables: SFT, or the run's name and the iteration."""
    if number == 0:
        return "SFT" if view.recipe["sft"]["enabled"] else "start model"
    update = view.recipe["policy_update"]
    best = f", best of {update['n']}" if update.get("use") == "select" else ""
    return f"{view.recipe['name']} {number}{best}"


def evaluations(view: RunView, number: int) -> list[dict[str, Any]]:
    """The evaluations of one policy, one for each temperature."""
    return [record for record in view.evaluations() if record["policy"] == number]


def evaluated_policies(view: RunView) -> list[int]:
    """Numbers of the policies that were evaluated, in ascending order."""
    return sorted({record["policy"] for record in view.evaluations()})


def final_policy(view: RunView) -> int:
    """Number of the policy that a finished run ended with."""
    return int(view.require_finished()["policy_number"])


def evaluation_key(view: RunView, number: int) -> str:
    """Key of a policy's evaluation in the store, which runs that share the policy share."""
    stage = view.stages.get(str(Role.evaluation(number, 1.0)))
    return stage["key"] if stage else f"{view.folder}/{number}"


def policy_measures(view: RunView, number: int) -> dict[str, float]:
    """Everything that a run measured of one policy, by measure; null values are left out.

    `bleu@0.7` is a gold metric at that temperature; 0 is greedy decoding.
    """
    measures: dict[str, Any] = {}
    for record in evaluations(view, number):
        measures |= gold_measures(record, record["temperature"])
        if record["temperature"] == 1.0:
            measures |= {name: record.get(name) for name in VITALS}
    vitals = view.record(Role.vitals(number))
    for name in ("demonstration_logp", "reward_gain", "outliers"):
        measures[name] = vitals.get(name)
    measures |= _beyond_entropy(view, number)
    measures |= {name: share.mean for name, share in policy_accuracies(view, number).items()}
    return {name: float(value) for name, value in measures.items() if value is not None}


def policy_accuracies(view: RunView, number: int) -> dict[str, Estimate]:
    """Accuracies of the reward that policy `number` was improved on: on held-out pairs, and on the
    policy's fresh samples; and of a discriminator on the fresh samples."""
    reports = {
        "reward_accuracy": view.record(Role.reward(number - 1)).get("held_out", {}),
        "fresh_accuracy": view.record(Role.vitals(number)).get("fresh", {}),
        "two_sample_accuracy": view.record(Role.vitals(number)).get("two_sample", {}),
    }
    return {name: share for name, own in reports.items() if (share := accuracy(own))}


def gold_estimate(
    metric: str, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Estimate | None:
    """A corpus metric of an evaluation with its interval, one cluster per prompt.

    rows: the evaluation's samples. No bounds where the rows do not add up to the metric.
    """
    value = record.get("metrics", {}).get(metric)
    if value is None:
        return None
    top, bottom = RATIOS.get(metric, (metric, ""))
    numbers = [(row.get(top), row.get(bottom) if bottom else 1.0) for row in rows]
    if numbers and not any(None in pair for pair in numbers):
        interval = clustered_ratio(*zip(*numbers, strict=True))
        if math.isclose(interval.mean, value, rel_tol=1e-6, abs_tol=1e-9):
            return interval
    return Estimate(value, None, None, len(rows), len(rows) or None)


def gold_measures(record: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The gold metrics of an evaluation, by measure.

    `bleu/unseen@1` is over the prompts that are not in the training data, `bleu/seen@1` over those
    that are; both are there only if training has seen some of the prompts.
    """
    measures = {f"{name}@{temperature:g}": v for name, v in record.get("metrics", {}).items()}
    for part in PARTS:
        for name, value in record.get(part, {}).get("metrics", {}).items():
            measures[f"{name}/{part}@{temperature:g}"] = value
    return measures


def _beyond_entropy(view: RunView, number: int) -> dict[str, Any]:
    """Headline of the first policy at this policy's entropy, and this policy's at T=1 minus it.

    The first policy equals itself; it has no such measures if no other policy was matched.
    """
    matched = view.record(Role.matched_entropy(number))
    if number == 0:
        matched = next(iter(view.records("matched-entropy").values()), {})
    if not matched:
        return {}
    headline = matched["headline"]
    own = view.record(Role.evaluation(number, 1.0)).get("metrics", {}).get(headline)
    start = own if number == 0 else matched["metrics"][headline]
    known = start is not None and own is not None
    measures = {
        f"{headline}@{AT_ENTROPY}": start,
        f"{headline}@{BEYOND_ENTROPY}": own - start if known else None,
    }
    return measures if number == 0 else {"matched_temperature": matched["temperature"], **measures}


def reward_reports(view: RunView) -> Iterator[tuple[int, dict[str, Any]]]:
    """(iteration, report of its reward). To the held-out report are added `fresh` and `two_sample`,
    the reports of the reward and of a discriminator on samples of the next policy, and
    `demonstration_scores`, their mean and deviation."""
    for k, record in view.records("reward").items():
        yield (
            k,
            {
                **record,
                **{what: view.record(Role.vitals(k + 1)).get(what) for what in FRESH},
                "demonstration_scores": view.record(Role.reward_fit(k)).get(
                    "demonstration_scores", (None, None)
                ),
            },
        )
