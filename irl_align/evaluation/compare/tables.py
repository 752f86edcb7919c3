"""A comparison as text, CSV and Markdown. Reads what comparison.analyse says, nothing else."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from rich.console import Console

from irl_align.evaluation.compare.aggregate import AT_ENTROPY, BEYOND_ENTROPY, EVALUATED
from irl_align.evaluation.compare.cost_tables import (
    costs,
    costs_by_iteration,
    memory_by_part,
    tokens_by_part,
)
from irl_align.utils.text_table import MISSING, Grid, escaped, grid_markdown, show_grid, spelt

Analysis = Mapping[str, Any]
# Metrics of any gold that are shown beside its headline; the CSV and JSON files have all.
SHOWN = ("fully_right", "bleu", "chrf")
PLAIN = {"bleu": 1, "chrf": 1, "length": 1, "kl": 2, "kl_bound": 2, "entropy": 2, "seconds": 0}
PLAIN |= {"demonstration_logp": 2, "reward_gain": 2, "matched_temperature": 2}
"""Decimals of the metrics that are no share; of others percent are shown, with one."""
VITALS = {
    "kl": "KL",
    "entropy": "entropy per token",
    "length": "length",
    "truncated": "truncated %",
    "reward_accuracy": "reward accuracy %",
    "fresh_accuracy": "fresh samples %",
    "reward_gain": "reward gain",
    "seconds": "seconds",
}
MATCHED = {AT_ENTROPY: "first policy at its entropy", BEYOND_ENTROPY: "beyond that"}
BEYOND = "beyond entropy"
# What a table is about; the report has a section of each.
RESULTS, GAINS, PPO, COST = "Results", "Gold against KL", "PPO", "Cost"


def grids(analysis: Analysis) -> list[Grid]:
    """The tables of a comparison: results, vital signs, against the baseline, ranking, costs."""
    return [grid for section in grids_by_section(analysis).values() for grid in section]


def grids_by_section(analysis: Analysis) -> dict[str, list[Grid]]:
    """The tables by what they are about, the results first; those without rows are left out."""
    made = {name: [table(analysis) for table in tables] for name, tables in SECTIONS.items()}
    return {name: [grid for grid in tables if grid.rows] for name, tables in made.items()}


def results(analysis: Analysis) -> Grid:
    """Gold of every row at every temperature; length where there is no gold."""
    measures = headline_measures(analysis) or ["length"]
    rows = [[row["label"], *(cell(row, m, analysis) for m in measures)] for row in analysis["rows"]]
    return Grid("results", ["policy", *map(column_name, measures)], rows)


def headline_measures(analysis: Analysis) -> list[str]:
    """The headline and the metrics shown beside it, each from the hottest samples to greedy."""
    present = {
        m
        for row in analysis["rows"]
        for m in row["estimates"]
        if "@" in m and m.partition("@")[2] not in MATCHED
    }
    metrics = [analysis["headline"], *SHOWN]

    def order(measure: str) -> tuple[int, float]:
        metric, _, temperature = measure.partition("@")
        return metrics.index(metric), -float(temperature)

    return sorted((m for m in present if m.partition("@")[0] in metrics), key=order)


def vital_signs(analysis: Analysis) -> Grid:
    """What is told of each policy besides gold, at temperature 1, and the cost of its run."""
    present = {m for row in analysis["rows"] for m in row["estimates"]}
    unit = "" if analysis["headline"] in PLAIN else " %"
    names = VITALS | {f"{analysis['headline']}@{at}": name + unit for at, name in MATCHED.items()}
    measures = [m for m in names if m in present]
    rows = []
    for row in analysis["rows"]:
        cells = [cell(row, m, analysis) for m in measures]
        if "kl" in measures and "kl_bound" in row["estimates"]:
            cells[measures.index("kl")] = "<= " + cell(row, "kl_bound", analysis)
        rows.append([row["label"], *cells])
    title = "vital signs, at temperature 1"
    return Grid(title, ["policy", *(names[m] for m in measures)], rows)


def against_baseline(analysis: Analysis) -> Grid:
    """Differences to the baseline in the headline, paired by seed, with their tests: at every
    temperature, and beyond what the first policy reaches at each one's entropy."""
    columns = ["policy", "metric", "difference", "p, t-test", "p, sign flip", "P(better)"]
    grid = Grid(f"against {analysis['baseline']}, paired by seed", columns, [])
    headline = analysis["headline"]
    own = [m for m in headline_measures(analysis) if m.partition("@")[0] == headline]
    for row in analysis["rows"]:
        for measure in [*own, f"{headline}@{BEYOND_ENTROPY}"]:
            found = row["against_baseline"].get(measure)
            if found is None:
                continue
            grid.rows.append(
                [
                    row["label"],
                    column_name(measure),
                    interval(found, measure, analysis["interval"], signed=True),
                    _p(found["p_t"]),
                    _p(found["p_sign_flip"]),
                    _probability(found.get("probability_of_improvement")),
                ]
            )
    return grid


