"""Shortcut audit: how well do length, truncation and the SFT model alone tell the pairs apart?

A reward that is no better than one of these may have learned it instead of the task. And does it
go with length among the samples of one prompt, where a policy can follow it?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from irl_align.data.columns import column
from irl_align.reward.losses import pair_metrics

CLOSE = 0.05  # a shortcut this near to the reward's accuracy, and above chance, is warned of
LEANING = 0.2  # a correlation with length within prompts that is warned of


def shortcut_audit(
    pairs: Dataset, chosen_logps: Sequence[np.ndarray], rejected_logps: Sequence[np.ndarray]
) -> dict[str, float]:
    """Accuracy of each shortcut on pairs, in its better direction: in [0.5, 1], ties count half.

    chosen_logps, rejected_logps: per-token log-probs under the SFT model, one array a row.
    """
    chosen, rejected = (
        [len(ids) for ids in column(pairs, f"{s}_ids")] for s in ("chosen", "rejected")
    )
    length = np.array(chosen) - np.array(rejected)
    truncated = np.asarray(column(pairs, "rejected_truncated"), dtype=float)
    both = list(zip(chosen_logps, rejected_logps, strict=True))
    return {
        "length": _accuracy(length),
        "truncation": _accuracy(truncated),
        "logprob_sum": _accuracy([c.sum() - r.sum() for c, r in both]),
        "logprob_mean": _accuracy([c.mean() - r.mean() for c, r in both]),
    }


def within_prompts(
    prompts: Sequence[str], one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray
) -> float | None:
    """Correlation (Pearson's) of two numbers of samples after each lost its prompt's mean.

    So prompts whose samples are all long, or all good, do not count. None where nothing varies.
    """
    number = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)[1]
    x, y = (_centred(np.asarray(values, np.float64), number) for values in (one, two))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return None if scale < 1e-12 else float(x @ y) / scale


def _centred(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    return values - (np.bincount(number, values) / np.bincount(number))[number]


def shortcut_warnings(audit: Mapping[str, float | None], accuracy: float) -> list[str]:
    """A line for every surface shortcut (length, truncation) that comes near the reward, and for a
    reward that goes with length within prompts."""
    lines = _close_shortcuts(audit, accuracy)
    leaning = audit.get("length_correlation")
    if leaning is not None and abs(leaning) >= LEANING:
        lines.append(
            f"shortcut audit: among samples of one prompt the reward's correlation with length is "
            f"{leaning:+.2f}: it prefers {'longer' if leaning > 0 else 'shorter'} texts"
        )
    return lines


def _close_shortcuts(audit: Mapping[str, Any], accuracy: float) -> list[str]:
    return [
        f"shortcut audit: {name} alone tells {audit[name]:.1%} of the held-out pairs apart, the "
        f"reward {accuracy:.1%}: it may have learned the {name}"
        for name in ("length", "truncation")
        if audit[name] > 0.5 + CLOSE and audit[name] >= accuracy - CLOSE
    ]


def _accuracy(difference: Sequence[float] | np.ndarray) -> float:
    accuracy = float(pair_metrics(torch.as_tensor(np.asarray(difference, float)))["accuracy"])
    return max(accuracy, 1.0 - accuracy)
