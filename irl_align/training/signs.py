"""Warning signs that a reward or a policy went wrong, and whether the loop stops for them."""

from __future__ import annotations

import logging
from typing import Any

from irl_align.config.loop import SignOptions
from irl_align.policy.roles import signs_in, signs_key
from irl_align.reward.audit import shortcut_warnings
from irl_align.reward.health import accuracy, audited_accuracy, policy_pair_accuracy
from irl_align.training.context import RunContext
from irl_align.utils.statistics import FEW_CLUSTERS, Estimate
from irl_align.utils.text_table import share_text

logger = logging.getLogger(__name__)


def judge_fit(context: RunContext, k: int, metrics: dict[str, Any]) -> None:
    """Log that reward k separated its training pairs in the first half of its fit.

    metrics: those of the fit; empty ones (of a stage that was only looked up) are not judged.
    """
    bound = context.recipe.loop.signs.saturated_accuracy
    history, steps = metrics.get("history"), metrics.get("steps")
    if history is None or steps is None or bound == 1.0:
        return
    reached = [record["step"] for record in history if record.get("accuracy", 0.0) >= bound]
    signs = []
    if reached and reached[0] <= steps / 2:
        signs.append(
            f"saturated: training accuracy reached {bound:.0%} at step {reached[0]} of {steps}; "
            "use fewer steps, reward.label_smoothing, train_layers, or contrast pairs"
        )
    _log_signs(context, "reward-fit", k, signs)


def judge_reward(context: RunContext, k: int, report: dict[str, Any]) -> str | None:
    """Log warnings about shortcuts and forgetting; the reason to stop, if there is one.

    The loop stops when the reward is unfit, or forgets and the recipe says to stop. An empty report
    (of a stage that was only looked up) is not judged.
    """
    if not report:
        return None
    bounds = context.recipe.loop.signs
    forgets = []
    for older, now in report["older"].items():
        before = report.get("older_before", {}).get(older, {}).get("accuracy", 0.0)
        fall = before - now["accuracy"]
        if fall > bounds.older_drop:
            forgets.append(
                f"older pairs: accuracy on iteration {older} fell by {fall:.1%} to "
                f"{share_text(accuracy(now))}, more than {bounds.older_drop:.1%}: the reward "
                "forgets; widen pairs.window or init warm"
            )
    signs = shortcut_warnings(report["audit"], audited_accuracy(report)) + forgets
    unfit = False
    if context.recipe.reward.is_learned:  # a log-ratio was not fitted to rank these pairs
        unfit, judged = _judge_ranking(bounds, report)
        signs += judged
    _log_signs(context, "reward", k, signs)
    if unfit:
        return f"iteration {k}: the reward is unfit"
    return f"iteration {k}: {forgets[0]}" if forgets and bounds.action == "stop" else None


