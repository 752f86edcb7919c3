"""Runs of several methods and seeds put side by side: what each policy reached, with intervals
over seeds. Reads run folders, never models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from irl_align.costs import method_costs, seconds, sharing
from irl_align.errors import UserError
from irl_align.files import read_json
from irl_align.stages import RunView
from irl_align.statistics import (
    Estimate,
    Method,
    estimate,
    paired_difference,
    probability_of_improvement,
)
from irl_align.tables import is_evaluation, policy_label

FILE = "comparison.json"
DEMONSTRATIONS = "demonstrations"
VITALS = ("kl", "kl_bound", "entropy", "length", "truncated")
AT_ENTROPY, BEYOND_ENTROPY = "first-at-entropy", "beyond-entropy"
"""What the first policy reaches at a policy's entropy, and the policy at temperature 1 less it:
they stand behind a gold metric's name where else a temperature does."""
REWARD = ("reward_accuracy", "fresh_accuracy")
# Gold metrics of the built-in tasks that are no headline; of others the direction is not known.
LOWER_IS_BETTER = {"fully_right": False, "bleu": False, "chrf": False}


@dataclass
class Row:
    """One policy of one method: what was measured of it, by measure and seed."""

    label: str
    method: str
    policy: int | None
    """Number of the policy in its run; None for the demonstrations."""
    final: bool
    """Whether it is what its runs ended with."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Measure -> seed -> value. `bleu@0.7` is a gold metric at that temperature, 0 is greedy."""

    def add(self, seed: int, measures: Mapping[str, float]) -> None:
        """Note what one seed's run says."""
        for measure, value in measures.items():
            self.values.setdefault(measure, {})[seed] = value


@dataclass(frozen=True)
class Comparison:
    """Rows of all methods, and how to read them."""

    rows: list[Row]
    seeds: list[int]
    lower_is_better: dict[str, bool]
    """Direction of every gold measure whose direction is known."""
    headline: str | None
    """The card's headline metric, without temperature."""
    runs: list[RunView]
    differences: list[str]
    """In what the runs' data or evaluation differ; empty unless that was allowed."""
    missing: list[str]
    """Runs that were asked for and are not part of it, and why."""


def compare_runs(
    views: Sequence[RunView],
    iterations: bool = False,
    force: bool = False,
    missing: Sequence[str] = (),
) -> Comparison:
    """Put finished runs side by side, by recipe name and seed.

    iterations: every policy of each run and not only its last. force: also where data or
    evaluation differ. missing: what to say of runs that are not there. Raises UserError: no run,
    an unfinished one, the same name and seed twice, or data or evaluation that differ.
    """
    views = sorted(views, key=lambda view: view.recipe["seed"])
    _check(views)
    found = list(differences(views))
    if found and not force:
        raise UserError(f"{found[0]}; expected the same in both (--force compares them anyway)")
    methods = list(dict.fromkeys(view.recipe["name"] for view in views))
    by_method = {m: [v for v in views if v.recipe["name"] == m] for m in methods}
    rows = [*_shared_rows(by_method)]
    start_is_shared = any(row.policy == 0 for row in rows)
    for method, own in by_method.items():
        rows += _method_rows(method, own, iterations, start_is_shared)
    headlines = {
        str(record["headline"]): bool(record["lower_is_better"])
        for view in views
        for record in view.metrics
        if "headline" in record
    }
    known = {**LOWER_IS_BETTER, **headlines}
    measures = sorted({m for row in rows for m in row.values})
    return Comparison(
        rows,
        sorted({view.recipe["seed"] for view in views}),
        {m: known[_metric(m)] for m in measures if _metric(m) in known},
        next(iter(headlines), None) if len(headlines) == 1 else None,
        views,
        found,
        list(missing),
    )


def _check(views: Sequence[RunView]) -> None:
    """Raise UserError for no run, an unfinished one, or two of one name and seed."""
    if not views:
        raise UserError("compare: found no finished run, expected at least one")
    seen: dict[tuple[str, int], Path] = {}
    for view in views:
        if view.summary is None:
            raise UserError(f"{view.folder}: this run is not finished; run its recipe again")
        other = seen.setdefault((view.recipe["name"], view.recipe["seed"]), view.folder)
        if other != view.folder:
            raise UserError(
                f"{other} and {view.folder}: found the same name and seed, expected one run each"
            )


def differences(views: Sequence[RunView]) -> Iterator[str]:
    """What makes runs not comparable: data, evaluation, gold or the samples' settings."""
    first = views[0]
    for view in views[1:]:
        for name, one, two in _differing(_conditions(first.recipe), _conditions(view.recipe)):
            yield f"{first.folder} and {view.folder}: {name}: found {one!r} and {two!r}"
    for _, group in groupby(views, key=lambda view: view.recipe["seed"]):
        same = list(group)
        for view in same[1:]:
            for name, one, two in _differing(_found(same[0]), _found(view)):
                yield f"{same[0].folder} and {view.folder}: {name}: found {one!r} and {two!r}"


