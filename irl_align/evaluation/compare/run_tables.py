"""Tables of runs: their results, vital signs, rewards and costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from irl_align.evaluation.compare.policies import (
    AT_ENTROPY,
    BEYOND_ENTROPY,
    evaluated_policies,
    evaluation_key,
    evaluations,
    gold_measures,
    policy_label,
    policy_measures,
    reward_reports,
)
from irl_align.policy.roles import DEMONSTRATIONS, stage_role
from irl_align.reward.health import audited_accuracy
from irl_align.training.run_folder import RunView
from irl_align.utils.text_table import Cell, Column, Table, metric_name, percent

DECIMALS = {"bleu": 1, "chrf": 1, "length": 1, "kl": 2, "kl_bound": 2, "entropy": 2, "seconds": 0}
DECIMALS |= {"demonstration_logp": 2, "reward_gain": 2, "matched_temperature": 2}
"""Decimals of the metrics that are not shares. Shares are written in percent, with one decimal."""
VITAL_SIGNS = (
    *("kl", "entropy", "length", "truncated"),
    *("reward_accuracy", "fresh_accuracy"),
)
RESULTS, VITALS = "results", "vital signs, at temperature 1"
SHARE, TWO_DECIMALS = percent("", unit="%"), Column("", 2)
HEALTH = [
    percent("accuracy", unit="%"),
    Column("loss", 4),
    Column("margin", 3),
    *(
        percent(name, unit="%")
        for name in (
            "calibration error",
            "older pairs",
            "fresh samples",
            "length only",
            "EOS only",
            "SFT log-prob",
        )
    ),
]
DRIFT = [
    Column(name, 2)
    for name in ("correlation with length", "agreement with older", "score mean", "score std")
]
EVALUATED = ("preference/", "wins/", "lm_eval/")
"""How the measures of `irl-align evaluate` begin; see irl_align.evaluation.tables."""
METRICS = ("fully_right", "bleu")
"""Gold metrics that are shown after the headline."""
ENTROPIES = (AT_ENTROPY, BEYOND_ENTROPY)
AT = {"": "", "0": "greedy", AT_ENTROPY: "first policy at its entropy"}
AT |= {BEYOND_ENTROPY: "beyond entropy"}


def measure_column(
    measure: str,
    name: str | None = None,
    *,
    unit_in_cells: bool = False,
    signed: bool = False,
    brackets: bool = False,
) -> Column:
    """The column of a measure, whose name is `slot error rate % greedy` for `slot_error_rate@0`."""
    metric, _, temperature = measure.partition("@")
    is_share = metric not in DECIMALS
    if name is None:
        name = ", ".join(metric.split("/")) if metric.startswith(EVALUATED) else metric
        unit = " %" if is_share and not unit_in_cells else ""
        name = f"{metric_name(name)}{unit} {AT.get(temperature, f'T={temperature}')}".strip()
    if is_share:
        unit = "%" if unit_in_cells else ""
        return percent(name, unit=unit, signed=signed, brackets=brackets)
    return Column(name, DECIMALS[metric], signed=signed, brackets=brackets)


def shown_measures(measures: Iterable[str], metrics: Sequence[str]) -> list[str]:
    """The measures of these metrics at a temperature, each from the highest to greedy."""

    def order(measure: str) -> tuple[int, float]:
        metric, _, temperature = measure.partition("@")
        return metrics.index(metric), -float(temperature)

    at_temperature = {m for m in measures if m.partition("@")[2] not in ("", *ENTROPIES)}
    return sorted((m for m in at_temperature if m.partition("@")[0] in metrics), key=order)


def measures_table(
    title: str, rows: Iterable[tuple[str, Mapping[str, Cell]]], columns: Mapping[str, Column]
) -> Table:
    """A row for each (policy's label, measure -> cell) and a column for each measure."""

    def cell(measures: Mapping[str, Cell], name: str) -> Cell:
        if name == "kl" and "kl_bound" in measures:
            return f"<= {columns[name].text(measures['kl_bound'])}"
        return measures.get(name)

    cells = [[label, *(cell(measures, name) for name in columns)] for label, measures in rows]
    return Table(title, [Column("policy"), *columns.values()], cells)


def policy_tables(views: Sequence[RunView]) -> list[Table]:
    """Results and vital signs, with one row for each policy of each run.

    A policy that several runs share (the demonstrations, SFT) has one row.
    """
    rows = list(_policies(views))
    records = [record for view in views for record in view.metrics]
    headline = next((str(r["headline"]) for r in records if "headline" in r), "length")
    shown = shown_measures({m for _, row in rows for m in row}, (headline, *METRICS))
    results = {m: measure_column(m, unit_in_cells=True) for m in shown}
    vitals = {m: measure_column(m, unit_in_cells=True) for m in VITAL_SIGNS}
    return [measures_table(RESULTS, rows, results), measures_table(VITALS, rows, vitals)]


def _policies(views: Sequence[RunView]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """(label, measures) of each policy of the runs; a policy that runs share comes once."""
    seen: set[str] = set()
    seeds = {view.recipe["seed"] for view in views}
    for view in views:
        seed = f", seed {view.recipe['seed']}" if len(seeds) > 1 else ""
        record = view.record(DEMONSTRATIONS)
        stage = view.stages.get(str(DEMONSTRATIONS), {"key": "demonstrations"})
        if record and stage["key"] not in seen:
            seen.add(stage["key"])
            own = {"length": record["length"], "truncated": record.get("truncated")}
            yield "demonstrations", own | _results(record, 1.0)
        for number in evaluated_policies(view):
            key = evaluation_key(view, number)
            if key not in seen:
                seen.add(key)
                measures: dict[str, Cell] = {**policy_measures(view, number)}
                for one in evaluations(view, number):
                    measures |= _results(one, one["temperature"])
                yield f"{policy_label(view, number)}{seed}", measures


def _results(record: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The gold metrics of an evaluation, or the length of the samples if the data has no gold."""
    if "headline" in record:
        return gold_measures(record, temperature)
    return {f"length@{temperature:g}": record["length"]}


def reward_tables(views: Sequence[RunView], title: str) -> list[Table]:
    """Held-out health of each iteration's reward next to shortcuts, and its drift.

    The accuracy in round brackets is on the pairs that the shortcuts are judged on, if these are
    not all pairs. Several runs have a column for the run.
    """
    labels = [Column("run"), Column("iteration")] if len(views) > 1 else [Column("iteration")]
    health, drift = [], []
    for view in views:
        for k, report in reward_reports(view):
            label = [view.folder.name, str(k)] if len(views) > 1 else [str(k)]
            health.append([*label, *_health(report)])
            agreement = map(TWO_DECIMALS.text, report.get("agreement", {}).values())
            length = report["audit"].get("length_correlation")
            drift.append([*label, length, _listed(agreement), *report["normaliser"]])
    return [
        Table(title, [*labels, *HEALTH], health),
        Table("reward drift; scores are those of demonstrations", [*labels, *DRIFT], drift),
    ]


def _health(report: Mapping[str, Any]) -> list[Cell]:
    """Cells of HEALTH."""
    held, audit = report["held_out"], report["audit"]
    accuracy, audited = held["accuracy"], audited_accuracy(report)
    shown = SHARE.text(accuracy)
    return [
        shown if audited == accuracy else f"{shown} ({SHARE.text(audited)})",
        held["loss"],
        held["margin"],
        held["calibration_error"],
        _listed(SHARE.text(older["accuracy"]) for older in report["older"].values()),
        report["fresh"],
        audit["length"],
        audit["truncation"],
        max(audit["logprob_sum"], audit["logprob_mean"]),
    ]


def _listed(texts: Iterable[str]) -> str | None:
    return ", ".join(texts) or None


def costs_table(view: RunView) -> Table:
    """Time and peak memory of a run's stages, summed over the stages of one kind."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for record in view.metrics:
        if stage_role(record) is not None:
            kinds.setdefault(str(record["stage"]), []).append(record)
    kinds["total"] = [record for records in kinds.values() for record in records]
    rows: list[list[Cell]] = []
    for kind, records in kinds.items():
        reused = sum(bool(record["reused"]) for record in records)
        seconds = sum(record.get("seconds") or 0.0 for record in records)
        peaks = [r.get("peak_cuda_mib", r.get("peak_rss_mib")) for r in records]
        peak = max((peak for peak in peaks if peak is not None), default=None)
        rows.append([kind, len(records) - reused, reused, seconds, peak])
    numbers = (("built", 0), ("reused", 0), ("seconds", 1), ("peak MiB", 0))
    columns = [Column("stage"), *(Column(*number) for number in numbers)]
    return Table(f"costs of {view.folder.name}", columns, rows)


def run_tables(view: RunView) -> list[Table]:
    """Rewards and costs of one run."""
    title = f"rewards of {view.folder.name}, on held-out demonstrations"
    rewards = [table for table in reward_tables([view], title) if table.rows]
    return [*rewards, costs_table(view)]


def run_ending(view: RunView) -> str:
    """How a run ended."""
    return str(view.summary["ended"]) if view.summary else "not finished: run the recipe again"