def ranking(analysis: Analysis) -> Grid:
    """Policies from best to worst, with the probability that a run beats one of the next."""
    by = analysis["ranked_by"]
    grid = Grid(
        f"ranking by {column_name(by)}" if by else "ranking",
        ["rank", "policy", "mean", "seeds", "P(beats the next)"],
        [],
    )
    for place, entry in enumerate(analysis["ranking"], 1):
        seeds, beats = str(entry.get("n", MISSING)), _probability(entry["beats_next"])
        grid.rows.append([str(place), entry["label"], number(entry["mean"], by), seeds, beats])
    return grid


def evaluated(analysis: Analysis) -> Grid:
    """What `irl-align evaluate` told of every run of a method: preferences, wins, benchmarks."""
    columns = ["policy", "metric", "value", "difference", "p, t-test"]
    title = f"evaluations of the last policies and rewards, beside {analysis['baseline']}"
    grid = Grid(title, columns, [])
    for row in analysis["rows"]:
        for measure in (m for m in row["estimates"] if m.startswith(EVALUATED)):
            against = row["against_baseline"].get(measure)
            cells = [row["label"], column_name(measure), cell(row, measure, analysis)]
            if against is None:
                cells += [MISSING, MISSING]
            else:
                shown = interval(against, measure, analysis["interval"], signed=True)
                cells += [shown, _p(against["p_t"])]
            grid.rows.append(cells)
    return grid


def frontier_fits(analysis: Analysis) -> Grid:
    """Gao et al.'s forms of gold's and the reward's gain against KL, where there are points."""
    columns = ["policy", "points", "largest KL", "gold alpha", "gold beta", "gold best at KL"]
    columns += ["reward alpha", "reward beta", "reward best at KL", "overoptimised"]
    grid = Grid("gain against KL: d (alpha - beta log d), d = sqrt KL", columns, [])
    for found in analysis.get("frontiers", []):
        if found["gold"] is None and found["proxy"] is None:
            continue
        largest = max(place["kl"] for place in found["places"])
        cells = [found["name"], str(len(found["places"])), f"{largest:.2f}"]
        for fit in (found["gold"], found["proxy"]):
            cells += [MISSING] * 3 if fit is None else _fitted(fit, largest)
        grid.rows.append([*cells, "yes" if found["overoptimised"] else "no"])
    if any(_is_best_of_n(found) for found in analysis.get("frontiers", [])):
        return Grid(f"{grid.title}; of best-of-n d (alpha - beta d)", grid.columns, grid.rows)
    return grid


def _is_best_of_n(found: Mapping[str, Any]) -> bool:
    fit = found["gold"] or found["proxy"]
    return fit is not None and fit["form"] == "best_of_n"


def _fitted(fit: Mapping[str, Any], largest: float) -> list[str]:
    """alpha, beta and the KL of the peak, where that is among the points."""
    peak = fit["peak_kl"]
    shown = "beyond" if peak is None or peak > largest else f"{peak:.2f}"
    return [f"{fit['alpha']:.3f}", f"{fit['beta']:.3f}", shown]


def same_kl(analysis: Analysis) -> Grid:
    """Gold, reward and BLEU of PPO's rollouts at the same KL, mean over seeds that come so far."""
    found = analysis.get("at_kl", [])
    metric = column_name(found[0]["metric"]) if found else "gold"
    columns = ["policy", "KL", "reached by", metric, "reward"]
    bleu = any(one.get("bleu") for one in found)
    columns += [column_name("bleu")] if bleu else []
    grid = Grid("rollouts at the same KL", columns, [])
    for one in found:
        reached = sum(seed is not None for seed in one["seeds"].values())
        cells = [f"{one['method']}, {one['role']}", f"{one['kl']:g}"]
        cells.append(f"{reached} of {len(one['seeds'])}")
        levels = [(one["gold"], one["metric"]), (one["reward"], "reward_gain")]
        for level, measure in [*levels, *([(one.get("bleu"), "bleu")] if bleu else [])]:
            known = level is not None
            cells.append(interval(level, measure, analysis["interval"]) if known else MISSING)
        grid.rows.append(cells)
    return grid


