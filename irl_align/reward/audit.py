"""Shortcut audit: how well length, truncation and the SFT model alone separate the pairs.

A reward that is no better than one of these shortcuts may have learned the shortcut instead of the
task. The audit also measures whether the reward of one prompt's samples follows their length, which
a policy could exploit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from irl_align.data.columns import column
from irl_align.reward.health import SHORTCUTS, audit_share
from irl_align.utils.statistics import Estimate, clustered_share
from irl_align.utils.text_table import share_text

CLOSE = 0.05  # a shortcut within this distance of the reward's accuracy, and above chance, warns
LEANING = 0.2  # a correlation with length within prompts of at least this size warns
Values = Sequence[float] | np.ndarray


def shortcut_audit(
    pairs: Dataset, chosen_logps: Sequence[np.ndarray], rejected_logps: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Accuracy of each shortcut on pairs, in its better direction: in [0.5, 1], ties count half.

    chosen_logps, rejected_logps: per-token log-probs under the SFT model, one array a row.
    `intervals` holds the accuracies' intervals, over the pairs' prompts as clusters.
    """
    chosen, rejected = (
        [len(ids) for ids in column(pairs, f"{s}_ids")] for s in ("chosen", "rejected")
    )
    both = list(zip(chosen_logps, rejected_logps, strict=True))
    differences: dict[str, Values] = {
        "length": np.array(chosen) - np.array(rejected),
        "truncation": column(pairs, "rejected_truncated"),
        "logprob_sum": [c.sum() - r.sum() for c, r in both],
        "logprob_mean": [c.mean() - r.mean() for c, r in both],
    }
    prompts = column(pairs, "prompt_key")
    shares = {name: _accuracy(values, prompts) for name, values in differences.items()}
    return {
        "pairs": len(prompts),
        "prompts": len(set(prompts)),
        **{name: share.mean for name, share in shares.items()},
        "intervals": {name: [share.low, share.high] for name, share in shares.items()},
    }


def within_prompts(prompts: Sequence[str], first: Values, second: Values) -> float | None:
    """Pearson's correlation of two numbers of samples after subtracting each prompt's means.

    So prompts whose samples are all long, or all good, do not count. None where nothing varies.
    """
    number = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)[1]
    x, y = (_centred(np.asarray(values, np.float64), number) for values in (first, second))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return None if scale < 1e-12 else float(x @ y) / scale


def shortcut_warnings(audit: Mapping[str, Any], accuracy: Estimate) -> list[str]:
    """One line for each surface shortcut (length, truncation) that is close to the reward's
    accuracy, one if the SFT model's log-prob beats it, and one for a reward that correlates with
    length within prompts."""
    lines = [
        f"shortcut audit: {name} alone separates {share_text(audit_share(audit, name))} of the "
        f"held-out pairs, the reward {share_text(accuracy)}: it may have learned the {name}"
        for name in ("length", "truncation")
        if audit[name] > 0.5 + CLOSE and audit[name] >= accuracy.mean - CLOSE
    ]
    best = max(("logprob_sum", "logprob_mean"), key=lambda name: float(audit[name]))
    if audit[best] > max(0.5 + CLOSE, accuracy.mean):
        lines.append(
            f"shortcut audit: the {SHORTCUTS[best]} separates "
            f"{share_text(audit_share(audit, best))} of the held-out pairs, the reward "
            f"{share_text(accuracy)}: log-prob ranks them better than the reward; set "
            "reward.lm_coef, add contrast pairs or fit longer"
        )
    leaning = audit.get("length_correlation")
    if leaning is not None and abs(leaning) >= LEANING:
        lines.append(
            f"shortcut audit: within prompts the reward's correlation with length is "
            f"{leaning:+.2f}: it prefers {'longer' if leaning > 0 else 'shorter'} texts"
        )
    return lines


def _centred(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Values minus the mean of those with the same number."""
    means: np.ndarray = np.bincount(number, values) / np.bincount(number)
    centred: np.ndarray = values - means[number]
    return centred


def _accuracy(difference: Values, prompts: Sequence[str]) -> Estimate:
    """Share of differences (B,) above 0, or below 0 if that is more."""
    right = 0.5 * (1.0 + np.sign(np.asarray(difference, float)))
    return clustered_share((right if right.mean() >= 0.5 else 1.0 - right).tolist(), prompts)
