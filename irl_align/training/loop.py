"""The bi-level loop of inverse RL from demonstrations (arXiv:2503.13538, algorithm 1).

    pi_0 = SFT(demonstrations)
    for k = 0, 1, ...
        sample y_hat ~ pi_k(.|x), pair every demonstration y_E with a sample
        reward level   r_k = argmax_phi E log sigmoid(r_phi(x, y_E) - r_phi(x, y_hat))
        policy level   pi_{k+1} = improve(pi_k, r_k)

With an implicit reward r = beta log(pi_theta / pi_k), fitting the reward trains a policy. If the
policy level is the identity, it is the next policy: that is SPIN (arXiv:2401.01335).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from irl_align.policy import Policy, Reward
from irl_align.training.context import RunContext
from irl_align.training.diagnostics import measure_policy, measure_reward, nearest_policy
from irl_align.training.evaluation import evaluate_policy
from irl_align.training.iteration import Iteration, RawData
from irl_align.training.offset_step import sampler_offset
from irl_align.training.pair_step import IterationPairs, make_pairs
from irl_align.training.policy_step import improve_policy
from irl_align.training.prepare import prepare, supervise
from irl_align.training.reward_step import fit_reward_level, functions_only
from irl_align.training.signs import judge_fresh, judge_policy, judge_reward


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: its policy, its last reward, and why it ended."""

    policy: Policy
    reward: Reward | None
    policies: list[Policy]
    ended: str


def bilevel(
    context: RunContext, raw: RawData, evaluated: Callable[[int], None] = lambda k: None
) -> Outcome:
    """Run the loop of the context's recipe on its demonstrations. Every step is a stage.

    evaluated: called with k when pi_k was evaluated and another iteration follows.

    This is the only walk over a recipe's stages. ``context.stages`` decides what happens to each of
    them. ``BuiltStages`` builds it, or reuses it from the store. ``LookedUpStages`` builds nothing:
    its ``requests`` then list the stages that a run asks for, in order, with their inputs, and say
    which of them the store has. A missing stage has a key but no files and no metrics, so the loop
    does not judge it and continues to the last iteration. Without the data, pass a ``RawData``
    without rows and ``LookedUpStages(None, seed)``: the roles are the same.
    """
    options = context.recipe.loop
    data, start = prepare(context, raw)
    policy = supervise(context, start, data)
    reward = functions_only(context.recipe.reward, data)
    now = Iteration(0, policy, policy, reward, data, earlier=(start,))
    policies, pairs = [policy], list[IterationPairs]()
    baseline = measure_policy(context, now)
    evaluate_policy(context, now)

    for k in range(options.iterations):
        evaluated(k)
        now = replace(now, offset=sampler_offset(context.recipe, now))
        if context.recipe.reward.kind not in ("none", "functions"):
            # y_hat ~ pi_k(.|x), paired with the demonstrations y_E
            pairs.append(make_pairs(context, now, start))
            # reward level: argmax_phi E log sigmoid(r_phi(x, y_E) - r_phi(x, y_hat)), whose logits
            # subtract o_k(x, y_E) - o_k(x, y_hat) if the reward is cumulative
            reward = fit_reward_level(context, now, pairs)
            report = measure_reward(context, now, reward, pairs)
            now = replace(now, reward=reward)
            if stop := judge_reward(context, k, report):
                return Outcome(now.policy, reward, policies, stop)
        # policy level: pi_{k+1} = improve(pi_k, r_k)
        policy = improve_policy(context, now)
        improved = replace(now, k=k + 1, policy=policy, earlier=(*now.earlier, now.policy))
        vitals = measure_policy(context, improved)
        evaluate_policy(context, improved)
        if stop := judge_policy(context, k, vitals, baseline):
            return Outcome(now.policy, now.reward, policies, stop)
        now = improved
        policies.append(policy)
        if stop := judge_fresh(context, k, vitals):
            return Outcome(now.policy, now.reward, policies, stop)

    if options.pick == "nearest" and now.reward is not None:
        now = replace(now, policy=nearest_policy(context, now.reward, policies, data))
    return Outcome(now.policy, now.reward, policies, f"{options.iterations} iterations done")