def _conditions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that must agree. data.path may differ where the data's checksums agree, and
    data.edit changes no demonstration."""
    own = ("path", "edit")
    data = {f"data.{k}": v for k, v in recipe.get("data", {}).items() if k not in own}
    evaluation = {f"evaluation.{k}": v for k, v in recipe.get("evaluation", {}).items()}
    generation = recipe.get("generation", {})
    sampling = ("top_p", "top_k", "max_new_tokens")
    return {**data, **evaluation, **{f"generation.{k}": generation.get(k) for k in sampling}}


def _found(view: RunView) -> dict[str, Any]:
    """What a run says of its data and gold; with the same seed it must agree."""
    by_key = {record["key"]: record for record in view.metrics}
    sums = by_key.get("data", {}).get("checksums", {})
    gold = by_key.get("evaluation/0/t1", {}).get("gold")
    return {**{f"checksum of data {part}": s for part, s in sums.items()}, "gold metric": gold}


def _differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name):
            yield name, one.get(name), two.get(name)


def _shared_rows(by_method: Mapping[str, Sequence[RunView]]) -> Iterator[Row]:
    """The demonstrations, and SFT where all methods of a seed start from the same policy."""
    views = [view for own in by_method.values() for view in own]
    references = Row(DEMONSTRATIONS, DEMONSTRATIONS, None, True)
    label = policy_label(views[0], 0)
    start = Row(label, label, 0, True)
    keys: dict[int, set[str]] = {}
    for view in views:
        seed = view.recipe["seed"]
        for record in view.metrics:
            if record["key"] == "evaluation/demonstrations" and "metrics" in record:
                references.add(seed, _gold(record, 1.0) | {"length": record["length"]})
        keys.setdefault(seed, set()).add(_evaluation_key(view, 0))
        start.add(seed, policy_measures(view, 0))
        if _ends_with_start(view):
            start.add(seed, {"seconds": seconds(view)})
    if references.values:
        yield references
    if all(len(found) == 1 for found in keys.values()):
        yield start


def _ends_with_start(view: RunView) -> bool:
    return view.recipe["loop"]["iterations"] == 0


def _method_rows(
    method: str, views: Sequence[RunView], iterations: bool, start_is_shared: bool
) -> list[Row]:
    """The final policies of one method's runs; with `iterations` before them those in between."""
    finals = {_final(view) for view in views}
    label = policy_label(views[0], max(finals))
    if max(finals) == 0:
        label = method
    elif not iterations or len(finals) > 1:  # the number would say nothing, or not be true
        label = label.replace(f"{method} {max(finals)}", method, 1)
    final = Row(label, method, max(finals), True)
    between: dict[int, Row] = {}
    for view in views:
        seed, last = view.recipe["seed"], _final(view)
        if _ends_with_start(view) and start_is_shared:
            continue
        final.add(seed, policy_measures(view, last) | {"seconds": seconds(view)})
        numbers = {r["policy"] for r in view.metrics if is_evaluation(r)} - {last}
        for number in sorted(numbers - {0} if start_is_shared else numbers) if iterations else ():
            name = policy_label(view, number) if number else f"{method} 0"
            row = between.setdefault(number, Row(name, method, number, False))
            row.add(seed, policy_measures(view, number))
    rows = [between[number] for number in sorted(between)]
    return [*rows, final] if final.values else rows


def _final(view: RunView) -> int:
    assert view.summary is not None
    return int(view.summary["policy_number"])


def _evaluation_key(view: RunView, number: int) -> str:
    stage = view.stages.get(f"evaluation/{number}/t1")
    return stage["key"] if stage else f"{view.folder}/{number}"


def policy_measures(view: RunView, number: int) -> dict[str, float]:
    """All that a run says of one of its policies, by measure; what is null is left out."""
    by_key = {record["key"]: record for record in view.metrics}
    records = [r for r in view.metrics if is_evaluation(r) and r["policy"] == number]
    measures: dict[str, Any] = {}
    for record in records:
        measures |= _gold(record, record["temperature"])
        if record["temperature"] == 1.0:
            measures |= {name: record.get(name) for name in VITALS}
    vitals = by_key.get(f"vitals/{number}", {})
    fit = by_key.get(f"reward/{number - 1}", {})
    measures["fresh_accuracy"] = vitals.get("fresh_accuracy")
    measures["demonstration_logp"] = vitals.get("demonstration_logp")
    measures["reward_gain"] = vitals.get("reward_gain")
    measures |= _beyond_entropy(by_key, number)
    measures["reward_accuracy"] = fit.get("held_out", {}).get("accuracy")
    return {name: float(value) for name, value in measures.items() if value is not None}


