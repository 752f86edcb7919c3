"""Shortcut audit: how well do length, truncation and the SFT model alone tell the pairs apart?

A reward that is no better than one of these may have learned it instead of the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset

from irl_align.maths.losses import pair_metrics

CLOSE = 0.05  # a shortcut this near to the reward's accuracy is warned of


def shortcut_audit(
    pairs: Dataset, chosen_logps: Sequence[np.ndarray], rejected_logps: Sequence[np.ndarray]
) -> dict[str, float]:
    """Accuracy of each shortcut on pairs, in its better direction: in [0.5, 1], ties count half.

    chosen_logps, rejected_logps: per-token log-probs under the SFT model, one array a row.
    """
    length = np.array(
        [
            len(chosen) - len(rejected)
            for chosen, rejected in zip(pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
        ]
    )
    truncated = np.asarray(pairs["rejected_truncated"], dtype=float)
    both = list(zip(chosen_logps, rejected_logps, strict=True))
    return {
        "length": _accuracy(length),
        "truncation": _accuracy(truncated),
        "logprob_sum": _accuracy([c.sum() - r.sum() for c, r in both]),
        "logprob_mean": _accuracy([c.mean() - r.mean() for c, r in both]),
    }


def shortcut_warnings(audit: dict[str, float], accuracy: float) -> list[str]:
    """A line for every surface shortcut (length, truncation) that comes near the reward."""
    return [
        f"shortcut audit: {name} alone tells {audit[name]:.1%} of the held-out pairs apart, the "
        f"reward {accuracy:.1%}: it may have learned the {name}"
        for name in ("length", "truncation")
        if audit[name] > 0.5 + CLOSE and audit[name] >= accuracy - CLOSE
    ]


def _accuracy(difference: Sequence[float] | np.ndarray) -> float:
    accuracy = float(pair_metrics(torch.as_tensor(np.asarray(difference, float)))["accuracy"])
    return max(accuracy, 1.0 - accuracy)
