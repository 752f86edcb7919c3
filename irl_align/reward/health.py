"""What a reward's held-out report says of the pairs that the shortcut audit is of.

Reads records of metrics.jsonl. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUDITED = "demonstration/policy"
"""Source of the pairs that are audited, where there are some: of one text under two prompts there
are no lengths to compare."""


def audited_accuracy(report: Mapping[str, Any]) -> float:
    """The reward's accuracy on the pairs that the shortcuts are judged on."""
    return float(_of_policy(report).get("accuracy", report["held_out"]["accuracy"]))


def policy_loss(report: Mapping[str, Any]) -> float | None:
    """The reward's loss on the pairs with the policy's samples; None without any."""
    found: float | None = _of_policy(report).get("loss")
    return found


def _of_policy(report: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = report.get("by_source", {}).get(AUDITED, {})
    return found