def _beyond_entropy(by_key: Mapping[str, Mapping[str, Any]], number: int) -> dict[str, Any]:
    """Headline of the first policy at this one's entropy, and this one's at T=1 less that."""
    matched = by_key.get(f"matched-entropy/{number}")
    if matched is None:
        return {}
    headline = matched["headline"]
    start = matched["metrics"][headline]
    own = by_key[f"evaluation/{number}/t1"]["metrics"][headline]
    known = start is not None and own is not None
    return {
        "matched_temperature": matched["temperature"],
        f"{headline}@{AT_ENTROPY}": start,
        f"{headline}@{BEYOND_ENTROPY}": own - start if known else None,
    }


def _gold(record: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    return {f"{name}@{temperature:g}": v for name, v in record.get("metrics", {}).items()}


def _metric(measure: str) -> str:
    return measure.partition("@")[0]


def analyse(
    comparison: Comparison, by: str | None, baseline: str | None, method: Method = "t"
) -> dict[str, Any]:
    """Means with intervals, differences against a baseline, and the ranking, as plain data.

    by: measure to rank by; default the headline at temperature 1. baseline: label of a row;
    default the first policy. Raises UserError where one is not there.
    """
    policies = [row for row in comparison.rows if row.policy is not None]
    if not policies:
        raise UserError("compare: found no policy that was evaluated, expected at least one")
    by = _rank_measure(comparison, by)
    base = _base(policies, baseline)
    rows = [_record(row, base, comparison.lower_is_better, method) for row in comparison.rows]
    together, alone = sharing(comparison.runs)
    return {
        "format": 1,
        "seeds": comparison.seeds,
        "interval": method if len(comparison.seeds) > 1 else None,
        "headline": comparison.headline,
        "ranked_by": by,
        "baseline": base.label,
        "lower_is_better": comparison.lower_is_better,
        "rows": rows,
        "ranking": [] if by is None else _ranking(policies, by, comparison.lower_is_better[by]),
        "seconds": {"shared": together, "one_by_one": alone},
        "costs": [asdict(cost) for cost in method_costs(comparison.runs)],
        "differences": comparison.differences,
        "missing": comparison.missing,
    }


def _record(
    row: Row, base: Row, lower_is_better: Mapping[str, bool], method: Method
) -> dict[str, Any]:
    """A row as plain data, with its estimates and its differences to the baseline."""
    by_measure = row.values.items()
    return {
        **asdict(row),
        "values": {m: {str(seed): v for seed, v in by_seed.items()} for m, by_seed in by_measure},
        "estimates": {m: asdict(estimate(list(v.values()), method)) for m, v in by_measure},
        "against_baseline": _against(row, base, lower_is_better, method),
    }


def _rank_measure(comparison: Comparison, by: str | None) -> str | None:
    """The measure to rank by, or None where there is no gold metric."""
    known = comparison.lower_is_better
    if by is None:
        first = f"{comparison.headline}@1"
        return first if first in known else None
    by = by if "@" in by else f"{by}@1"
    if by not in known:
        raise UserError(
            f"--by: found {by!r}, expected a gold metric whose direction is known: "
            f"{', '.join(known) or 'there is none'}"
        )
    return by


def _base(policies: Sequence[Row], label: str | None) -> Row:
    if label is None:
        return policies[0]
    for row in policies:
        if label in (row.label, row.method):
            return row
    raise UserError(
        f"--baseline: found {label!r}, expected one of {', '.join(row.label for row in policies)}"
    )


def _against(row: Row, base: Row, lower: Mapping[str, bool], method: Method) -> dict[str, Any]:
    """Differences to the baseline by measure, paired by the seeds that both have."""
    if row is base or row.policy is None:
        return {}
    found: dict[str, Any] = {}
    for measure, own in row.values.items():
        theirs = base.values.get(measure, {})
        both = [seed for seed in own if seed in theirs]
        if not both:
            continue
        mine, other = [own[s] for s in both], [theirs[s] for s in both]
        found[measure] = asdict(paired_difference(mine, other, method))
        if measure in lower:
            better = probability_of_improvement(mine, other, lower[measure])
            found[measure]["probability_of_improvement"] = asdict(better)
    return found


def _ranking(policies: Sequence[Row], by: str, lower: bool) -> list[dict[str, Any]]:
    """Policies from the best mean to the worst, each with P(better than the next)."""
    ranked = [row for row in policies if by in row.values]

    def mean(row: Row) -> Estimate:
        return estimate(list(row.values[by].values()))

    ranked.sort(key=lambda row: mean(row).mean, reverse=not lower)
    out = []
    for place, row in enumerate(ranked):
        beats = None
        if place + 1 < len(ranked):
            sides = [list(r.values[by].values()) for r in (row, ranked[place + 1])]
            beats = asdict(probability_of_improvement(sides[0], sides[1], lower))
        out.append({"label": row.label, "mean": mean(row).mean, "beats_next": beats})
    return out


def read_comparison(folder: Path) -> dict[str, Any]:
    """What `irl-align compare` wrote into a folder."""
    return read_json(folder / FILE, "a comparison", "run irl-align compare again")
