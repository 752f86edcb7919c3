"""How well scores tell preferred completions from rejected ones: what a report says of a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np

from irl_align.evaluation.rewardbench import section_gaps, section_scores
from irl_align.utils.statistics import clustered_difference, clustered_share
from irl_align.utils.text_table import MISSING, Grid

FEW_VALUES = 6  # of the data's margin are told one by one, more by thirds
PREFERENCE_REWARD = "trained on preferences"
BASELINES = ("longer wins", "shorter wins", "SFT log-prob, sum", "SFT log-prob, mean")


@dataclass(frozen=True)
class PairSet:
    """What a report needs of the pairs of a preference set, besides their scores."""

    card: str
    split: str
    prompts: Sequence[str]
    """Key of each pair's prompt: pairs of one prompt are not independent."""
    subsets: Sequence[str]
    margins: Sequence[float | None]
    """How much better people found the preferred one, in the data's own unit."""
    dropped: int = 0
    """Pairs that were too long for a model's context."""
    only: Sequence[str] = ()
    """Subsets that the set was restricted to; nothing is all."""
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> its value for each pair, of the columns that make the subset together."""


def preference_report(
    pairs: PairSet, margins: Mapping[str, np.ndarray], calibration: Mapping[str, float]
) -> dict[str, Any]:
    """Accuracy of every scorer overall, by subset, by each of the columns that make the subset, and
    by margin; and beside the baselines.

    margins: scorer -> score of the preferred minus score of the rejected, (B,); equal scores count
    half. calibration: scorer -> expected calibration error, of those whose margins are logits.
    """
    wins = {name: 0.5 * (1.0 + np.sign(margin)) for name, margin in margins.items()}
    groups = {"subsets": _groups(list(pairs.subsets)), "margins": _margin_groups(pairs.margins)}
    axes = {name: rows for name, own in pairs.axes.items() if (rows := _groups(own))}
    scorers = {}
    for name, outcome in wins.items():
        found: dict[str, Any] = {"overall": _share(outcome, pairs, range(len(outcome)))}
        for kind, rows in groups.items():
            found[kind] = _shares(outcome, pairs, rows)
        found["axes"] = {axis: _shares(outcome, pairs, rows) for axis, rows in axes.items()}
        sections = section_scores({k: v["mean"] for k, v in found["subsets"].items()})
        if sections:
            found["sections"] = sections
        if name in calibration:
            found["calibration_error"] = calibration[name]
        if name not in BASELINES:
            found["against"] = {
                other: asdict(clustered_difference(outcome - wins[other], pairs.prompts))
                for other in BASELINES
                if other in wins
            }
        scorers[name] = found
    return {
        "card": pairs.card,
        "split": pairs.split,
        "pairs": len(pairs.prompts),
        "prompts": len(set(pairs.prompts)),
        "dropped": pairs.dropped,
        "only": list(pairs.only) or None,
        "section_gaps": section_gaps(pairs.subsets),
        "scorers": scorers,
    }


def excess_share(accuracy: float, trained_on_preferences: float) -> float | None:
    """Excess over chance as a share of the preference-trained reward's (arXiv:2503.13538 reports
    0.685 on TL;DR): (a - 1/2) / (a_pref - 1/2). None where that one is not above chance."""
    if trained_on_preferences <= 0.5:
        return None
    return (accuracy - 0.5) / (trained_on_preferences - 0.5)


def _shares(
    outcome: np.ndarray, pairs: PairSet, groups: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    return {group: _share(outcome, pairs, at) for group, at in groups.items()}


def _share(outcome: np.ndarray, pairs: PairSet, rows: Sequence[int] | range) -> dict[str, Any]:
    at = list(rows)
    return asdict(clustered_share(outcome[at].tolist(), [pairs.prompts[i] for i in at]))


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Name -> rows, by name; nothing where all have the same."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return dict(sorted(rows.items())) if len(rows) > 1 else {}


def _margin_groups(margins: Sequence[float | None]) -> dict[str, list[int]]:
    """Rows by the data's margin: by its values where they are few, else by thirds."""
    rows = [i for i, margin in enumerate(margins) if margin is not None]
    if not rows:
        return {}
    values = np.array([margins[i] for i in rows], dtype=np.float64)
    distinct = np.unique(values)
    if len(distinct) <= FEW_VALUES:
        names = [f"margin {value:g}" for value in values]
    else:
        low, high = np.quantile(values, [1 / 3, 2 / 3])
        names = [_third(value, float(low), float(high)) for value in values]
    groups: dict[str, list[int]] = {}
    for row, _, name in sorted(zip(rows, values, names, strict=True), key=lambda item: item[1]):
        groups.setdefault(name, []).append(row)
    return groups if len(groups) > 1 else {}


def _third(value: float, low: float, high: float) -> str:
    if value <= low:
        return f"margin up to {low:g}"
    return f"margin up to {high:g}" if value <= high else f"margin above {high:g}"


