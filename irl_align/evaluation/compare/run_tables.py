"""Tables of runs: their results, vital signs, rewards and costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from irl_align.evaluation.compare.policies import (
    AT_ENTROPY,
    BEYOND_ENTROPY,
    PARTS,
    evaluated_policies,
    evaluation_key,
    evaluations,
    gold_estimate,
    policy_accuracies,
    policy_label,
    policy_measures,
    reward_reports,
)
from irl_align.policy.roles import DEMONSTRATIONS, stage_role
from irl_align.reward.health import accuracies
from irl_align.training.run_folder import RunView
from irl_align.utils.statistics import few_clusters
from irl_align.utils.text_table import Cell, Column, Table, metric_name, percent

DECIMALS = {
    "prompts": 0,
    "bleu": 1,
    "chrf": 1,
    "length": 1,
    "kl": 2,
    "kl_bound": 2,
    "entropy": 2,
    "seconds": 0,
}
DECIMALS |= {"demonstration_logp": 2, "reward_gain": 2, "matched_temperature": 2}
"""Decimals of the metrics that are not shares. Shares are written in percent, with one decimal."""
VITAL_SIGNS = (
    *("kl", "entropy", "length", "truncated"),
    *("reward_accuracy", "fresh_accuracy", "two_sample_accuracy", "outliers"),
)
RESULTS_APART = "results, unseen and seen prompts"
RESULTS, VITALS = "results", "vital signs, at temperature 1"
TWO_DECIMALS = Column("", 2)
ACCURACIES = [
    Column("measured on"),
    percent("accuracy", unit="%"),
    percent("interval", unit="%"),
    Column("pairs", 0),
    Column("prompts", 0),
]
HEALTH = [Column("loss", 4), Column("margin", 3), percent("calibration error", unit="%")] + [
    Column(name, 2)
    for name in ("correlation with length", "agreement with older", "score mean", "score std")
]
EVALUATED = ("preference/", "wins/", "lm_eval/")
"""How the measures of `irl-align evaluate` begin; see irl_align.evaluation.tables."""
METRICS = ("fully_right", "bleu", "arithmetic_rate", "illegal_number_rate", "wrong_target_rate")
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
    base, *parts = metric.split("/")
    is_share = base not in DECIMALS
    if name is None:
        name = ", ".join([metric_name(base), *map(metric_name, parts)])
        unit = " %" if is_share and not unit_in_cells else ""
        name = f"{name}{unit} {AT.get(temperature, f'T={temperature}')}".strip()
    if is_share:
        unit = "%" if unit_in_cells else ""
        return percent(name, unit=unit, signed=signed, brackets=brackets)
    return Column(name, DECIMALS[base], signed=signed, brackets=brackets)


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
    apart = shown_measures({m for _, row in rows for m in row}, by_part((headline, *METRICS)))
    counts = [f"prompts/{part}" for part in PARTS]
    tables = [(RESULTS, ["prompts", *shown]), (VITALS, list(VITAL_SIGNS))]
    if apart:
        tables.insert(1, (RESULTS_APART, [*counts, *apart]))
    return [
        measures_table(
            title,
            rows,
            {m: measure_column(m, unit_in_cells=True, brackets=True) for m in measures},
        )
        for title, measures in tables
    ]


def by_part(metrics: Sequence[str]) -> list[str]:
    """The metrics over unseen and over seen prompts."""
    return [f"{metric}/{part}" for metric in metrics for part in PARTS]


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
            yield "demonstrations", own | _results(record, 1.0, [])
        for number in evaluated_policies(view):
            key = evaluation_key(view, number)
            if key not in seen:
                seen.add(key)
                measures: dict[str, Cell] = {**policy_measures(view, number)}
                measures |= policy_accuracies(view, number)
                answers = view.answers(number)
                for one in evaluations(view, number):
                    rows = answers.get(one["temperature"], [])
                    measures |= _results(one, one["temperature"], rows)
                yield f"{policy_label(view, number)}{seed}", measures


def _results(
    record: Mapping[str, Any], temperature: float, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Cell]:
    """The gold metrics of an evaluation with their intervals over its prompts, or the length of the
    samples if the data has no gold."""
    cells: dict[str, Cell] = {"prompts": len(rows)} if rows else {}
    if "headline" not in record:
        cells[f"length@{temperature:g}"] = record["length"]
    samples: dict[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] = {"": (record, rows)}
    for part in PARTS:
        own = [row for row in rows if row.get("seen") == (part == "seen")]
        if part in record:
            samples[f"/{part}"] = (record[part], own)
            cells[f"prompts/{part}"] = record[part]["prompts"]
    for part, (measured, answers) in samples.items():
        for name in measured.get("metrics", {}):
            estimate = gold_estimate(name, measured, answers)
            if estimate is not None:
                cells[f"{name}{part}@{temperature:g}"] = replace(estimate, clusters=None)
    return cells


def reward_tables(views: Sequence[RunView], title: str) -> list[Table]:
    """Accuracies of each iteration's reward next to those of shortcuts, its health, and the means
    of what a composed reward is made of.

    Several runs have a column for the run.
    """
    labels = [Column("run"), Column("iteration")] if len(views) > 1 else [Column("iteration")]
    shares, health = list[list[Cell]](), list[list[Cell]]()
    for view in views:
        for k, report in reward_reports(view):
            label: list[Cell] = [view.folder.name, str(k)] if len(views) > 1 else [str(k)]
            for name, one in accuracies(report).items():
                interval = ACCURACIES[2].bounds(one)
                shares.append([*label, name, one.mean, interval, one.n, one.clusters])
            held = report["held_out"]
            agreement = map(TWO_DECIMALS.text, report.get("agreement", {}).values())
            length = report["audit"].get("length_correlation")
            cells = [held["loss"], held["margin"], held["calibration_error"], length]
            health.append(
                [*label, *cells, ", ".join(agreement) or None, *report["demonstration_scores"]]
            )
    parts: list[list[Cell]] = [
        [view.folder.name, policy_label(view, k), name, mean]
        for view in views
        for k, record in view.records("vitals").items()
        for name, mean in record.get("reward_parts", {}).items()
    ]
    means = [Column("run"), Column("policy"), Column("part"), Column("mean", 3)]
    return [
        Table(f"{title}: accuracies", [*labels, *ACCURACIES], shares),
        Table(f"{title}: health; scores are those of demonstrations", [*labels, *HEALTH], health),
        Table(f"{title}: parts, each without its weight, of held-out samples", means, parts),
    ]


def accuracy_notes(views: Sequence[RunView]) -> list[str]:
    """A note if accuracies of the runs' rewards rest on few prompts."""
    shares = [
        share
        for view in views
        for _, report in reward_reports(view)
        for share in accuracies(report).values()
    ]
    note = few_clusters(shares)
    return [] if note is None else [note]


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
