"""Runs of several methods and seeds next to each other: what each policy reached, with intervals
over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from irl_align.errors import UserError
from irl_align.evaluation.compare.costs import method_costs, seconds, sharing
from irl_align.evaluation.compare.overoptimization import frontiers
from irl_align.evaluation.compare.policies import (
    by_method,
    evaluated_policies,
    evaluation_key,
    final_policy,
    gold_measures,
    policy_label,
    policy_measures,
)
from irl_align.evaluation.compare.rollouts import learning_speeds, levels_at_kl
from irl_align.policy.roles import DATA, DEMONSTRATIONS, Role
from irl_align.training.run_folder import RunView
from irl_align.utils.files import read_json
from irl_align.utils.statistics import (
    Method,
    estimate,
    paired_difference,
    probability_of_improvement,
)

FILE = "comparison.json"
# Gold metrics of the built-in tasks besides the headline; the direction of others is unknown.
LOWER_IS_BETTER = {"fully_right": False, "bleu": False, "chrf": False} | dict.fromkeys(
    ("arithmetic_rate", "illegal_number_rate", "wrong_target_rate"), True
)


@dataclass
class PolicyRow:
    """One policy of one method: what was measured of it, by measure and seed."""

    label: str
    method: str
    policy: int | None
    """Number of the policy in its run; None for the demonstrations."""
    final: bool
    """Whether its runs ended with it."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Measure -> seed -> value. `bleu@0.7` is a gold metric at that temperature; 0 is greedy."""

    def add(self, seed: int, measures: Mapping[str, float]) -> None:
        """Add the measures of one seed's run."""
        for measure, value in measures.items():
            self.values.setdefault(measure, {})[seed] = value


@dataclass(frozen=True)
class Comparison:
    """Rows of all methods, and how to read them."""

    rows: list[PolicyRow]
    seeds: list[int]
    lower_is_better: dict[str, bool]
    """Direction of every measure whose direction is known."""
    headline: str | None
    """The card's headline metric, without temperature."""
    runs: list[RunView]
    differences: list[str]
    """How the runs' data or evaluation differ; empty unless differences were allowed."""
    missing: list[str]
    """Runs that were requested and are not part of the comparison, and why."""


def compare_runs(
    views: Sequence[RunView],
    iterations: bool = False,
    force: bool = False,
    missing: Sequence[str] = (),
    evaluated: Mapping[Path, Mapping[str, float]] | None = None,
) -> Comparison:
    """Put finished runs next to each other, by recipe name and seed.

    iterations: include every policy of each run and not only the final one. force: compare runs
    whose data or evaluation differ. missing: notes on runs that are not there. evaluated: run's
    folder -> further measures of its final policy and reward. Raises UserError: no run, an
    unfinished run, the same name and seed twice, or data or evaluation that differ.
    """
    views = sorted(views, key=lambda view: view.recipe["seed"])
    _check(views)
    differing = list(differences(views))
    if differing and not force:
        raise UserError(f"{differing[0]}; expected the same in both (--force compares them anyway)")
    methods = by_method(views)
    rows = list(_shared_rows(views))
    start = next((row for row in rows if row.policy == 0), None)
    missing = list(missing)
    for method, runs in methods.items():
        added = _method_rows(method, runs, iterations, start is not None)
        last = start if start is not None and all(map(_ends_with_start, runs)) else added[-1]
        missing += _add_evaluated(last, method, runs, evaluated or {})
        rows += added
    headlines = {
        str(record["headline"]): bool(record["lower_is_better"])
        for view in views
        for record in view.metrics
        if "headline" in record
    }
    measures = sorted({measure for row in rows for measure in row.values})
    return Comparison(
        rows=rows,
        seeds=sorted({view.recipe["seed"] for view in views}),
        lower_is_better=_directions(measures, {**LOWER_IS_BETTER, **headlines}),
        headline=next(iter(headlines)) if len(headlines) == 1 else None,
        runs=views,
        differences=differing,
        missing=missing,
    )


def _directions(measures: Sequence[str], known: Mapping[str, bool]) -> dict[str, bool]:
    """Measure -> whether lower is better; without measures of unknown direction (lm-eval's)."""
    metrics = {
        m: m.partition("@")[0].removesuffix("/seen").removesuffix("/unseen") for m in measures
    }
    directions = {m: known[metric] for m, metric in metrics.items() if metric in known}
    return directions | {m: False for m in measures if m.startswith(("preference/", "wins/"))}