def learning_speed(analysis: Analysis) -> Grid:
    """Updates and samples until PPO's rollouts reach the gold levels, mean over seeds that do."""
    columns = ["policy", "gold", "reached by", "updates", "samples"]
    grid = Grid("how soon rollouts reach a level of gold", columns, [])
    for speed in analysis.get("speeds", []):
        metric, reached = speed["metric"], [n for n in speed["updates"].values() if n is not None]
        level = f"{spelt(metric)} {number(speed['level'], metric)}"
        cells = [f"{speed['method']}, {speed['role']}", level + ("" if metric in PLAIN else "%")]
        cells.append(f"{len(reached)} of {len(speed['updates'])}")
        for unit in ("updates", "samples"):
            counts = [n for n in speed[unit].values() if n is not None]
            cells.append(f"{sum(counts) / len(counts):,.0f}" if counts else MISSING)
        grid.rows.append(cells)
    return grid


SECTIONS: Mapping[str, Sequence[Callable[[Analysis], Grid]]] = {
    RESULTS: (results, vital_signs, against_baseline, ranking, evaluated),
    GAINS: (frontier_fits, same_kl),
    PPO: (learning_speed,),
    COST: (costs, memory_by_part, tokens_by_part, costs_by_iteration),
}


def notes(analysis: Analysis) -> list[str]:
    """What a reader of the tables must know, one line each."""
    seeds = analysis["seeds"]
    told = {
        "t": f"± is the 95% t interval of the mean over {len(seeds)} seeds",
        "bootstrap": f"in brackets: 95% bootstrap interval of the mean over {len(seeds)} seeds",
        None: f"one seed ({seeds[0]}): there are no intervals and no tests",
    }
    lines = [told[analysis["interval"]]]
    for row in analysis["rows"]:
        full = max((e["n"] for e in row["estimates"].values()), default=0)
        partial = sorted(m for m, e in row["estimates"].items() if e["n"] < full)
        if full < len(seeds):
            lines.append(f"{row['label']}: {full} of {len(seeds)} seeds")
        if partial:
            lines.append(f"{row['label']}: not in all of its seeds: {', '.join(partial)}")
    lines += _ranking_note(analysis)
    if any(_is_beyond(m) for row in analysis["rows"] for m in row["against_baseline"]):
        lines.append(
            f"{BEYOND}: at T=1, less what the first policy reaches at the same entropy per token"
        )
    shared, alone = analysis["seconds"]["shared"], analysis["seconds"]["one_by_one"]
    if alone:
        lines.append(
            f"stages: {shared:.0f} s together, {alone:.0f} s if every run were by itself "
            f"({shared / alone:.0%})"
        )
    resumed = [f"{c['method']} {c['resumed']}" for c in analysis["costs"] if c.get("resumed")]
    if resumed:
        lines.append(
            f"stages that went on after a stop, whose seconds are of the last try alone: "
            f"{', '.join(resumed)}"
        )
    lines += [
        f"overoptimised: {found['name']}: gold falls beyond KL {found['gold']['peak_kl']:.2f}, "
        "while the reward still rises"
        for found in analysis.get("frontiers", [])
        if found["overoptimised"]
    ]
    lines += [
        f"no {option} is told: found no PPO training whose rollouts have gold"
        for option, asked, found in (("gold level", "levels", "speeds"), ("KL", "kls", "at_kl"))
        if analysis.get(asked) and not analysis.get(found)
    ]
    lines += [f"not compared: {line}" for line in analysis["missing"]]
    lines += [f"differs: {line}" for line in analysis["differences"]]
    return lines


