"""Numbers of a reward's held-out report that decide about its health; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUDITED = "demonstration/policy"
"""Source of the pairs that the shortcut audit uses if there are any: pairs of one text under two
prompts have no lengths to compare."""


def audited_accuracy(report: Mapping[str, Any]) -> float:
    """The reward's accuracy on the pairs that the shortcuts are measured on."""
    return float(_audited(report).get("accuracy", report["held_out"]["accuracy"]))


def policy_pair_loss(report: Mapping[str, Any]) -> float | None:
    """The reward's loss on the pairs with the policy's samples; None if there are none."""
    loss: float | None = _audited(report).get("loss")
    return loss


def _audited(report: Mapping[str, Any]) -> Mapping[str, Any]:
    numbers: Mapping[str, Any] = report.get("by_source", {}).get(AUDITED, {})
    return numbers
