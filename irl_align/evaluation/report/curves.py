"""A report's figures: learning curves, gold against KL, reward health, costs, PPO's updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from irl_align.evaluation.compare.costs import method_costs
from irl_align.evaluation.compare.policies import (
    by_method,
    evaluated_policies,
    policy_measures,
    reward_reports,
)
from irl_align.evaluation.compare.run_tables import measure_column
from irl_align.evaluation.compare.tables import headline_measures
from irl_align.evaluation.report.figures import Bars, Dots, Plot, Point, Series
from irl_align.evaluation.tables import read_evaluation
from irl_align.reward.health import DISCRIMINATOR, accuracies
from irl_align.training.run_folder import RunView
from irl_align.utils.statistics import Estimate, estimate
from irl_align.utils.text_table import metric_name

SIGNS = {
    "kl": "KL to SFT, nats",
    "entropy": "entropy per token, nats",
    "length": "length, tokens",
}
HEALTH = {
    "held-out pairs": "held-out pairs",
    "fresh samples": "fresh samples",
    DISCRIMINATOR: DISCRIMINATOR,
    "pairs of iteration 0": "oldest pairs",
    "length alone": "length alone",
    "summed log-prob under SFT": "summed log-prob under SFT",
    "mean log-prob under SFT": "mean log-prob under SFT",
}
"""Key of `accuracies` -> its name in the figure."""
UPDATES = {
    "reward": "reward per completion",
    "kl": "KL to the reference, nats",
    "length": "length, tokens",
}


def standings(analysis: Mapping[str, Any]) -> list[Dots]:
    """One figure per metric: a row per policy, with a mark and its interval per temperature."""
    rows, by_metric = analysis["rows"], defaultdict(list)
    for measure in headline_measures(analysis):
        by_metric[measure.partition("@")[0]].append(measure)
    figures = []
    for metric, measures in by_metric.items():
        shown = [row for row in rows if any(m in row["estimates"] for m in measures)]
        scale = measure_column(metric).scale
        series = []
        for measure in measures:
            name = measure_column(measure).name.removeprefix(measure_column(metric).name).strip()
            estimates = [(at, row["estimates"].get(measure)) for at, row in enumerate(shown)]
            series.append(Series(name, [_scaled(at, e, scale) for at, e in estimates if e]))
        if len(shown) > 1:
            label, names = measure_column(metric).name, [row["label"] for row in shown]
            figures.append(Dots(f"standing-{metric}", label, label, names, series))
    return figures


def _scaled(x: float, value: Mapping[str, Any], scale: float) -> Point:
    low, high = (None if value[end] is None else scale * value[end] for end in ("low", "high"))
    return Point(x, scale * value["mean"], low, high)


def learning_curves(views: Sequence[RunView], analysis: Mapping[str, Any]) -> list[Plot]:
    """Gold at every temperature and the vital signs, over the iterations."""
    measured = {
        name: [
            (number, policy_measures(view, number))
            for view in own
            for number in evaluated_policies(view)
        ]
        for name, own in by_method(views).items()
    }
    figures = []
    for measure in [*headline_measures(analysis), *SIGNS]:
        scale = measure_column(measure).scale
        series = [
            Series(
                name, _over_seeds((k, scale * m[measure]) for k, m in policies if measure in m), at
            )
            for at, (name, policies) in enumerate(measured.items())
        ]
        series = [one for one in series if one.points]
        if series and max(p.x for one in series for p in one.points) > 0:
            label = SIGNS.get(measure, measure_column(measure).name)
            key = f"curve-{measure.replace('@', '-t')}"
            figures.append(Plot(key, label, "iteration", label, series, whole_x=True))
    return figures


def frontier(views: Sequence[RunView], analysis: Mapping[str, Any]) -> list[Plot]:
    """The headline at temperature 1 against KL to SFT, one point per policy and seed.

    The values of a swept option are points of one series.
    """
    measure = f"{analysis['headline']}@1"
    swept = analysis["sweeps"]
    families: dict[str, list[RunView]] = {}
    for name, own in by_method(views).items():
        families.setdefault(swept.get(name, {}).get("family", name), []).extend(own)
    series = []
    for at, (name, own) in enumerate(families.items()):
        points = []
        for view in own:
            for number in evaluated_policies(view):
                measures = policy_measures(view, number)
                kl = measures.get("kl", measures.get("kl_bound"))
                if kl is not None and measure in measures:
                    bound = "" if "kl" in measures else ", KL is an upper bound"
                    value = swept.get(view.recipe["name"], {}).get("value")
                    note = f"seed {view.recipe['seed']}, iteration {number}{bound}"
                    note = note if value is None else f"{value}, {note}"
                    points.append(
                        Point(kl, measure_column(measure).scale * measures[measure], note=note)
                    )
        series.append(Series(name, points, at))
    series = [one for one in series if one.points]
    if not series:
        return []
    label = measure_column(measure).name
    return [Plot("frontier", f"{label} against KL", SIGNS["kl"], label, series, joined=False)]


def reward_health(views: Sequence[RunView]) -> list[Plot]:
    """One figure per method: the accuracy of each iteration's reward and of shortcuts."""
    figures = []
    for name, own in by_method(views).items():
        reports = [(k, accuracies(report)) for view in own for k, report in reward_reports(view)]
        series = []
        for at, (key, what) in enumerate(HEALTH.items()):
            shares = [(k, own_shares[key]) for k, own_shares in reports if key in own_shares]
            if len(own) == 1:
                points = [Point(float(k), *_percent(share)) for k, share in shares]
            else:
                points = _over_seeds((k, 100.0 * share.mean) for k, share in shares)
            series.append(Series(what, points, at))
        series = [one for one in series if one.points]
        if series:
            title = f"reward of {name}"
            label = "accuracy %"
            figures.append(Plot(f"reward-{name}", title, "iteration", label, series, whole_x=True))
    return figures


