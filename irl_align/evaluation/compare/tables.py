"""Tables and notes of a comparison, from what `aggregate.analyse` computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from irl_align.evaluation.compare.cost_tables import (
    costs,
    costs_by_iteration,
    memory_by_part,
    tokens_by_part,
)
from irl_align.evaluation.compare.policies import AT_ENTROPY, BEYOND_ENTROPY
from irl_align.evaluation.compare.run_tables import (
    EVALUATED,
    METRICS,
    RESULTS,
    RESULTS_APART,
    VITAL_SIGNS,
    VITALS,
    by_part,
    measure_column,
    measures_table,
    shown_measures,
)
from irl_align.utils.statistics import CONFIDENCE, Estimate
from irl_align.utils.text_table import (
    Cell,
    Column,
    Table,
    csv_table,
    escaped,
    estimate_cell,
    markdown_table,
    p_value,
)

Analysis = Mapping[str, Any]


def tables_by_section(analysis: Analysis) -> dict[str, list[Table]]:
    """The tables by section, without those that have no rows."""
    builders: dict[str, Sequence[Callable[[Analysis], Table]]] = {
        "Results": (results, results_apart, vital_signs, against_baseline, ranking, evaluated),
        "Gold against KL": (gain_fits, same_kl),
        "PPO": (learning_speed,),
        "Cost": (costs, memory_by_part, tokens_by_part, costs_by_iteration),
    }
    made = {name: [build(analysis) for build in own] for name, own in builders.items()}
    return {name: [table for table in tables if table.rows] for name, tables in made.items()}


def comparison_tables(analysis: Analysis) -> list[Table]:
    """All tables of a comparison: results, vital signs, tests, ranking, costs."""
    return [table for tables in tables_by_section(analysis).values() for table in tables]


def _column(
    analysis: Analysis, measure: str, name: str | None = None, *, signed: bool = False
) -> Column:
    brackets = analysis["interval"] == "bootstrap"
    return measure_column(measure, name, signed=signed, brackets=brackets)


def _policies_table(analysis: Analysis, title: str, columns: Mapping[str, Column]) -> Table:
    rows = [
        (row["label"], {m: estimate_cell(estimate) for m, estimate in row["estimates"].items()})
        for row in analysis["rows"]
    ]
    return measures_table(title, rows, columns)


def results(analysis: Analysis) -> Table:
    """Gold of every row at every temperature; length where there is no gold."""
    measures = headline_measures(analysis) or ["length"]
    return _policies_table(analysis, RESULTS, {m: _column(analysis, m) for m in measures})


def results_apart(analysis: Analysis) -> Table:
    """Gold on the evaluation prompts that training has not seen, and on those that it has."""
    measures = {measure for row in analysis["rows"] for measure in row["estimates"]}
    shown = shown_measures(measures, by_part((str(analysis["headline"]), *METRICS, "chrf")))
    table = _policies_table(analysis, RESULTS_APART, {m: _column(analysis, m) for m in shown})
    return table if shown else replace(table, rows=[])


def headline_measures(analysis: Analysis) -> list[str]:
    """The headline and the metrics shown after it, each from the highest temperature to greedy."""
    measures = {measure for row in analysis["rows"] for measure in row["estimates"]}
    return shown_measures(measures, (str(analysis["headline"]), *METRICS, "chrf"))


def vital_signs(analysis: Analysis) -> Table:
    """Other measures of each policy at temperature 1, and the seconds of its run."""
    measures = [*VITAL_SIGNS, "reward_gain", "seconds"]
    measures += [f"{analysis['headline']}@{at}" for at in (AT_ENTROPY, BEYOND_ENTROPY)]
    present = {measure for row in analysis["rows"] for measure in row["estimates"]}
    columns = {m: _column(analysis, m) for m in measures if m in present}
    return _policies_table(analysis, VITALS, columns)


def against_baseline(analysis: Analysis) -> Table:
    """Differences to the baseline in the headline, paired by seed, with their tests: at every
    temperature, and beyond what the first policy reaches at each policy's entropy."""
    headline = str(analysis["headline"])
    measures = [m for m in headline_measures(analysis) if m.partition("@")[0] == headline]
    rows: list[list[Cell]] = []
    for row in analysis["rows"]:
        for measure in [*measures, f"{headline}@{BEYOND_ENTROPY}"]:
            if (difference := row["against_baseline"].get(measure)) is not None:
                better = _probability(difference.get("probability_of_improvement"))
                tests = (p_value(difference["p_t"]), p_value(difference["p_sign_flip"]), better)
                name = _column(analysis, measure).name
                rows.append([row["label"], name, estimate_cell(difference), *tests])
    columns = [
        Column("policy"),
        Column("metric"),
        _column(analysis, headline, "difference", signed=True),
        Column("p, t-test", 3),
        Column("p, sign flip", 3),
        Column("P(better)", 2, brackets=True),
    ]
    return Table(f"against {analysis['baseline']}, paired by seed", columns, rows)


