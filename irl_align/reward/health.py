"""Numbers of a reward's held-out report, with their intervals; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irl_align.utils.statistics import Estimate

AUDITED = "demonstration/policy"
"""Source of the pairs that the shortcut audit uses if there are any: pairs of one text under two
prompts have no lengths to compare."""


DISCRIMINATOR = "fresh samples, by a discriminator"
SHORTCUTS = {
    "length": "length alone",
    "truncation": "missing EOS alone",
    "logprob_sum": "summed log-prob under SFT",
    "logprob_mean": "mean log-prob under SFT",
}
"""Shortcut of the audit -> its name."""


def accuracy(report: Mapping[str, Any]) -> Estimate | None:
    """Accuracy of a `margin_report`; None if it has no pairs.

    The runs whose results are recorded with the documents have no intervals.
    """
    if "accuracy" not in report:
        return None
    low, high = report.get("accuracy_interval", (None, None))
    return Estimate(report["accuracy"], low, high, report["pairs"], report.get("prompts"))


def audit_share(audit: Mapping[str, Any], shortcut: str) -> Estimate:
    """Accuracy of a shortcut in an audit."""
    low, high = audit["intervals"][shortcut]
    return Estimate(audit[shortcut], low, high, audit["pairs"], audit["prompts"])


def accuracies(report: Mapping[str, Any]) -> dict[str, Estimate]:
    """What a reward was measured on -> its accuracy, and shortcut -> its accuracy.

    report: of `measure_reward`, with `fresh` if the next policy's samples were scored, and
    `two_sample` if a discriminator was fitted on them.
    """
    by_source = report["by_source"] if len(report["by_source"]) > 1 else {}
    parts = {
        "held-out pairs": report["held_out"],
        **{f"held-out pairs, {source}": own for source, own in by_source.items()},
        **{f"pairs of iteration {i}": own for i, own in report["older"].items()},
        "fresh samples": report.get("fresh") or {},
    }
    parts[DISCRIMINATOR] = report.get("two_sample") or {}
    measured = {name: share for name, own in parts.items() if (share := accuracy(own))}
    audit = report["audit"]
    return measured | {name: audit_share(audit, key) for key, name in SHORTCUTS.items()}


def audited_accuracy(report: Mapping[str, Any]) -> Estimate:
    """The reward's accuracy on the pairs that the shortcuts are measured on."""
    audited = policy_pair_accuracy(report) or accuracy(report["held_out"])
    assert audited is not None
    return audited


def policy_pair_accuracy(report: Mapping[str, Any]) -> Estimate | None:
    """The reward's accuracy on the pairs with the policy's samples; None if there are none."""
    return accuracy(_audited(report))


def _audited(report: Mapping[str, Any]) -> Mapping[str, Any]:
    numbers: Mapping[str, Any] = report.get("by_source", {}).get(AUDITED, {})
    return numbers
