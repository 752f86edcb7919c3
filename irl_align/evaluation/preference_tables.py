"""Reports, tables and notes of how well scores distinguish preferred from rejected completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np

from irl_align.utils.statistics import (
    Difference,
    Estimate,
    clustered_difference,
    clustered_share,
    few_clusters,
)
from irl_align.utils.text_table import Cell, Column, Table, p_value, percent

FEW_VALUES = 6  # more values of the data's margin are grouped by thirds
PREFERENCE_REWARD = "trained on preferences"
SEEN_AXIS = "prompts of the run's training"
BASELINES = ("longer wins", "shorter wins", "SFT log-prob, sum", "SFT log-prob, mean")

# RewardBench (arXiv:2403.13787): section -> subset -> its number of pairs, which is its weight.
# math-prm has 447 pairs, but weighs as much as all six code subsets together.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
}


@dataclass(frozen=True)
class PairSet:
    """What a report needs to know about the pairs of a preference set, besides their scores."""

    card: str
    split: str
    prompts: Sequence[str]
    """Key of each pair's prompt; pairs of one prompt are not independent."""
    subsets: Sequence[str]
    margins: Sequence[float | None]
    """How much better people judged the preferred completion, in the data's own unit."""
    dropped: int = 0
    """Pairs that were too long for a model's context."""
    only: Sequence[str] = ()
    """Subsets that the set was restricted to; empty for all."""
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> its value for each pair, for the columns that form the subset together."""


def preference_report(
    pairs: PairSet, margins: Mapping[str, np.ndarray], calibration: Mapping[str, float]
) -> dict[str, Any]:
    """Accuracy of every scorer: overall, by subset, by each column of the subset, by margin, and
    compared with the baselines.

    margins: scorer -> score of the preferred minus score of the rejected completion, (B,); equal
    scores count half. calibration: scorer -> expected calibration error, for scorers whose margins
    are logits.
    """

    def share(outcome: np.ndarray, rows: Sequence[int]) -> dict[str, Any]:
        prompts = [pairs.prompts[row] for row in rows]
        return asdict(clustered_share(outcome[list(rows)].tolist(), prompts))

    def shares(outcome: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        return {group: share(outcome, rows) for group, rows in groups.items()}

    wins = {name: 0.5 * (1.0 + np.sign(margin)) for name, margin in margins.items()}
    subsets, by_margin = _groups(pairs.subsets), _margin_groups(pairs.margins)
    axes = {name: groups for name, own in pairs.axes.items() if (groups := _groups(own))}
    scorers = {}
    for name, outcome in wins.items():
        report: dict[str, Any] = {
            "overall": share(outcome, range(len(outcome))),
            "subsets": shares(outcome, subsets),
            "margins": shares(outcome, by_margin),
            "axes": {axis: shares(outcome, groups) for axis, groups in axes.items()},
        }
        sections = section_scores({k: v["mean"] for k, v in report["subsets"].items()})
        if sections:
            report["sections"] = sections
        if name in calibration:
            report["calibration_error"] = calibration[name]
        if name not in BASELINES:
            report["against"] = {
                other: asdict(clustered_difference(outcome - wins[other], pairs.prompts))
                for other in BASELINES
                if other in wins
            }
        scorers[name] = report
    return {
        "card": pairs.card,
        "split": pairs.split,
        "pairs": len(pairs.prompts),
        "prompts": len(set(pairs.prompts)),
        "dropped": pairs.dropped,
        "only": list(pairs.only) or None,
        "seen": sum(one == "seen" for one in pairs.axes.get(SEEN_AXIS, ())),
        "section_gaps": section_gaps(pairs.subsets),
        "scorers": scorers,
    }


def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Score of every section whose subsets are complete, and their mean `RewardBench` if all
    sections are; empty for the subsets of another data set.

    accuracies: subset -> accuracy in [0, 1].
    """
    scores = {
        section: sum(weight * accuracies[subset] for subset, weight in weights.items())
        / sum(weights.values())
        for section, weights in SECTIONS.items()
        if set(weights) <= set(accuracies)
    }
    if len(scores) == len(SECTIONS):
        scores["RewardBench"] = sum(scores.values()) / len(SECTIONS)
    return scores


