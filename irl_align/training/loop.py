"""The bi-level loop of inverse RL from demonstrations (arXiv:2503.13538, algorithm 1).

    pi_0 = SFT(demonstrations)
    for k = 0, 1, ...
        sample y_hat ~ pi_k(.|x), pair every demonstration y_E with a sample
        reward level   r_k = argmax_phi E log sigmoid(r_phi(x, y_E) - r_phi(x, y_hat))
        policy level   pi_{k+1} = improve(pi_k, r_k)

With an implicit reward r = beta log(pi_theta / pi_k), fitting it is moving the policy, and the
policy level is the identity: that is SPIN (arXiv:2401.01335).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from irl_align.policy import Policy, Reward
from irl_align.policy.roles import signs_in, signs_key
from irl_align.reward.audit import shortcut_warnings
from irl_align.reward.health import audited_accuracy, policy_pair_loss
from irl_align.training.context import RunContext
from irl_align.training.diagnostics import find_signs
from irl_align.training.evaluation import (
    evaluate_policy,
    measure_policy,
    measure_reward,
    nearest_policy,
)
from irl_align.training.pair_step import IterationPairs, make_pairs
from irl_align.training.policy_step import improve_policy
from irl_align.training.prepare import prepare, supervise
from irl_align.training.reward_step import fit_reward_level

logger = logging.getLogger(__name__)
ROUNDING = 1e-6  # of a float32 mean: a reward that learned nothing has loss ln 2 up to this


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: its policy, its last reward, and why it ended."""

    policy: Policy
    reward: Reward | None
    policies: list[Policy]
    ended: str


def bilevel(context: RunContext, evaluated: Callable[[int], None] = lambda k: None) -> Outcome:
    """Run the loop of the recipe of the run, every step a stage that is reused where it exists.

    evaluated: called with k when pi_k was evaluated and another iteration follows.
    """
    options = context.recipe.loop
    data, start = prepare(context)
    initial = policy = supervise(context, start, data)
    policies, pairs = [initial], list[IterationPairs]()
    reward: Reward | None = None
    baseline = measure_policy(context, 0, initial, initial, None, data)
    evaluate_policy(context, 0, initial, initial, None, data)

    for k in range(options.iterations):
        evaluated(k)
        if context.recipe.reward.kind != "none":
            # y_hat ~ pi_k(.|x), beside the demonstrations y_E
            pairs.append(make_pairs(context, k, policy, initial, start, data))
            # reward level: argmax_phi E log sigmoid(r_phi(x, y_E) - r_phi(x, y_hat))
            before = reward
            reward = fit_reward_level(context, k, policy, initial, before, pairs, data)
            fit = measure_reward(context, k, reward, before, initial, pairs)
            if stop := judge_reward(context, k, fit):
                return Outcome(policy, reward, policies, stop)
        # policy level: pi_{k+1} = improve(pi_k, r_k)
        improved = improve_policy(context, k, policy, initial, reward, data)
        vitals = measure_policy(context, k + 1, improved, initial, reward, data)
        evaluate_policy(context, k + 1, improved, initial, reward, data)
        if stop := judge_policy(context, k, vitals, baseline):
            return Outcome(policy, reward, policies, stop)
        policy = improved
        policies.append(policy)
        if stop := judge_fresh(context, k, vitals):
            return Outcome(policy, reward, policies, stop)

    if options.pick == "nearest" and reward is not None:
        policy = nearest_policy(context, policies, reward, data)
    return Outcome(policy, reward, policies, f"{options.iterations} iterations done")


def judge_reward(context: RunContext, k: int, fit: dict[str, Any]) -> str | None:
    """Warn of shortcuts and forgetting; the reason to end when the reward is unfit, or forgets and
    the recipe says so."""
    bounds = context.recipe.loop.signs
    forgets = []
    for older, report in fit["older"].items():
        fall = fit.get("older_before", {}).get(older, {}).get("accuracy", 0.0) - report["accuracy"]
        if fall > bounds.older_drop:
            forgets.append(
                f"older pairs: accuracy on iteration {older} fell by {fall:.1%}, more than "
                f"{bounds.older_drop:.1%}: the reward forgets; widen pairs.window or init warm"
            )
    signs = shortcut_warnings(fit["audit"], audited_accuracy(fit)) + forgets
    loss = fit["held_out"]["loss"]
    unfit = loss is None or loss >= bounds.unfit_loss - ROUNDING
    if unfit:
        found = "not finite" if loss is None else f"{loss:.4f}, at or above {bounds.unfit_loss:.4f}"
        signs.append(f"held-out pair loss is {found}: the reward is unfit and is not optimised on")
    elif (own := policy_pair_loss(fit)) is not None and own >= bounds.unfit_loss - ROUNDING:
        signs.append(
            f"held-out pair loss is {own:.4f} where policy samples are rejected: what the reward "
            "tells apart is the other pairs"
        )
    _log_signs(context, "reward", k, signs)
    if unfit:
        return f"iteration {k}: the reward is unfit"
    return f"iteration {k}: {forgets[0]}" if forgets and bounds.action == "stop" else None


def judge_policy(
    context: RunContext, k: int, vitals: dict[str, Any], baseline: dict[str, Any]
) -> str | None:
    """Warn of every bound that the new policy passes; the reason to end if the recipe says so."""
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
    """Demonstrations against fresh samples near 50%: nothing is left to learn from this reward."""
    bounds = context.recipe.loop.signs
    accuracy = vitals.get("fresh_accuracy")
    if accuracy is None or accuracy > bounds.fresh_accuracy:
        return None
    sign = (
        f"fresh samples: the reward tells demonstrations from the new policy's samples in "
        f"{accuracy:.1%}, at most {bounds.fresh_accuracy:.1%}: nothing is left to learn from it"
    )
    _log_signs(context, "fresh", k + 1, [sign])
    return f"iteration {k}: {sign}" if bounds.action == "stop" else None


def _log_signs(context: RunContext, subject: str, number: int, signs: list[str]) -> None:
    key = signs_key(subject, number)
    context.run.log(key, {"signs": signs})
    for sign in signs_in({"key": key, "signs": signs}):
        logger.warning("%s", sign)