def _judge_ranking(bounds: SignOptions, report: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a reward is unfit, and what to say about its ranking of held-out pairs."""
    if report["held_out"]["loss"] is None:
        return True, ["held-out pair loss is not finite: the reward is unfit; did its fit diverge?"]
    ranking, own = accuracy(report["held_out"]), policy_pair_accuracy(report)
    text = f"held-out accuracy is {share_text(ranking)}"
    ranks = _ranks(ranking, bounds.unfit_accuracy)
    if report["held_out"]["loss"] < bounds.unfit_loss:
        return False, []
    if ranks is False:
        return True, [
            f"{text}, not above {bounds.unfit_accuracy:.0%} with its interval: the reward is unfit "
            "and is not used by the policy step; fit it longer or hold out more demonstrations, "
            "unless the policy has reached the demonstrations"
        ]
    if ranks is None:
        return False, [
            f"{text}: too few prompts to tell whether the reward is better than chance; hold out "
            "more demonstrations"
        ]
    if _ranks(own, bounds.unfit_accuracy) is False:
        return False, [
            f"held-out accuracy is {share_text(own)} on pairs that reject policy samples: the "
            "reward has learned only the other pairs; fit it longer, or with fewer of those"
        ]
    return False, []


def _ranks(share: Estimate | None, bound: float) -> bool | None:
    """Whether an accuracy lies above a bound with its interval; None if that cannot be told."""
    if share is None or bound == 0.0 or (share.low is not None and share.low > bound):
        return True
    few = share.low is None or (share.clusters or share.n) < FEW_CLUSTERS
    return None if few and share.mean > bound else False


def judge_policy(
    context: RunContext, k: int, vitals: dict[str, Any], baseline: dict[str, Any]
) -> str | None:
    """Log every bound that policy k + 1 passes; the reason to stop if the recipe says so.

    vitals, baseline: vital signs of the new policy and of pi_0. Empty ones (of a stage that was
    only looked up) are not judged.
    """
    if not vitals or not baseline:
        return None
    bounds = context.recipe.loop.signs
    # In a record, null is a number that was not finite.
    signs = [f"{name}: not finite" for name, value in vitals.items() if value is None]
    finite = {name: v for name, v in vitals.items() if None not in (v, baseline.get(name, v))}
    signs += find_signs(bounds, finite, baseline)
    _log_signs(context, "policy", k + 1, signs)
    if signs and bounds.action == "stop":
        return f"iteration {k}: {signs[0]}; policy {k} is kept"
    return None


def judge_fresh(context: RunContext, k: int, vitals: dict[str, Any]) -> str | None:
    """Log that policy k + 1 has reached the demonstrations, or went past them.

    Nothing is left to learn if a fresh discriminator surely cannot distinguish its samples: the
    reason to stop, if the recipe says so. A reward that prefers the samples to demonstrations was
    optimised too far.
    """
    bounds = context.recipe.loop.signs
    own, signs, done = accuracy(vitals.get("two_sample", {})), list[str](), None
    if own is not None and own.low is not None and own.high is not None:
        told = (
            "fresh samples: a new discriminator distinguishes demonstrations from the policy's "
            f"samples in {share_text(own)}"
        )
        bound = bounds.two_sample_accuracy
        if own.high <= bound:
            done = f"{told}, surely at most {bound:.1%}: nothing is left to learn from these data"
            signs.append(done)
        elif own.low <= 0.5 < bound:
            signs.append(
                f"{told}: more held-out prompts are needed to tell whether anything is left to "
                f"learn (the interval includes 50% and more than {bound:.1%})"
            )
    fresh = accuracy(vitals.get("fresh", {}))
    if fresh is not None and fresh.high is not None and fresh.high < 0.5:
        signs.append(
            f"overshoot: the reward prefers demonstrations to the new policy's samples in only "
            f"{share_text(fresh)}: the policy went past the demonstrations along this reward; "
            "raise the KL's weight, or take fewer or smaller steps"
        )
    if signs:
        _log_signs(context, "fresh", k + 1, signs)
    return f"iteration {k}: {done}" if done is not None and bounds.action == "stop" else None


def find_signs(bounds: SignOptions, now: dict[str, Any], start: dict[str, Any]) -> list[str]:
    """Signs that a policy went wrong compared with pi_0: one line for each bound that is passed.

    now, start: vital signs of the new policy and of pi_0. A missing key is not judged; a NaN is a
    sign.
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
    beyond = now.get("outliers_interval", (None, None))[0]
    if beyond is not None:
        share = f"{now['outliers']:.1%}"
        judge(
            "outliers",
            beyond > bounds.outliers,
            f"{share} of the samples are outliers among pi_0's to the reward, with their interval "
            f"above {bounds.outliers:.1%}: the policy may exploit the reward where it was not "
            "fitted",
        )
    if "demonstration_logp" in now:
        fall = start["demonstration_logp"] - now["demonstration_logp"]
        judge(
            "demonstration_log_prob",
            not fall <= bounds.demonstration_log_prob,
            f"fell by {fall:.2f} nats, more than {bounds.demonstration_log_prob:g}",
        )
    return signs


def _log_signs(context: RunContext, subject: str, number: int, signs: list[str]) -> None:
    key = signs_key(subject, number)
    context.run.log(key, {"signs": signs})
    for sign in signs_in({"key": key, "signs": signs}):
        logger.warning("%s", sign)
