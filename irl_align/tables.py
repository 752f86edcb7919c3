"""Tables of runs for the terminal. Reads run folders, never models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from irl_align.stages import RunView

MISSING = "-"


def results_table(views: Sequence[RunView]) -> Table:
    """One row per policy of each run: gold at every temperature, KL, length, reward accuracy."""
    records = {id(view): {r["key"]: r for r in view.metrics} for view in views}
    temperatures = sorted(
        {r["temperature"] for rs in records.values() for r in rs.values() if "temperature" in r},
        reverse=True,
    )
    table = Table(title="results", title_justify="left")
    table.add_column("policy")
    headline = _headline(records.values())
    for t in temperatures:
        name = "greedy" if t == 0 else f"T={t:g}"
        if headline:
            table.add_column(f"{headline.replace('_', ' ')} {name}", justify="right")
            table.add_column(f"fully right {name}", justify="right")
        table.add_column(f"BLEU {name}" if headline else f"length {name}", justify="right")
    for column in ("KL to pi_0", "length", "truncated", "reward accuracy"):
        table.add_column(column, justify="right")
    shown: set[str] = set()
    for view in views:
        by_key = records[id(view)]
        for label, evaluations, stages in _policies(view, by_key):
            if stages in shown:
                continue
            shown.add(stages)
            table.add_row(label, *_cells(evaluations, temperatures, headline, by_key))
    return table


def _headline(all_records: Iterable[Mapping[str, Any]]) -> str | None:
    for records in all_records:
        for record in records.values():
            if "headline" in record:
                return str(record["headline"])
    return None


def _policies(
    view: RunView, by_key: Mapping[str, Any]
) -> Iterable[tuple[str, dict[float, Any], str]]:
    """(label, temperature -> evaluation record, key that names what was evaluated)."""
    if "evaluation/demonstrations" in by_key:
        record = by_key["evaluation/demonstrations"]
        stage = view.stages.get("evaluation/demonstrations", {}).get("key", "demonstrations")
        yield "demonstrations", {1.0: {**record, "policy": None}}, stage
    numbers = sorted(
        {
            r["policy"]
            for r in by_key.values()
            if r["key"].startswith("evaluation/") and "policy" in r
        }
    )
    for number in numbers:
        found = {
            r["temperature"]: r
            for r in by_key.values()
            if r["key"].startswith(f"evaluation/{number}/")
        }
        role = f"evaluation/{number}/t1"
        stage = view.stages.get(role, {}).get("key", f"{view.folder}/{number}")
        name = view.recipe["name"]
        label = "SFT" if number == 0 else f"{name} {number}"
        yield f"{label} (seed {view.recipe['seed']})", found, stage


def _cells(
    evaluations: Mapping[float, Any],
    temperatures: Sequence[float],
    headline: str | None,
    by_key: Mapping[str, Any],
) -> list[str]:
    cells = []
    for t in temperatures:
        record = evaluations.get(t, {})
        metrics = record.get("metrics", {})
        if headline:
            cells.append(_percent(metrics.get(headline)))
            cells.append(_percent(metrics.get("fully_right")))
        cells.append(_number(metrics.get("bleu") if headline else record.get("length"), 1))
    first = evaluations.get(1.0, {})
    kl = _number(first.get("kl"), 2)
    if "kl_bound" in first:
        kl = f"<= {first['kl_bound']:.2f}"
    cells += [kl, _number(first.get("length"), 1), _percent(first.get("truncated"))]
    number = first.get("policy")
    fit = by_key.get(f"reward/{number - 1}") if number else None
    cells.append(_percent(fit["held_out"]["accuracy"]) if fit else MISSING)
    return cells


def costs_table(view: RunView) -> Table:
    """Time and peak memory of every stage of a run, and whether it was reused."""
    table = Table(title=f"stages of {view.folder.name}", title_justify="left")
    for column in ("stage", "seconds", "peak MiB", ""):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for record in view.metrics:
        if record["key"].startswith("stage/"):
            peak = record.get("peak_cuda_mib", record.get("peak_rss_mib"))
            table.add_row(
                record["key"].removeprefix("stage/"),
                _number(record.get("seconds"), 1),
                _number(peak, 0),
                "reused" if record["reused"] else "",
            )
    return table


def reward_table(view: RunView) -> Table:
    """Held-out health of every iteration's reward, beside the shortcuts on the same pairs."""
    table = Table(title=f"rewards of {view.folder.name}", title_justify="left")
    columns = (
        "iteration",
        "accuracy",
        "loss",
        "margin",
        "calibration error",
        "older pairs",
        "fresh samples",
        "length alone",
        "truncation alone",
        "SFT log-prob",
    )
    for column in columns:
        table.add_column(column, justify="right")
    by_key = {record["key"]: record for record in view.metrics}
    for key, record in by_key.items():
        if not key.startswith("reward/"):
            continue
        k = int(key.removeprefix("reward/"))
        held, audit = record["held_out"], record["audit"]
        older = ", ".join(_percent(report["accuracy"]) for report in record["older"].values())
        table.add_row(
            str(k),
            _percent(held["accuracy"]),
            _number(held["loss"], 4),
            _number(held["margin"], 3),
            _percent(held["calibration_error"]),
            older or MISSING,
            _percent(by_key.get(f"vitals/{k + 1}", {}).get("fresh_accuracy")),
            _percent(audit["length"]),
            _percent(audit["truncation"]),
            _percent(max(audit["logprob_sum"], audit["logprob_mean"])),
        )
    return table


def signs(view: RunView) -> list[str]:
    """Every warning sign of a run, one line each."""
    return [
        f"{record['key'].removeprefix('signs/')}: {sign}"
        for record in view.metrics
        if record["key"].startswith("signs/")
        for sign in record["signs"]
    ]


def show_runs(views: Sequence[RunView], console: Console) -> None:
    """Print results, rewards, costs and signs of runs."""
    console.print(results_table(views))
    for view in views:
        if any(record["key"].startswith("reward/") for record in view.metrics):
            console.print(reward_table(view))
        console.print(costs_table(view))
        for sign in signs(view):
            console.print(f"sign: {sign}", markup=False)
        ended = view.summary["ended"] if view.summary else "not finished: run the recipe again"
        console.print(f"{view.folder}: {ended}", markup=False)


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