def _add_evaluated(
    row: PolicyRow,
    method: str,
    views: Sequence[RunView],
    evaluated: Mapping[Path, Mapping[str, float]],
) -> list[str]:
    """Add to a method's final row the evaluations that all of its runs have.

    Returns a note on the other evaluations, whose mean would be over fewer runs than the row's.
    """
    by_run = [evaluated.get(view.folder, {}) for view in views]
    shared = set.intersection(*map(set, by_run))
    for view, measures in zip(views, by_run, strict=True):
        row.add(view.recipe["seed"], {m: v for m, v in measures.items() if m in shared})
    partial = sorted({m for measures in by_run for m in measures} - shared)
    note = f"{method}: not evaluated in all of its runs: {', '.join(partial)}"
    return [note] if partial else []


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
    """Why runs are not comparable: different data, evaluation, gold or sampling options."""
    first = views[0]
    for view in views[1:]:
        yield from _differing(first, view, _conditions(first.recipe), _conditions(view.recipe))
    for _, group in groupby(views, key=lambda view: view.recipe["seed"]):
        first, *others = group
        for view in others:
            yield from _differing(first, view, _data_and_gold(first), _data_and_gold(view))


def _conditions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that must agree. data.path may differ where the data's checksums agree, and
    data.edit changes no demonstration."""
    own = ("path", "edit")
    data = {f"data.{k}": v for k, v in recipe.get("data", {}).items() if k not in own}
    evaluation = {f"evaluation.{k}": v for k, v in recipe.get("evaluation", {}).items()}
    generation = recipe.get("generation", {})
    sampling = ("top_p", "top_k", "max_new_tokens")
    return {**data, **evaluation, **{f"generation.{k}": generation.get(k) for k in sampling}}


def _data_and_gold(view: RunView) -> dict[str, Any]:
    """Checksums of a run's data and its gold metric, which must agree in runs of one seed."""
    sums = view.record(DATA).get("checksums", {})
    gold = view.record(Role.evaluation(0, 1.0)).get("gold")
    return {**{f"checksum of data {part}": s for part, s in sums.items()}, "gold metric": gold}


def _differing(
    first: RunView, second: RunView, one: Mapping[str, Any], two: Mapping[str, Any]
) -> Iterator[str]:
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name):
            values = f"found {one.get(name)!r} and {two.get(name)!r}"
            yield f"{first.folder} and {second.folder}: {name}: {values}"


def _shared_rows(views: Sequence[RunView]) -> Iterator[PolicyRow]:
    """The demonstrations, and SFT if all methods of a seed start from the same policy."""
    references = PolicyRow("demonstrations", "demonstrations", None, True)
    label = policy_label(views[0], 0)
    start = PolicyRow(label, label, 0, True)
    keys: dict[int, set[str]] = {}
    for view in views:
        seed = view.recipe["seed"]
        record = view.record(DEMONSTRATIONS)
        if "metrics" in record:
            references.add(seed, gold_measures(record, 1.0) | {"length": record["length"]})
        keys.setdefault(seed, set()).add(evaluation_key(view, 0))
        start.add(seed, policy_measures(view, 0))
        if _ends_with_start(view):
            start.add(seed, {"seconds": seconds(view)})
    if references.values:
        yield references
    if all(len(own) == 1 for own in keys.values()):
        yield start


def _ends_with_start(view: RunView) -> bool:
    return bool(view.recipe["loop"]["iterations"] == 0)


def _method_rows(
    method: str, views: Sequence[RunView], iterations: bool, start_is_shared: bool
) -> list[PolicyRow]:
    """The final policies of one method's runs; with `iterations` preceded by all others."""
    finals = {final_policy(view) for view in views}
    label = policy_label(views[0], max(finals))
    if max(finals) == 0:
        label = method
    elif not iterations or len(finals) > 1:  # the number would be superfluous, or wrong
        label = label.replace(f"{method} {max(finals)}", method, 1)
    final = PolicyRow(label, method, max(finals), True)
    others: dict[int, PolicyRow] = {}
    for view in views:
        seed, last = view.recipe["seed"], final_policy(view)
        if _ends_with_start(view) and start_is_shared:
            continue
        final.add(seed, policy_measures(view, last) | {"seconds": seconds(view)})
        for number in evaluated_policies(view) if iterations else ():
            if number != last and not (number == 0 and start_is_shared):
                name = policy_label(view, number) if number else f"{method} 0"
                row = others.setdefault(number, PolicyRow(name, method, number, False))
                row.add(seed, policy_measures(view, number))
    rows = [others[number] for number in sorted(others)]
    return [*rows, final] if final.values else rows


