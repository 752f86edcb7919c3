"""The loop's policy step: pi_{k+1} = improve(pi_k, r_k), by the recipe's policy update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from irl_align.config.policy_update import (
    BestOfNOptions,
    IdentityOptions,
    IQLearnOptions,
    MoreSFTOptions,
    PPOOptions,
)
from irl_align.config.schema import Recipe
from irl_align.data.cards import import_object
from irl_align.data.columns import column, prompts_by_ids
from irl_align.data.decoding import decode_answers
from irl_align.data.rows import prompt_text
from irl_align.data.splits import choose_prompts
from irl_align.errors import UserError
from irl_align.policy import Demonstrations, Policy, PolicyUpdate, UpdateRequest
from irl_align.policy.best_of_n import BestOfN
from irl_align.policy.identity import Identity
from irl_align.policy.iqlearn import IQLearn
from irl_align.policy.ppo.monitors import Judge
from irl_align.policy.ppo.update import PPO
from irl_align.policy.roles import Role
from irl_align.policy.sft import MoreSFT
from irl_align.tasks.gold import GoldMetric
from irl_align.training.context import RunContext
from irl_align.training.extra_prompts import PromptsByIds, encoded_prompts, with_prompts
from irl_align.training.iteration import Data, Iteration


def improve_policy(context: RunContext, iteration: Iteration) -> Policy:
    """pi_{k+1} = improve(pi_k, r_k), by the recipe's policy update."""
    k, data = iteration.k, iteration.data
    demonstrations = data.demonstrations("sft" if iteration.reward is None else "reward")
    request = UpdateRequest(
        k,
        iteration.policy,
        iteration.initial,
        iteration.reward,
        with_prompts(demonstrations, policy_prompts(context, data)),
        iteration.offset,
    )
    improved = make_update(context.recipe, data)(context, request)
    context.models.name(improved, str(Role.policy(k + 1)))
    return improved


def policy_prompts(context: RunContext, data: Data) -> PromptsByIds:
    """The prompts without demonstrations that the recipe's policy update uses."""
    if not data.raw.extra_prompts or not len(data.sft):
        return {}
    limit = context.recipe.generation.max_new_tokens
    return encoded_prompts(data, context.tokenizer, limit)


def make_update(recipe: Recipe, data: Data) -> PolicyUpdate:
    """The recipe's policy update: built in, or made by a factory given by import path.

    Raises UserError: the factory cannot be imported, or refuses its options.
    """
    options = recipe.policy_update
    if isinstance(options, BestOfNOptions):
        return BestOfN(options)
    if isinstance(options, PPOOptions):
        gold = data.card.gold if recipe.evaluation.gold else None
        judge = rollout_judge(gold, data) if gold is not None else None
        held_out = held_out_subset(data, options.held_out_prompts, recipe.seed)
        return PPO(options, held_out, judge, gold)
    if isinstance(options, MoreSFTOptions):
        return MoreSFT(options.args)
    if isinstance(options, IQLearnOptions):
        return IQLearn(options)
    if isinstance(options, IdentityOptions):
        return Identity()
    factory = import_object(options.kind, "policy_update.kind")
    try:
        update: PolicyUpdate = factory(**options.options)
    except TypeError as error:
        raise UserError(f"policy_update.options: {options.kind} refused them: {error}") from error
    return update


def held_out_subset(data: Data, prompts: int, seed: int) -> Demonstrations:
    """Demonstrations of at most so many held-out prompts, chosen by hash."""
    keys = choose_prompts(column(data.held_out, "prompt_key"), prompts, seed)
    rows = data.held_out.filter(lambda key: key in keys, input_columns="prompt_key")
    checksum = f"{data.checksums['held_out']}/{prompts}/{seed}"
    return Demonstrations(column(rows, "prompt_ids"), column(rows, "completion_ids"), checksum)


def rollout_judge(gold: str, data: Data) -> Judge:
    """The card's gold metric as a function of prompts and completions as token ids.

    Prompts that are not those of data.reward are left out: they have no references.
    """
    metric: GoldMetric = import_object(gold, "gold")
    rows = data.reward
    known = prompts_by_ids(rows)
    references: dict[tuple[int, ...], list[str]] = {}
    for ids, completion in zip(
        *(column(rows, name) for name in ("prompt_ids", "completion")), strict=True
    ):
        references.setdefault(tuple(ids), []).append(completion)

    def judge(
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Mapping[str, float]:
        keys = [tuple(ids) for ids in prompts]
        judged = [i for i, key in enumerate(keys) if key in known]
        if not judged:
            return {}
        asked = [known[keys[i]] for i in judged]
        written = decode_answers(asked, [completions[i] for i in judged], tokenizer, data.card)
        return metric(
            [prompt_text(prompt) for prompt in asked],
            [answer.text for answer in written],
            [references[keys[i]] for i in judged],
        ).corpus

    return judge
