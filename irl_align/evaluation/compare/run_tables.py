"""Tables of runs for the terminal. Reads run folders, never models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from irl_align.policy.roles import DEMONSTRATIONS, Role, stage_role
from irl_align.reward.health import audited_accuracy
from irl_align.training.run_folder import RunView, records_told
from irl_align.utils.text_table import spelt

MISSING = "-"
NONE = (None, None)


def results_table(views: Sequence[RunView]) -> Table:
    """One row per policy of each run: gold at every temperature (length where there is no gold)."""
    rows = _rows(views)
    temperatures = sorted({t for row in rows for t in row.evaluations}, reverse=True)
    records = [record for row in rows for record in row.evaluations.values()]
    headline = next((str(r["headline"]) for r in records if "headline" in r), None)
    metrics = [headline, "fully_right", "bleu"] if headline else ["length", "bleu"]
    metrics = [m for m in metrics if any(_value(r, m) is not None for r in records)]
    at = ["greedy" if t == 0 else f"T={t:g}" for t in temperatures]
    columns = [f"{spelt(metric)} {t}" for metric in metrics for t in at]
    table = _table("results", "policy", columns)
    for row in rows:
        table.add_row(
            row.label,
            *(
                _shown(metric, _value(row.evaluations.get(t, {}), metric))
                for metric in metrics
                for t in temperatures
            ),
        )
    return table


def vitals_table(views: Sequence[RunView]) -> Table:
    """One row per policy of each run: what its samples at temperature 1 look like, and how well
    the reward that it was improved on tells demonstrations from samples, old and fresh."""
    rows = _rows(views)
    columns = (
        "KL",
        "entropy per token",
        "length",
        "truncated",
        "reward accuracy",
        "fresh samples",
    )
    table = _table("vital signs, at temperature 1", "policy", columns)
    for row in rows:
        first = row.evaluations.get(1.0, {})
        kl = f"<= {first['kl_bound']:.2f}" if "kl_bound" in first else _number(first.get("kl"), 2)
        table.add_row(
            row.label,
            kl,
            _number(first.get("entropy"), 2),
            _number(first.get("length"), 1),
            _percent(first.get("truncated")),
            _percent(row.reward.get("held_out", {}).get("accuracy")),
            _percent(row.vitals.get("fresh_accuracy")),
        )
    return table


@dataclass(frozen=True)
class _Row:
    """One policy of a run: temperature -> evaluation record, its reward's and its own report."""

    label: str
    evaluations: dict[float, dict[str, Any]]
    reward: dict[str, Any]
    vitals: dict[str, Any]


def _rows(views: Sequence[RunView]) -> list[_Row]:
    """Every policy of the runs; one that several runs share (the demonstrations, SFT) once."""
    rows: dict[str, _Row] = {}
    seeds = {view.recipe["seed"] for view in views}
    for view in views:
        stages = {role: stage["key"] for role, stage in view.stages.items()}
        seed = f", seed {view.recipe['seed']}" if len(seeds) > 1 else ""
        if record := view.record(DEMONSTRATIONS):
            stage = stages.get(str(DEMONSTRATIONS), "demonstrations")
            rows.setdefault(stage, _Row("demonstrations", {1.0: record}, {}, {}))
        evaluations = view.evaluations()
        for number in sorted({r["policy"] for r in evaluations}):
            found = {r["temperature"]: r for r in evaluations if r["policy"] == number}
            rows.setdefault(
                stages.get(str(Role.evaluation(number, 1.0)), f"{view.folder}/{number}"),
                _Row(
                    f"{policy_label(view, number)}{seed}",
                    found,
                    view.record(Role.reward(number - 1)),
                    view.record(Role.vitals(number)),
                ),
            )
    return list(rows.values())


def policy_label(view: RunView, number: int) -> str:
    """A policy's name in tables: SFT, or the run's name and the iteration."""
    if number == 0:
        return "SFT" if view.recipe["sft"]["enabled"] else "start model"
    update = view.recipe["policy_update"]
    best = f", best of {update['n']}" if update.get("use") == "select" else ""
    return f"{view.recipe['name']} {number}{best}"


