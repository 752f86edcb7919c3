"""Roles of a run's stages: what part of the run each one is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MEASURING = ("vitals/", "evaluation/", "matched-entropy/", "reward-report/", "pick")
PARTS = ("data", "SFT", "samples and pairs", "reward", "policy", "measuring")


def classify(role: str) -> tuple[str, int | None]:
    """(part, iteration) of a stage by its role in a run."""
    if role in ("start", "data"):
        return "data", None
    if role == "sft":
        return "SFT", None
    if role.startswith(MEASURING) or re.match(r"(samples|selected)/(held_out|evaluation)\b", role):
        return "measuring", None
    numbers = re.findall(r"(?:^|[/-])(\d+)(?:/|$)", role)
    number = int(numbers[0]) if numbers else None
    if role.startswith(("samples/train", "selected/train", "pairs/")):
        return "samples and pairs", number
    if role.startswith("reward/"):
        return "reward", number
    if re.match(r"policy-\d", role) and number is not None:
        number -= 1  # policy k+1 is what iteration k makes
    return "policy", number


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record of metrics.jsonl is the evaluation of a policy."""
    return record["key"].startswith("evaluation/") and "policy" in record