def section_gaps(subsets: Iterable[str]) -> dict[str, Any]:
    """Why RewardBench's scores are incomplete; empty if they are complete, or for the subsets of
    another data set.

    missing: section without a score -> the subsets that it lacks. unknown: subsets that are in no
    section.
    """
    given = set(subsets)
    known = {subset for weights in SECTIONS.values() for subset in weights}
    if not given & known:
        return {}
    lacking = {name: [one for one in own if one not in given] for name, own in SECTIONS.items()}
    gaps = {
        "missing": {section: names for section, names in lacking.items() if names},
        "unknown": sorted(given - known),
    }
    return {name: value for name, value in gaps.items() if value}


def excess_share(accuracy: float, trained_on_preferences: float) -> float | None:
    """Accuracy above chance as a share of that of the preference-trained reward:
    (a - 1/2) / (a_pref - 1/2); arXiv:2503.13538 reports 0.685 on TL;DR.

    None unless the preference-trained reward is above chance.
    """
    if trained_on_preferences <= 0.5:
        return None
    return (accuracy - 0.5) / (trained_on_preferences - 0.5)


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> rows, sorted by name; empty if all rows have the same name."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items())) if len(rows) > 1 else {}


def _margin_groups(margins: Sequence[float | None]) -> dict[str, list[int]]:
    """Rows by the data's margin: by its values if these are few, else by thirds."""
    known = sorted((margin, row) for row, margin in enumerate(margins) if margin is not None)
    values = [margin for margin, _ in known]
    few = len(set(values)) <= FEW_VALUES
    low, high = map(float, np.quantile(values or [0.0], [1 / 3, 2 / 3]))
    groups: dict[str, list[int]] = {}
    for margin, row in known:
        if few:
            name = f"margin {margin:g}"
        elif margin <= high:
            name = f"margin up to {low if margin <= low else high:g}"
        else:
            name = f"margin above {high:g}"
        groups.setdefault(name, []).append(row)
    return groups if len(groups) > 1 else {}


def preference_report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Tables of a report: accuracies, by subset and margin, and differences to the baselines."""
    scorers, card = report["scorers"], report["card"] + _only(report)
    tables = [_overall_table(report)]
    for title, by_scorer in _grouped(scorers):
        tables.append(_group_table(f"{card}, {title}: accuracy %", by_scorer))
    if sections := next(iter(scorers.values())).get("sections"):
        rows = [[name, *scorer["sections"].values()] for name, scorer in scorers.items()]
        columns = [Column("scorer"), *map(percent, sections)]
        tables.append(Table("RewardBench's sections: score %", columns, rows))
    against = _baselines_table(card, scorers)
    return [*tables, against] if against.rows else tables


def _overall_table(report: Mapping[str, Any]) -> Table:
    columns = [Column("scorer"), percent("accuracy %"), percent("interval")]
    columns += [percent("calibration error %"), Column("excess share", 2)]
    rows: list[list[Cell]] = []
    for name, scorer in report["scorers"].items():
        overall = Estimate(**scorer["overall"])
        interval, error = columns[2].bounds(overall), scorer.get("calibration_error")
        rows.append([name, overall.mean, interval, error, scorer.get("excess_share")])
    counts = f"{report['pairs']} pairs of {report['prompts']} prompts"
    title = f"{report['card']}, {split_name(report)}: accuracy %, {counts}"
    return Table(title, columns, rows)


def _baselines_table(card: str, scorers: Mapping[str, Any]) -> Table:
    columns = [Column("scorer"), Column("baseline"), percent("difference", signed=True)]
    columns += [percent("interval"), Column("p", 3)]
    rows: list[list[Cell]] = []
    for name, scorer in scorers.items():
        for baseline, difference in scorer.get("against", {}).items():
            estimate = Estimate(*(difference[key] for key in ("mean", "low", "high", "n")))
            p = Difference(**difference).p
            interval = columns[3].bounds(estimate)
            rows.append([name, baseline, estimate.mean, interval, p_value(p)])
    return Table(f"{card}: beyond the baselines", columns, rows)


def split_name(report: Mapping[str, Any]) -> str:
    """A report's split, with the subsets that it was restricted to."""
    return str(report["split"]) + _only(report)


