"""Shortcut audit: how well length, truncation and the SFT model alone separate the pairs.

A reward that is no better than one of these shortcuts may have learned the shortcut instead of the
task. The audit also measures whether the reward of one prompt's samples follows their length, which
a policy could exploit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.data.columns import column
from irl_align.reward.losses import pair_metrics

CLOSE = 0.05  # a shortcut within this distance of the reward's accuracy, and above chance, warns
LEANING = 0.2  # a correlation with length within prompts of at least this size warns
Values = Sequence[float] | np.ndarray


def shortcut_audit(
    pairs: Dataset, chosen_logps: Sequence[np.ndarray], rejected_logps: Sequence[np.ndarray]
) -> dict[str, float]:
    """Accuracy of each shortcut on pairs, in its better direction: in [0.5, 1], ties count half.

    chosen_logps, rejected_logps: per-token log-probs under the SFT model, one array a row.
    """
    chosen, rejected = (
        [len(ids) for ids in column(pairs, f"{s}_ids")] for s in ("chosen", "rejected")
    )
    both = list(zip(chosen_logps, rejected_logps, strict=True))
    return {
        "length": _accuracy(np.array(chosen) - np.array(rejected)),
        "truncation": _accuracy(column(pairs, "rejected_truncated")),
        "logprob_sum": _accuracy([c.sum() - r.sum() for c, r in both]),
        "logprob_mean": _accuracy([c.mean() - r.mean() for c, r in both]),
    }


def within_prompts(prompts: Sequence[str], first: Values, second: Values) -> float | None:
    """Pearson's correlation of two numbers of samples after subtracting each prompt's means.

    So prompts whose samples are all long, or all good, do not count. None where nothing varies.
    """
    number = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)[1]
    x, y = (_centred(np.asarray(values, np.float64), number) for values in (first, second))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return None if scale < 1e-12 else float(x @ y) / scale


def shortcut_warnings(audit: Mapping[str, Any], accuracy: float) -> list[str]:
    """One line for each surface shortcut (length, truncation) that is close to the reward's
    accuracy, and one for a reward that correlates with length within prompts."""
    lines = [
        f"shortcut audit: {name} alone separates {audit[name]:.1%} of the held-out pairs, the "
        f"reward {accuracy:.1%}: it may have learned the {name}"
        for name in ("length", "truncation")
        if audit[name] > 0.5 + CLOSE and audit[name] >= accuracy - CLOSE
    ]
    leaning = audit.get("length_correlation")
    if leaning is not None and abs(leaning) >= LEANING:
        lines.append(
            f"shortcut audit: among samples of one prompt the reward's correlation with length is "
            f"{leaning:+.2f}: it prefers {'longer' if leaning > 0 else 'shorter'} texts"
        )
    return lines


def _centred(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Values minus the mean of those with the same number."""
    means: np.ndarray = np.bincount(number, values) / np.bincount(number)
    centred: np.ndarray = values - means[number]
    return centred


def _accuracy(difference: Sequence[float] | np.ndarray) -> float:
    accuracy = float(pair_metrics(torch.as_tensor(np.asarray(difference, float)))["accuracy"])
    return max(accuracy, 1.0 - accuracy)
