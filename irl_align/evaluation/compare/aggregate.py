"""Runs of several methods and seeds put side by side: what each policy reached, with intervals
over seeds. Reads run folders, never models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.evaluation.compare.costs import method_costs, seconds, sharing
from irl_align.evaluation.compare.run_tables import policy_label
from irl_align.policy.roles import Role
from irl_align.training.run_folder import RunView
from irl_align.utils.files import read_json
from irl_align.utils.statistics import (
    Method,
    estimate,
    paired_difference,
    probability_of_improvement,
)

FILE = "comparison.json"
DEMONSTRATIONS = "demonstrations"
VITALS = ("kl", "kl_bound", "entropy", "length", "truncated")
AT_ENTROPY, BEYOND_ENTROPY = "first-at-entropy", "beyond-entropy"
"""What the first policy reaches at a policy's entropy, and the policy at temperature 1 less it:
they stand behind a gold metric's name where else a temperature does."""
REWARD = ("reward_accuracy", "fresh_accuracy")
EVALUATED = ("preference/", "wins/", "lm_eval/")
"""How the measures begin that `irl-align evaluate` told; see evaluation_measures."""
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
    evaluated: Mapping[Path, Mapping[str, float]] | None = None,
) -> Comparison:
    """Put finished runs side by side, by recipe name and seed.

    iterations: every policy of each run and not only its last. force: also where data or
    evaluation differ. missing: what to say of runs that are not there. evaluated: run's folder ->
    further measures of its last policy and reward. Raises UserError: no run, an unfinished one, the
    same name and seed twice, or data or evaluation that differ.
    """
    views = sorted(views, key=lambda view: view.recipe["seed"])
    _check(views)
    found = list(differences(views))
    if found and not force:
        raise UserError(f"{found[0]}; expected the same in both (--force compares them anyway)")
    methods = list(dict.fromkeys(view.recipe["name"] for view in views))
    by_method = {m: [v for v in views if v.recipe["name"] == m] for m in methods}
    rows = [*_shared_rows(by_method)]
    start = next((row for row in rows if row.policy == 0), None)
    missing = list(missing)
    for method, own in by_method.items():
        added = _method_rows(method, own, iterations, start is not None)
        last = start if start is not None and all(map(_ends_with_start, own)) else added[-1]
        missing += _add_evaluated(last, method, own, evaluated or {})
        rows += added
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
        {m: lower for m in measures if (lower := _direction(m, known)) is not None},
        next(iter(headlines), None) if len(headlines) == 1 else None,
        views,
        found,
        missing,
    )


def _direction(measure: str, known: Mapping[str, bool]) -> bool | None:
    """Whether a measure is better lower; None where that is not known, as of lm-eval's."""
    if measure.startswith(("preference/", "wins/")):
        return False
    return known.get(_metric(measure))


def _add_evaluated(
    row: Row, method: str, views: Sequence[RunView], evaluated: Mapping[Path, Mapping[str, float]]
) -> list[str]:
    """Note in a method's last row what all of its runs were evaluated on; return what to say of
    the rest, of which a mean would be over other runs than the row's other means."""
    found = [evaluated.get(view.folder, {}) for view in views]
    shared = set.intersection(*map(set, found))
    for view, measures in zip(views, found, strict=True):
        row.add(view.recipe["seed"], {m: v for m, v in measures.items() if m in shared})
    partial = sorted({m for measures in found for m in measures} - shared)
    told = f"{method}: not evaluated in all of its runs: {', '.join(partial)}"
    return [told] if partial else []


def _check(views: Sequence[RunView]) -> None:
    """Raise UserError for no run, an unfinished one, or two of one name and seed."""
    if not views:
        raise UserError("compare: found no finished run, expected at least one")
    seen: dict[tuple[str, int], Path] = {}
    for view in views:
        view.require_finished()
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
        numbers = {r["policy"] for r in view.evaluations()} - {last}
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
    stage = view.stages.get(str(Role.evaluation(number, 1.0)))
    return stage["key"] if stage else f"{view.folder}/{number}"


def policy_measures(view: RunView, number: int) -> dict[str, float]:
    """All that a run says of one of its policies, by measure; what is null is left out."""
    records = [r for r in view.evaluations() if r["policy"] == number]
    measures: dict[str, Any] = {}
    for record in records:
        measures |= _gold(record, record["temperature"])
        if record["temperature"] == 1.0:
            measures |= {name: record.get(name) for name in VITALS}
    vitals = view.record(Role.vitals(number))
    fit = view.record(Role.reward(number - 1))
    measures["fresh_accuracy"] = vitals.get("fresh_accuracy")
    measures["demonstration_logp"] = vitals.get("demonstration_logp")
    measures["reward_gain"] = vitals.get("reward_gain")
    measures |= _beyond_entropy(view, number)
    measures["reward_accuracy"] = fit.get("held_out", {}).get("accuracy")
    return {name: float(value) for name, value in measures.items() if value is not None}


def _beyond_entropy(view: RunView, number: int) -> dict[str, Any]:
    """Headline of the first policy at this one's entropy, and this one's at T=1 less that."""
    if number == 0:
        return _first_at_its_entropy(view)
    matched = view.record(Role.matched_entropy(number))
    if not matched:
        return {}
    headline = matched["headline"]
    start = matched["metrics"][headline]
    own = view.record(Role.evaluation(number, 1.0))["metrics"][headline]
    known = start is not None and own is not None
    return {
        "matched_temperature": matched["temperature"],
        f"{headline}@{AT_ENTROPY}": start,
        f"{headline}@{BEYOND_ENTROPY}": own - start if known else None,
    }


def _first_at_its_entropy(view: RunView) -> dict[str, Any]:
    """The same of the first policy, which is itself there; nothing where no other was matched."""
    matched = view.records("matched-entropy")
    if not matched:
        return {}
    headline = next(iter(matched.values()))["headline"]
    own = view.record(Role.evaluation(0, 1.0)).get("metrics", {}).get(headline)
    beyond = None if own is None else 0.0
    return {f"{headline}@{AT_ENTROPY}": own, f"{headline}@{BEYOND_ENTROPY}": beyond}


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
        **_ranked(policies, by, comparison.lower_is_better),
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
    by = by if by in known or "@" in by else f"{by}@1"
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


def _ranked(
    policies: Sequence[Row], by: str | None, lower: Mapping[str, bool]
) -> dict[str, list[Any]]:
    """Policies from the best mean to the worst, each with P(better than the next), over the seeds
    that all of them have: a seed may be easy, and who has no other would lead by it.

    Where no seed is in all of them, `ranked_seeds` is empty and each mean is over its own.
    """
    if by is None:
        return {"ranking": [], "ranked_seeds": []}
    found = [(row.label, row.values[by]) for row in policies if by in row.values]
    shared = sorted(set.intersection(*(set(values) for _, values in found))) if found else []
    used = [(label, [values[seed] for seed in shared or values]) for label, values in found]
    used.sort(key=lambda one: estimate(one[1]).mean, reverse=not lower[by])
    ranking = []
    for place, (label, own) in enumerate(used):
        entry = {"label": label, "mean": estimate(own).mean, "n": len(own), "beats_next": None}
        if place + 1 < len(used):
            beats = probability_of_improvement(own, used[place + 1][1], lower[by])
            entry["beats_next"] = asdict(beats)
        ranking.append(entry)
    return {"ranking": ranking, "ranked_seeds": shared}


def read_comparison(folder: Path) -> dict[str, Any]:
    """What `irl-align compare` wrote into a folder."""
    return read_json(folder / FILE, "a comparison", "run irl-align compare again")