def ranking(analysis: Analysis) -> Table:
    """Policies from best to worst, with the probability that a run beats a run of the next."""
    by = analysis["ranked_by"]
    rows: list[list[Cell]] = [
        [str(place), entry["label"], entry["mean"], entry["n"], _probability(entry["beats_next"])]
        for place, entry in enumerate(analysis["ranking"], 1)
    ]
    columns = [
        Column("rank"),
        Column("policy"),
        measure_column(by or "", "mean"),
        Column("seeds", 0),
        Column("P(beats the next)", 2, brackets=True),
    ]
    title = f"ranking by {_column(analysis, by).name}" if by else "ranking"
    return Table(title, columns, rows)


def evaluated(analysis: Analysis) -> Table:
    """What `irl-align evaluate` measured of all runs of a method: preferences, wins, benchmarks."""
    rows: list[list[Cell]] = []
    for row in analysis["rows"]:
        for measure in (m for m in row["estimates"] if m.startswith(EVALUATED)):
            value = estimate_cell(row["estimates"][measure])
            against = row["against_baseline"].get(measure)
            p = None if against is None else p_value(against["p_t"])
            name = _column(analysis, measure).name
            rows.append([row["label"], name, value, estimate_cell(against), p])
    columns = [
        Column("policy"),
        Column("metric"),
        _column(analysis, EVALUATED[0], "value"),
        _column(analysis, EVALUATED[0], "difference", signed=True),
        Column("p, t-test", 3),
    ]
    title = f"evaluations of the final policies and rewards, compared with {analysis['baseline']}"
    return Table(title, columns, rows)


def gain_fits(analysis: Analysis) -> Table:
    """The forms of Gao et al. fitted to the gains of gold and of the reward against KL."""
    fitted = [f for f in analysis["frontiers"] if f["gold"] is not None or f["proxy"] is not None]
    rows: list[list[Cell]] = []
    for frontier in fitted:
        largest = max(place["kl"] for place in frontier["places"])
        fits = [
            cell
            for fit in (frontier["gold"], frontier["proxy"])
            for cell in ([None] * 3 if fit is None else _fit_cells(fit, largest))
        ]
        overoptimised = "yes" if frontier["overoptimised"] else "no"
        rows.append([frontier["name"], len(frontier["places"]), largest, *fits, overoptimised])
    columns = [Column("policy"), Column("points", 0), Column("largest KL", 2)]
    for which in ("gold", "reward"):
        columns += [Column(f"{which} alpha", 3), Column(f"{which} beta", 3)]
        columns.append(Column(f"{which} best at KL", 2))
    title = "gain against KL: d (alpha - beta log d), d = sqrt KL"
    if any((f["gold"] or f["proxy"])["form"] == "best_of_n" for f in fitted):
        title += "; for best-of-n d (alpha - beta d)"
    return Table(title, [*columns, Column("overoptimised", 0)], rows)


def _fit_cells(fit: Mapping[str, Any], largest: float) -> list[Cell]:
    """alpha, beta and the KL of the peak, or `beyond` if the peak is not among the points."""
    peak = fit["peak_kl"]
    return [fit["alpha"], fit["beta"], "beyond" if peak is None or peak > largest else peak]