def _ranking_note(analysis: Analysis) -> list[str]:
    """Over which seeds is ranked, where that is not all of them, and who lacks the others."""
    shared = analysis.get("ranked_seeds")  # an older comparison has none
    if not analysis["ranking"] or shared is None or shared == analysis["seeds"]:
        return []
    if not shared:
        return ["ranking: no seed is in all policies, so each mean is over seeds of its own"]
    by, all_seeds = analysis["ranked_by"], analysis["seeds"]
    policies = [row for row in analysis["rows"] if row["policy"] is not None]
    short = [r["label"] for r in policies if len(r["values"].get(by, all_seeds)) < len(all_seeds)]
    seeds = ", ".join(map(str, shared))
    return [f"ranking: over the seeds that all policies have ({seeds}); fewer: {', '.join(short)}"]


def _is_beyond(measure: str) -> bool:
    return measure.partition("@")[2] == BEYOND_ENTROPY


def show_comparison(analysis: Analysis, console: Console) -> None:
    """Print all tables of a comparison and its notes."""
    for grid in grids(analysis):
        show_grid(grid, console)
    for line in notes(analysis):
        # Wrapped between words alone: a path, however long, stays whole.
        wrapped = wrap(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(wrapped), markup=False, soft_wrap=True)


def to_markdown(analysis: Analysis) -> str:
    """All tables and notes as GitHub's Markdown."""
    parts = [grid_markdown(grid) for grid in grids(analysis)]
    parts.append("\n".join(f"- {escaped(line)}" for line in notes(analysis)))
    return "\n\n".join(parts) + "\n"


def to_csv(analysis: Analysis) -> str:
    """One line per policy and measure: mean, interval, seeds, and the difference to the baseline.

    Numbers are as measured: shares, not percent.
    """
    columns = ["policy", "method", "iteration", "measure", "mean", "low", "high", "seeds"]
    columns += ["difference", "difference_low", "difference_high", "p_t", "p_sign_flip"]
    columns += ["probability_of_improvement", "probability_low", "probability_high"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in analysis["rows"]:
        for measure, found in row["estimates"].items():
            against = row["against_baseline"].get(measure, {})
            better = against.get("probability_of_improvement", {})
            line = [row["label"], row["method"], row["policy"], measure]
            line += [found[k] for k in ("mean", "low", "high", "n")]
            line += [against.get(k) for k in ("mean", "low", "high", "p_t", "p_sign_flip")]
            writer.writerow([*line, *(better.get(k) for k in ("mean", "low", "high"))])
    return file.getvalue()


def cell(row: Mapping[str, Any], measure: str, analysis: Analysis) -> str:
    """Mean and interval of a measure of a row, for people."""
    found = row["estimates"].get(measure)
    return MISSING if found is None else interval(found, measure, analysis["interval"])


def interval(
    found: Mapping[str, Any], measure: str, method: str | None, signed: bool = False
) -> str:
    """`20.5±1.2` for a t interval, `20.5 [19.1, 21.8]` for another; the mean alone without one."""
    mean = number(found["mean"], measure, signed)
    if found["low"] is None or method is None:
        return mean
    if method == "t":
        return f"{mean}±{number(found['high'] - found['mean'], measure)}"
    return f"{mean} [{number(found['low'], measure)}, {number(found['high'], measure)}]"


def number(value: float, measure: str, signed: bool = False) -> str:
    """A value in its unit: percent of shares, else with the metric's decimals."""
    digits = PLAIN.get(measure.partition("@")[0])
    scaled = 100.0 * value if digits is None else value
    rounded = round(scaled, 1 if digits is None else digits) + 0.0  # no -0.0
    return f"{rounded:{'+' if signed else ''}.{1 if digits is None else digits}f}"


def column_name(measure: str) -> str:
    """`slot_error_rate@0` as `slot error rate % greedy`."""
    metric, _, temperature = measure.partition("@")
    at = "greedy" if temperature == "0" else f"T={temperature}" if temperature else ""
    at = {AT_ENTROPY: MATCHED[AT_ENTROPY], BEYOND_ENTROPY: BEYOND}.get(temperature, at)
    unit = "" if metric in PLAIN else " %"
    if metric.startswith(EVALUATED):
        metric = ", ".join(metric.split("/"))
    return f"{spelt(metric)}{unit} {at}".strip()


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _probability(found: Mapping[str, Any] | None) -> str:
    """A probability of improvement with its bootstrap interval; of one seed each it would be 0 or 1
    and say nothing."""
    if found is None or found["n"] < 2:
        return MISSING
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
