"""Reward functions of a user's own, as recipes name them, and functions that fail."""

from typing import Any

import numpy as np

seen: list[dict[str, Any]] = []
"""Arguments of each call of `recorded`."""


def words(completions: list[Any], **columns: Any) -> list[float]:
    """Number of words of each completion."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text.split())) for text in texts]


def recorded(**arguments: Any) -> np.ndarray:
    """Ones; keeps its arguments."""
    seen.append(arguments)
    return np.ones(len(arguments["completions"]))


def only_the_first(completions: list[str], **columns: Any) -> list[float | None]:
    """Applies to the first completion only."""
    return [3.0, *[None] * (len(completions) - 1)]


def raises(completions: list[str], **columns: Any) -> list[float]:
    raise ZeroDivisionError("no words")


def needs_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(a in c) for a, c in zip(answer, completions, strict=True)]


def one_short(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def one_number(completions: list[str], **columns: Any) -> float:
    return 1.0


def text(completions: list[str], **columns: Any) -> list[str]:
    return ["good"] * len(completions)


def nan(completions: list[str], **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def infinite(completions: list[str], **columns: Any) -> list[float]:
    return [float("inf")] * len(completions)


number = 3