def same_kl(analysis: Analysis) -> Table:
    """Gold, reward and BLEU of PPO's rollouts at the same KL, mean over the seeds that reach it."""
    levels = analysis["at_kl"]
    measures = {"gold": levels[0]["metric"] if levels else "gold", "reward": "reward_gain"}
    if any(level["bleu"] for level in levels):
        measures["bleu"] = "bleu"
    rows: list[list[Cell]] = []
    for level in levels:
        reached = sum(seed is not None for seed in level["seeds"].values())
        cells = [f"{level['kl']:g}", f"{reached} of {len(level['seeds'])}"]
        cells = [f"{level['method']}, {level['role']}", *cells]
        rows.append([*cells, *(estimate_cell(level[which]) for which in measures)])
    columns = [Column("policy"), Column("KL", 2), Column("reached by", 0)]
    columns += [
        _column(analysis, measure, "reward" if which == "reward" else None)
        for which, measure in measures.items()
    ]
    return Table("rollouts at the same KL", columns, rows)


def learning_speed(analysis: Analysis) -> Table:
    """Updates and samples until PPO's rollouts reach a level of gold, mean over those seeds."""
    rows: list[list[Cell]] = []
    for speed in analysis["speeds"]:
        column = measure_column(speed["metric"], unit_in_cells=True)
        counts = [
            [count for count in speed[unit].values() if count is not None]
            for unit in ("updates", "samples")
        ]
        rows.append(
            [
                f"{speed['method']}, {speed['role']}",
                f"{column.name} {column.text(speed['level'])}",
                f"{len(counts[0])} of {len(speed['updates'])}",
                *(sum(own) / len(own) if own else None for own in counts),
            ]
        )
    columns = [Column("policy"), Column("gold"), Column("reached by", 0)]
    columns += [Column(unit, 0, grouped=True) for unit in ("updates", "samples")]
    return Table("how soon rollouts reach a level of gold", columns, rows)


def _probability(fields: Mapping[str, Any] | None) -> Estimate | None:
    """A probability of improvement; None for one seed each, where it is always 0, 0.5 or 1."""
    estimate = estimate_cell(fields)
    return None if estimate is None or estimate.n < 2 else estimate


def notes(analysis: Analysis) -> list[str]:
    """What a reader of the tables must know, one line each."""
    seeds = analysis["seeds"]
    intervals = {
        "t": f"± is the 95% t interval of the mean over {len(seeds)} seeds",
        "bootstrap": f"in brackets: 95% bootstrap interval of the mean over {len(seeds)} seeds",
        None: f"one seed ({seeds[0]}): there are no intervals and no tests",
    }
    lines = [intervals[analysis["interval"]], *_few_seeds_notes(analysis)]
    lines += [*_partial_notes(analysis), *_ranking_note(analysis)]
    if any(m.endswith(BEYOND_ENTROPY) for r in analysis["rows"] for m in r["against_baseline"]):
        lines.append(
            "beyond entropy: at T=1, minus what the first policy reaches at the same entropy per "
            "token"
        )
    shared, alone = analysis["seconds"]["shared"], analysis["seconds"]["one_by_one"]
    if alone:
        lines.append(
            f"stages: {shared:.0f} s together, {alone:.0f} s if each run shared none "
            f"({shared / alone:.0%})"
        )
    resumed = [
        f"{cost['method']} {cost['resumed']}" for cost in analysis["costs"] if cost["resumed"]
    ]
    if resumed:
        lines.append(
            "stages that resumed after a stop; their seconds cover the last attempt only: "
            f"{', '.join(resumed)}"
        )
    lines += [
        f"overoptimised: {frontier['name']}: gold falls beyond KL "
        f"{frontier['gold']['peak_kl']:.2f}, while the reward still rises"
        for frontier in analysis["frontiers"]
        if frontier["overoptimised"]
    ]
    lines += [
        f"no values for the {option}: found no PPO training whose rollouts have gold"
        for option, asked, rows in (("gold level", "levels", "speeds"), ("KL", "kls", "at_kl"))
        if analysis[asked] and not analysis[rows]
    ]
    lines += [f"not compared: {line}" for line in analysis["missing"]]
    lines += [f"differs: {line}" for line in analysis["differences"]]
    return lines