def _value(record: Mapping[str, Any], metric: str) -> float | None:
    value = {**record, **record.get("metrics", {})}.get(metric)
    return None if value is None else float(value)


def _shown(metric: str, value: float | None) -> str:
    return _number(value, 1) if metric in ("bleu", "length") else _percent(value)


def _table(title: str, label: str, numbers: Sequence[str]) -> Table:
    """A table of a column of labels and of narrow columns of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(label, vertical="bottom")
    for name in numbers:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def costs_table(view: RunView) -> Table:
    """Time and peak memory of a run's stages, those of one kind together."""
    columns = ("built", "reused", "seconds", "peak MiB")
    table = _table(f"costs of {view.folder.name}", "stage", columns)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for record in view.metrics:
        if stage_role(record) is not None:
            kinds.setdefault(str(record["stage"]), []).append(record)
    for kind, records in [*kinds.items(), ("total", [r for rs in kinds.values() for r in rs])]:
        reused = sum(bool(record["reused"]) for record in records)
        peaks = [r.get("peak_cuda_mib", r.get("peak_rss_mib")) for r in records]
        table.add_row(
            kind,
            str(len(records) - reused),
            str(reused),
            _number(sum(record.get("seconds") or 0.0 for record in records), 1),
            _number(max((peak for peak in peaks if peak is not None), default=None), 0),
        )
    return table


def reward_table(view: RunView) -> Table:
    """Held-out health of every iteration's reward, beside the shortcuts.

    In brackets the accuracy on the pairs that the shortcuts are judged on, where those are not all.
    """
    columns = (
        "accuracy",
        "loss",
        "margin",
        "calibration error",
        "older pairs",
        "fresh samples",
        "length alone",
        "EOS alone",
        "SFT log-prob",
    )
    title = f"rewards of {view.folder.name}, on held-out demonstrations"
    table = _table(title, "iteration", columns)
    for k, record in view.records("reward").items():
        held, audit = record["held_out"], record["audit"]
        audited = audited_accuracy(record)
        same = audited == held["accuracy"]
        older = ", ".join(_percent(report["accuracy"]) for report in record["older"].values())
        table.add_row(
            str(k),
            _percent(held["accuracy"]) + ("" if same else f" ({_percent(audited)})"),
            _number(held["loss"], 4),
            _number(held["margin"], 3),
            _percent(held["calibration_error"]),
            older or MISSING,
            _percent(view.record(Role.vitals(k + 1)).get("fresh_accuracy")),
            _percent(audit["length"]),
            _percent(audit["truncation"]),
            _percent(max(audit["logprob_sum"], audit["logprob_mean"])),
        )
    return table


def drift_table(view: RunView) -> Table:
    """What every iteration's reward leans to, and how far it is from the one before."""
    columns = ("correlation with length", "agreement with older", "score mean", "score std")
    table = _table("leaning and drift, the scores those of demonstrations", "iteration", columns)
    for k, record in view.records("reward").items():
        agreement = [_number(one, 2) for one in record.get("agreement", {}).values()]
        table.add_row(
            str(k),
            _number(record["audit"].get("length_correlation"), 2),
            ", ".join(agreement) or MISSING,
            # Before they are normalised.
            *(_number(one, 2) for one in view.record(Role.reward_fit(k)).get("normaliser", NONE)),
        )
    return table


def show_runs(views: Sequence[RunView], console: Console) -> None:
    """Print results, vital signs, rewards, costs and signs of runs."""
    with records_told(", ".join(str(view.folder) for view in views)):
        _show(views, console)


def show_policies(views: Sequence[RunView], console: Console) -> None:
    """Print results and vital signs of the policies that there are so far."""
    console.print(results_table(views))
    console.print(vitals_table(views))


def _show(views: Sequence[RunView], console: Console) -> None:
    show_policies(views, console)
    for view in views:
        if view.records("reward"):
            console.print(reward_table(view))
            console.print(drift_table(view))
        console.print(costs_table(view))
        for sign in view.signs():
            console.print(f"sign: {sign}", markup=False)
        ended = view.summary["ended"] if view.summary else "not finished: run the recipe again"
        console.print(f"{view.folder}: {ended}", markup=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int) -> str:
    # Adding 0 makes of -0.0 a 0.
    return MISSING if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