def _percent(share: Estimate) -> tuple[float, float | None, float | None, str]:
    """Mean, bounds and n of a share, in percent."""
    low, high = (None if end is None else 100.0 * end for end in (share.low, share.high))
    return 100.0 * share.mean, low, high, f"{share.n} pairs of {share.clusters} prompts"


def cost_bars(views: Sequence[RunView]) -> list[Bars]:
    """Seconds by part, mean over seeds; shared stages count in every run."""
    bars = [
        (cost.method, {part: total["seconds"] for part, total in cost.by_part.items()})
        for cost in method_costs(views)
        if cost.by_part
    ]
    return [Bars("costs", "time by part, mean over seeds", "seconds", bars)] if bars else []


def best_of_curves(views: Sequence[RunView]) -> list[Plot]:
    """Reward and gold of best-of-n over its KL, for runs with this evaluation."""
    curves = [
        (view.folder.name, evaluation["best_of"])
        for view in views
        if (evaluation := read_evaluation(view)) and evaluation["best_of"]
    ]
    names = list(dict.fromkeys(name for _, curve in curves for name in curve["gold"]))
    figures = []
    for name in [*(["reward"] if curves else []), *names]:
        series = []
        for run, curve in curves:
            gold = curve["gold"].get(name, {}).get("estimates")
            estimates = curve["reward"] if name == "reward" else gold
            points = [
                Point(kl, e["mean"], e["low"], e["high"], f"n = {n}")
                for n, kl, e in zip(curve["n"], curve["kl"], estimates or [], strict=False)
            ]
            series.append(Series(run, points))
        label = metric_name(name)
        title = f"best of n: {label}"
        figures.append(Plot(f"best-of-{name}", title, "KL at most, nats", label, series))
    return figures


def ppo_curves(views: Sequence[RunView], headline: str | None) -> list[Plot]:
    """Reward, KL, length and the gold headline, if any, of PPO's rollouts over its updates.

    Values are means over the seeds of an iteration of a method.
    """
    trainings: dict[str, list[Sequence[Mapping[str, Any]]]] = {}
    for view in views:
        for role, records in view.ppo_records().items():
            trainings.setdefault(f"{view.recipe['name']}, {role}", []).append(records)
    scales = dict.fromkeys(UPDATES, 1.0)
    labels = dict(UPDATES)
    if headline is not None:
        scales[f"gold_{headline}"] = measure_column(headline).scale
        labels[f"gold_{headline}"] = f"rollouts' {measure_column(headline).name}"
    figures = []
    for measure, label in labels.items():
        series = []
        for name, own in trainings.items():
            numbered = [(i, r.get(measure)) for records in own for i, r in enumerate(records, 1)]
            known = [(i, float(v)) for i, v in numbered if isinstance(v, int | float)]
            series.append(Series(name, _over_seeds((i, scales[measure] * v) for i, v in known)))
        series = [one for one in series if one.points]
        if series:
            title = f"PPO: {label}"
            figures.append(Plot(f"ppo-{measure}", title, "update", label, series, whole_x=True))
    return figures


def _over_seeds(pairs: Iterator[tuple[int, float]] | Any) -> list[Point]:
    """One point per iteration: the mean over seeds and its t interval."""
    values: dict[int, list[float]] = {}
    for k, value in pairs:
        values.setdefault(k, []).append(value)
    points = []
    for k in sorted(values):
        mean = estimate(values[k])
        note = f"mean of {mean.n} seeds" if mean.n > 1 else "one seed"
        points.append(Point(float(k), mean.mean, mean.low, mean.high, note))
    return points