def preference_grids(report: Mapping[str, Any]) -> list[Grid]:
    """Tables of a report: accuracies, by subset and margin, and differences to the baselines."""
    scorers = report["scorers"]
    card = report["card"] + _only(report)
    title = f"{report['card']}, {split_name(report)}: accuracy %, {report['pairs']} pairs"
    columns = ["scorer", "accuracy %", "interval", "calibration error %", "excess share"]
    overall = Grid(title, columns, [])
    for name, found in scorers.items():
        error, share = found.get("calibration_error"), found.get("excess_share")
        overall.rows.append(
            [
                name,
                f"{100 * found['overall']['mean']:.1f}",
                _bounds(found["overall"]),
                MISSING if error is None else f"{100 * error:.1f}",
                MISSING if share is None else f"{share:.2f}",
            ]
        )
    grids = [overall]
    for title, by_scorer in _grouped(scorers):
        grids.append(_by_group(f"{card}, {title}: accuracy %", by_scorer))
    if any("sections" in found for found in scorers.values()):
        names = list(next(iter(scorers.values()))["sections"])
        rows = [
            [scorer, *(f"{100 * found['sections'][name]:.1f}" for name in names)]
            for scorer, found in scorers.items()
        ]
        grids.append(Grid("RewardBench's sections: score %", ["scorer", *names], rows))
    against = Grid(
        f"{card}: beyond the baselines",
        ["scorer", "baseline", "difference", "interval", "p"],
        [
            [name, other, f"{100 * d['mean']:+.1f}", _bounds(d), _p(d["p_t"])]
            for name, found in scorers.items()
            for other, d in found.get("against", {}).items()
        ],
    )
    return [*grids, against] if against.rows else grids


def split_name(report: Mapping[str, Any]) -> str:
    """A report's split, with the subsets that it was restricted to."""
    return str(report["split"]) + _only(report)


def _only(report: Mapping[str, Any]) -> str:
    return f", {', '.join(report['only'])} alone" if report.get("only") else ""


def _grouped(scorers: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, scorer -> group -> accuracy) of every way in which the pairs are grouped."""
    axes = next(iter(scorers.values())).get("axes", {})
    ways = [("by subset", ("subsets",)), *((f"by {axis}", ("axes", axis)) for axis in axes)]
    for title, keys in [*ways, ("by the data's margin", ("margins",))]:
        by_scorer = {name: reduce(getitem, keys, found) for name, found in scorers.items()}
        if next(iter(by_scorer.values())):
            yield title, by_scorer


def _by_group(title: str, by_scorer: Mapping[str, Any]) -> Grid:
    grid = Grid(f"{title} ± half its interval", ["group", "pairs", *by_scorer], [])
    for name in next(iter(by_scorer.values())):
        cells = [groups[name] for groups in by_scorer.values()]
        shown = [f"{100 * cell['mean']:.1f}{half(cell)}" for cell in cells]
        grid.rows.append([name, str(cells[0]["n"]), *shown])
    return grid


def half(found: Mapping[str, Any]) -> str:
    """Half the width of a share's interval, in percent, behind a plus-minus."""
    return "" if found["low"] is None else f"±{50 * (found['high'] - found['low']):.1f}"


def _bounds(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return MISSING
    return f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def preference_notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of a report's tables must know, one line each."""
    card, scorers, notes = report["card"] + _only(report), report["scorers"], []
    if report["dropped"]:
        notes.append(f"{card}: {report['dropped']} pairs too long for a model, left out")
    notes += [f"{card}: {line}" for line in _gap_notes(report.get("section_gaps") or {})]
    if BASELINES[-1] not in scorers:
        notes.append(
            f"{card}: no log-prob baselines, since a reward's folder names no SFT model: give --sft"
        )
    if trained := report.get("trained_on"):
        notes += [f"{card}: {line}" for line in _rival_notes(trained, report)]
    return notes


def _gap_notes(gaps: Mapping[str, Any]) -> list[str]:
    """Why RewardBench's scores are not all there."""
    missing, unknown = gaps.get("missing", {}), gaps.get("unknown", [])
    lacking = [f"{section} (lacks {', '.join(names)})" for section, names in missing.items()]
    notes = [f"RewardBench: no score of {'; '.join(lacking)}; so no mean"] if lacking else []
    if unknown:
        notes.append(f"RewardBench: in no section, left out of its scores: {', '.join(unknown)}")
    return notes


def _rival_notes(trained: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What the reward on preferences was trained on, and what that makes of the excess share."""
    left = f", {trained['dropped']} too long and left out" if trained["dropped"] else ""
    of = f"{trained['pairs']} pairs of {trained['card']}, {trained['split']}{left}"
    notes = [f"the reward on preferences was trained on {of}"]
    if trained["shared_prompts"]:
        notes.append(
            f"it was trained on the prompts of {trained['shared_prompts']} of the "
            f"{report['pairs']} pairs"
        )
    own = report["scorers"][PREFERENCE_REWARD]["overall"]
    if own["mean"] <= 0.5:
        notes.append("no excess share: the reward on preferences is not above chance itself")
    elif own["low"] is None or own["low"] <= 0.5:
        notes.append(
            "the excess share says little: the interval of the reward on preferences holds chance"
        )
    return notes
