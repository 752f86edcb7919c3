"""What is measured of a policy: its vital signs (on demonstrations alone) and its gold metric.

Vital signs may decide (stop, pick); gold and preferences are for reporting only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq

from irl_align.config.loop import SignOptions
from irl_align.models.generation.samples import SampleSet


def vitals(
    samples: SampleSet,
    initial_logps: Sequence[np.ndarray] | None,
    policy_logps: Sequence[np.ndarray] | None = None,
) -> dict[str, float]:
    """Length, truncation, entropy and KL(pi || pi_0) of samples drawn at temperature 1.

    initial_logps: per-token log-probs of the samples under pi_0, or None to leave KL out.
    policy_logps: the same under pi, when the sampler's own are not pi's (top-p); default the
    sampler's. KL is the mean of log pi(y)/pi_0(y) per completion (k1), with its standard error;
    entropy is the mean of -log pi per token. In nats.
    """
    _, completions = samples.flat()
    own = policy_logps or [c.logprobs for c in completions]
    tokens = sum(len(c.token_ids) for c in completions)
    report = {
        "samples": float(len(completions)),
        "length": tokens / len(completions),
        "truncated": float(np.mean([c.truncated for c in completions])),
        "entropy": -math.fsum(float(logp.sum(dtype=np.float64)) for logp in own) / tokens,
    }
    if initial_logps is not None:
        ratio = np.array(
            [
                mine.sum(dtype=np.float64) - theirs.sum(dtype=np.float64)
                for mine, theirs in zip(own, initial_logps, strict=True)
            ]
        )
        report["kl"] = float(ratio.mean())
        report["kl_se"] = (
            float(ratio.std(ddof=1) / math.sqrt(len(ratio))) if len(ratio) > 1 else 0.0
        )
    return report


def temperature_of_entropy(
    entropy_at: Callable[[float], float],
    entropy: float,
    between: tuple[float, float] = (0.1, 2.0),
    to: float = 0.01,
) -> float:
    """The temperature, to so much, at which samples have this entropy per token.

    entropy_at: entropy of the distribution that is sampled from at a temperature, which rises with
    it. What is beyond both ends of the range gets the nearer one. A multiple of `to`, so that runs
    which ask for nearly the same share their samples.
    """
    low, high = between
    if entropy_at(1.0) >= entropy:
        high = 1.0
    else:
        low = 1.0
    if entropy_at(low) >= entropy:
        return low
    if entropy_at(high) <= entropy:
        return high
    steps = {"xtol": to / 2, "rtol": 1e-3}
    found = brentq(lambda t: entropy_at(round(round(t / to) * to, 6)) - entropy, low, high, **steps)
    return round(round(float(found) / to) * to, 6)


def find_signs(bounds: SignOptions, now: dict[str, Any], start: dict[str, Any]) -> list[str]:
    """Signs that a policy went wrong against pi_0: one line for each bound that is passed.

    now, start: vital signs of the new policy and of pi_0; a key that is missing is not judged, a
    NaN is a sign.
    """
    signs = []

    def judge(key: str, broken: bool, text: str) -> None:
        if broken:
            signs.append(f"{key}: {text}")

    if "entropy" in now:
        ratio = now["entropy"] / start["entropy"]
        inside = bounds.entropy_low <= ratio <= bounds.entropy_high
        judge(
            "entropy",
            not inside,
            f"{ratio:.2f} of the first policy's, outside "
            f"{bounds.entropy_low:g} to {bounds.entropy_high:g}",
        )
    if "kl" in now:
        judge("kl", not now["kl"] <= bounds.kl, f"{now['kl']:.2f} nats, above {bounds.kl:g}")
    change = now["length"] / start["length"] - 1.0
    judge(
        "length",
        abs(change) > bounds.length_change,
        f"{change:+.0%} against the first policy, beyond {bounds.length_change:.0%}",
    )
    more = now["truncated"] - start["truncated"]
    judge(
        "missing_eos",
        more > bounds.missing_eos,
        f"{more:+.1%} samples without EOS, above {bounds.missing_eos:.1%}",
    )
    if "demonstration_logp" in now:
        fall = start["demonstration_logp"] - now["demonstration_logp"]
        judge(
            "demonstration_log_prob",
            not fall <= bounds.demonstration_log_prob,
            f"fell by {fall:.2f} nats, more than {bounds.demonstration_log_prob:g}",
        )
    return signs