def _few_seeds_notes(analysis: Analysis) -> list[str]:
    """What few seeds, and seeds with equal values, cannot tell."""
    seeds, lines = len(analysis["seeds"]), list[str]()
    least = 2.0 ** (1 - seeds)  # p of the exact sign-flip test
    if seeds > 1 and least > 1.0 - CONFIDENCE:
        lines.append(
            f"{seeds} seeds are few: the sign-flip test cannot give p below {least:g}, t intervals "
            "rely on normal differences between seeds, and bootstrap intervals are too narrow"
        )
    equal = [
        f"{row['label']} ({measure})"
        for row in analysis["rows"]
        for measure, one in row["against_baseline"].items()
        if one["n"] > 1
        and one["low"] is None
        and one["mean"]
        and "probability_of_improvement" in one
    ]
    if equal:
        lines.append(
            "the same difference in all seeds, which gives no interval and no t-test: "
            f"{', '.join(equal)}"
        )
    return lines


def _partial_notes(analysis: Analysis) -> list[str]:
    """Policies and measures that some seeds lack."""
    lines, all_seeds = [], len(analysis["seeds"])
    for row in analysis["rows"]:
        most = max((estimate["n"] for estimate in row["estimates"].values()), default=0)
        partial = sorted(m for m, estimate in row["estimates"].items() if estimate["n"] < most)
        if most < all_seeds:
            lines.append(f"{row['label']}: {most} of {all_seeds} seeds")
        if partial:
            lines.append(f"{row['label']}: not in all of its seeds: {', '.join(partial)}")
    return lines


def _ranking_note(analysis: Analysis) -> list[str]:
    """The seeds that the ranking is over and the policies with fewer, unless all have all seeds."""
    shared, all_seeds = analysis["ranked_seeds"], analysis["seeds"]
    if not analysis["ranking"] or shared == all_seeds:
        return []
    if not shared:
        return ["ranking: no seed is in all policies, so each mean is over its own seeds"]
    by = analysis["ranked_by"]
    policies = [row for row in analysis["rows"] if row["policy"] is not None]
    fewer = [r["label"] for r in policies if len(r["values"].get(by, all_seeds)) < len(all_seeds)]
    seeds = ", ".join(map(str, shared))
    return [f"ranking: over the seeds that all policies have ({seeds}); fewer: {', '.join(fewer)}"]


def to_markdown(analysis: Analysis) -> str:
    """All tables and notes as GitHub's Markdown."""
    parts = [markdown_table(table) for table in comparison_tables(analysis)]
    parts.append("\n".join(f"- {escaped(line)}" for line in notes(analysis)))
    return "\n\n".join(parts) + "\n"


def to_csv(analysis: Analysis) -> str:
    """One line per policy and measure: mean, interval, seeds, and the difference to the baseline.

    Numbers are as measured: shares, not percent.
    """
    names = ["policy", "method", "iteration", "measure", "mean", "low", "high", "seeds"]
    names += ["difference", "difference_low", "difference_high", "p_t", "p_sign_flip"]
    names += ["probability_of_improvement", "probability_low", "probability_high"]
    rows: list[list[Cell]] = []
    for row in analysis["rows"]:
        for measure, estimate in row["estimates"].items():
            against = row["against_baseline"].get(measure, {})
            better = against.get("probability_of_improvement", {})
            cells = [row["label"], row["method"], row["policy"], measure]
            cells += [estimate[k] for k in ("mean", "low", "high", "n")]
            cells += [against.get(k) for k in ("mean", "low", "high", "p_t", "p_sign_flip")]
            rows.append([*cells, *(better.get(k) for k in ("mean", "low", "high"))])
    return csv_table(Table("", [Column(name) for name in names], rows))