@dataclass(frozen=True)
class AnalysisOptions:
    """How a comparison is analysed."""

    by: str | None = None
    """Measure to rank by; default: the headline at temperature 1."""
    baseline: str | None = None
    """Label of the row to compare with; default: the first policy."""
    interval: Method = "t"
    swept: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Swept recipe -> its `family` and `value`; see overoptimization.frontiers."""
    levels: Sequence[float] = ()
    """Gold levels of rollouts.learning_speeds, in the headline's units as measured."""
    kls: Sequence[float] = ()
    """KLs of rollouts.levels_at_kl."""


def analyse(comparison: Comparison, options: AnalysisOptions | None = None) -> dict[str, Any]:
    """Means with intervals, differences to a baseline, the ranking, costs, and how gold relates to
    KL and updates, as plain data.

    Raises UserError: `by` or `baseline` is not there.
    """
    options = options or AnalysisOptions()
    policies = [row for row in comparison.rows if row.policy is not None]
    if not policies:
        raise UserError("compare: found no policy that was evaluated, expected at least one")
    runs, lower = comparison.runs, comparison.lower_is_better
    headline, interval = comparison.headline, options.interval
    by = _rank_measure(comparison, options.by)
    base = _base(policies, options.baseline)
    together, alone = sharing(runs)
    return {
        "seeds": comparison.seeds,
        "interval": interval if len(comparison.seeds) > 1 else None,
        "headline": headline,
        "ranked_by": by,
        "baseline": base.label,
        "lower_is_better": lower,
        "rows": [_record(row, base, lower, interval) for row in comparison.rows],
        **_ranked(policies, by, lower),
        "seconds": {"shared": together, "one_by_one": alone},
        "costs": [asdict(cost) for cost in method_costs(runs)],
        "differences": comparison.differences,
        "missing": comparison.missing,
        "sweeps": options.swept,
        "frontiers": frontiers(runs, options.swept, headline, lower),
        "levels": list(options.levels),
        "speeds": learning_speeds(runs, options.levels, headline, lower),
        "kls": list(options.kls),
        "at_kl": levels_at_kl(runs, options.kls, headline, interval),
    }


def _record(
    row: PolicyRow, base: PolicyRow, lower_is_better: Mapping[str, bool], method: Method
) -> dict[str, Any]:
    """A row as plain data, with its estimates and its differences to the baseline."""
    measures = row.values.items()
    return {
        **asdict(row),
        "values": {m: {str(seed): v for seed, v in values.items()} for m, values in measures},
        "estimates": {m: asdict(estimate(list(v.values()), method)) for m, v in measures},
        "against_baseline": _against(row, base, lower_is_better, method),
    }


def _rank_measure(comparison: Comparison, by: str | None) -> str | None:
    """The measure to rank by, or None if there is no gold metric."""
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


def _base(policies: Sequence[PolicyRow], label: str | None) -> PolicyRow:
    if label is None:
        return policies[0]
    for row in policies:
        if label in (row.label, row.method):
            return row
    raise UserError(
        f"--baseline: found {label!r}, expected one of {', '.join(row.label for row in policies)}"
    )


def _against(
    row: PolicyRow, base: PolicyRow, lower: Mapping[str, bool], method: Method
) -> dict[str, Any]:
    """Differences to the baseline by measure, paired by the seeds that both have."""
    if row is base or row.policy is None:
        return {}
    against: dict[str, Any] = {}
    for measure, values in row.values.items():
        others = base.values.get(measure, {})
        both = [seed for seed in values if seed in others]
        if not both:
            continue
        own, other = [values[s] for s in both], [others[s] for s in both]
        against[measure] = asdict(paired_difference(own, other, method))
        if measure in lower:
            better = probability_of_improvement(own, other, lower[measure])
            against[measure]["probability_of_improvement"] = asdict(better)
    return against


def _ranked(
    policies: Sequence[PolicyRow], by: str | None, lower: Mapping[str, bool]
) -> dict[str, list[Any]]:
    """Policies from the best mean to the worst, each with P(better than the next).

    Means are over the seeds that all policies have, since a policy with an easy seed only would
    lead. If no seed is in all policies, `ranked_seeds` is empty and each mean is over its own.
    """
    if by is None:
        return {"ranking": [], "ranked_seeds": []}
    measured = [(row.label, row.values[by]) for row in policies if by in row.values]
    shared = sorted(set.intersection(*(set(v) for _, v in measured))) if measured else []
    used = [(label, [values[seed] for seed in shared or values]) for label, values in measured]
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