def _only(report: Mapping[str, Any]) -> str:
    return f", only {', '.join(report['only'])}" if report["only"] else ""


def _grouped(scorers: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, scorer -> group -> accuracy) of every way in which the pairs are grouped."""
    axes = next(iter(scorers.values()))["axes"]
    ways = [("by subset", ("subsets",)), *((f"by {axis}", ("axes", axis)) for axis in axes)]
    for title, keys in [*ways, ("by the data's margin", ("margins",))]:
        by_scorer = {name: reduce(getitem, keys, scorer) for name, scorer in scorers.items()}
        if next(iter(by_scorer.values())):
            yield title, by_scorer


def _group_table(title: str, by_scorer: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for name in next(iter(by_scorer.values())):
        rows.append([name, *(Estimate(**groups[name]) for groups in by_scorer.values())])
    columns = [percent(name, brackets=True) for name in by_scorer]
    return Table(f"{title} [interval] n=pairs/prompts", [Column("group"), *columns], rows)


def preference_notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of a report's tables must know, one line each."""
    scorer = next(iter(report["scorers"].values()))
    groups = [one for _, own in _grouped({"": scorer}) for one in own[""].values()]
    note = few_clusters(Estimate(**one) for one in [scorer["overall"], *groups])
    notes = [] if note is None else [note]
    if report["seen"]:
        seen = f"{report['seen']} of {report['pairs']} pairs"
        notes.append(f"{seen} have a prompt that the run was trained on")
    if report["dropped"]:
        notes.append(f"{report['dropped']} pairs too long for a model, left out")
    missing, unknown = (report["section_gaps"].get(k) for k in ("missing", "unknown"))
    if missing:
        lacking = [f"{section} (lacks {', '.join(names)})" for section, names in missing.items()]
        notes.append(f"RewardBench: no score of {'; '.join(lacking)}; so no mean")
    if unknown:
        notes.append(f"RewardBench: in no section, left out of its scores: {', '.join(unknown)}")
    if BASELINES[-1] not in report["scorers"]:
        notes.append(
            "no log-prob baselines, since a reward's folder names no SFT model: give --sft"
        )
    if trained := report.get("trained_on"):
        notes += _preference_reward_notes(trained, report)
    return [f"{report['card']}{_only(report)}: {line}" for line in notes]


def _preference_reward_notes(
    trained: Mapping[str, Any], report: Mapping[str, Any]
) -> Iterator[str]:
    """What the reward on preferences was trained on, and how reliable the excess share is."""
    dropped = f", {trained['dropped']} too long and left out" if trained["dropped"] else ""
    yield (
        f"the reward on preferences was trained on {trained['pairs']} pairs of {trained['card']}, "
        f"{trained['split']}{dropped}"
    )
    if trained["shared_prompts"]:
        yield (
            f"the reward on preferences was trained on the prompts of {trained['shared_prompts']} "
            f"of the {report['pairs']} pairs"
        )
    own = report["scorers"][PREFERENCE_REWARD]["overall"]
    if own["mean"] <= 0.5:
        yield "no excess share: the reward on preferences is not above chance itself"
    elif own["low"] is None or own["low"] <= 0.5:
        yield (
            "the excess share is unreliable: the interval of the reward on preferences includes "
            "chance"
        )
