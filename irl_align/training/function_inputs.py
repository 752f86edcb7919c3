"""What a user's reward functions read in a run: texts of its token ids, and columns of its rows."""

from __future__ import annotations

from typing import Any

from irl_align.data.columns import prompts_by_ids
from irl_align.data.decoding import TokenFormat
from irl_align.data.rows import Prompt, completion_text, prompt_key
from irl_align.errors import UserError
from irl_align.reward.composed import FunctionInputs, composed
from irl_align.training.context import RunContext
from irl_align.training.iteration import Data
from irl_align.training.policy_step import policy_prompts

TRIED = 2  # demonstrations that each function scores before any training


def run_format(context: RunContext, data: Data) -> TokenFormat:
    """The policies' token ids as text, with all prompts that a reward may score."""
    prompts: dict[tuple[int, ...], Prompt] = dict(policy_prompts(context, data))
    for rows in (data.reward, data.held_out, data.evaluation):
        prompts |= prompts_by_ids(rows)
    return TokenFormat(context.tokenizer, data.card, prompts)


def function_inputs(context: RunContext, data: Data) -> FunctionInputs:
    """Inputs of the recipe's functions: `demonstrations` of a prompt, and the card's extra columns.

    A prompt that is not in the data has no demonstrations, and None in the other columns. Raises
    UserError: rows of one prompt have different extra columns.
    """
    columns: dict[str, dict[str, Any]] = {}
    for rows in data.raw.rows.values():
        for row in rows:
            extra, key = row.get("extra", {}), prompt_key(row["prompt"])
            known = columns.setdefault(key, {**extra, "demonstrations": []})
            for name, value in extra.items():
                if known[name] != value:
                    raise UserError(
                        f"data.card {data.card.name}: extra: {name} has two values in the rows of "
                        f"one prompt, {value!r} and {known[name]!r}; expected one: a reward "
                        "function scores samples of a prompt"
                    )
            text = completion_text(row["completion"])
            if text not in known["demonstrations"]:
                known["demonstrations"].append(text)
    missing: dict[str, Any] = {**dict.fromkeys(data.card.extra), "demonstrations": []}
    return FunctionInputs(run_format(context, data), columns, missing)


def prepare_functions(context: RunContext, data: Data) -> None:
    """Let the run's rewards use the recipe's functions, each tried on demonstrations first.

    Raises UserError: a function cannot be imported, or does not score demonstrations.
    """
    functions = context.recipe.reward.named_functions
    if not functions:
        return
    context.models.read_functions_with(lambda: function_inputs(context, data))
    rows = data.held_out.select(range(min(TRIED, len(data.held_out))))
    if len(rows):
        reward = composed(None, functions, function_inputs(context, data))
        reward.score_ids(rows["prompt_ids"], rows["completion_ids"])
