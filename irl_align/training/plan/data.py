"""Rows and tokens of a recipe's data: counted if the data is local, else by the data card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from irl_align.config.schema import Recipe
from irl_align.data.cards import Card, load_card
from irl_align.data.encoding import encode_demonstrations, training_texts
from irl_align.data.rows import Demonstration, completion_text, prompt_key, prompt_text
from irl_align.data.tokenizer import prepare_tokenizer, train_tokenizer
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer
from irl_align.training.iteration import RawData
from irl_align.training.prepare import load_data

SAMPLED = 1000  # rows that are encoded: evenly spaced ones, and a tenth as many longest ones
TRAINED = 5000  # rows that a tokenizer from scratch is trained on for the count
TOKENS_PER_WORD = 1.4  # of English text, where the tokenizer is not available


@dataclass(frozen=True)
class Lengths:
    """Tokens of a text: mean and maximum."""

    mean: float
    longest: int


@dataclass(frozen=True)
class Counts:
    """Numbers of rows, prompts and tokens that a run reads."""

    rows: dict[str, int]
    """Use (sft, reward, held_out, evaluation) -> demonstrations."""
    prompts: dict[str, int]
    """Use -> distinct prompts."""
    prompt: Lengths
    completion: Lengths
    vocabulary: int | None
    """Size of the tokenizer that was trained for the count; None without one."""
    how: str
    """How rows and tokens were counted, in words."""


def local_data(recipe: Recipe) -> RawData | None:
    """The data of a recipe, if it is local. Raises UserError where it is, but cannot be read."""
    card = load_card(recipe.data.card)
    local = card.is_task or recipe.data.path is not None or card.source is None
    return load_data(recipe, needs_tokenizer=False) if local else None


def count_data(recipe: Recipe, raw: RawData | None) -> Counts:
    """Counts of a recipe's data. Raises UserError where they are not known.

    raw: the data, if it is local.
    """
    if raw is None:
        return _by_the_card(recipe, load_card(recipe.data.card))
    prompt, completion, kept, vocabulary, how = _lengths(recipe, raw.card, raw.rows["sft"])
    return Counts(
        {use: round(len(rows) * kept) for use, rows in raw.rows.items()},
        {use: round(_distinct(rows) * kept) for use, rows in raw.rows.items()},
        prompt,
        completion,
        vocabulary,
        f"rows counted; tokens {how}",
    )


def _distinct(rows: Sequence[Demonstration]) -> int:
    return len({prompt_key(row["prompt"]) for row in rows})


def _lengths(
    recipe: Recipe, card: Card, rows: Sequence[Demonstration]
) -> tuple[Lengths, Lengths, float, int | None, str]:
    """Lengths of prompts and completions, share of rows within the limits, vocabulary, and how they
    were counted."""
    texts = [(prompt_text(row["prompt"]), completion_text(row["completion"])) for row in rows]
    words = np.array([len(prompt) + len(answer) for prompt, answer in texts])
    evenly = np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int)
    longest = np.argsort(-words)[: SAMPLED // 10]
    limits = recipe.data.model_copy(update={"overlong": "drop"})
    tokenizer: PreTrainedTokenizerBase
    try:
        if recipe.model.from_scratch is not None:
            tokenizer = train_tokenizer(
                training_texts(rows[:TRAINED], card), recipe.model.from_scratch.vocab_size
            )
            how = "by a tokenizer trained on some of them"
        else:
            tokenizer = load_tokenizer(str(recipe.model.path), revision=recipe.model.revision)
            prepare_tokenizer(tokenizer, card.template)
            how = "by the model's tokenizer, of some of them"
        typical = encode_demonstrations([rows[i] for i in evenly], tokenizer, card, limits)
        long = encode_demonstrations([rows[i] for i in longest], tokenizer, card, limits)
    except UserError:
        if recipe.model.from_scratch is not None:
            raise
        how = f"as {TOKENS_PER_WORD} a word: the model's tokenizer is not available"
        own = recipe.data
        prompts, answers = ([len(row[side].split()) for row in texts] for side in (0, 1))
        return (
            _estimate(prompts, own.max_prompt_tokens),
            _estimate(answers, own.max_completion_tokens),
            1.0,
            None,
            how,
        )
    kept = 1.0 - typical.dropped / len(evenly)

    def lengths(column: str) -> Lengths:
        mean = np.mean([len(ids) for ids in typical.rows[column]])
        rows = [*typical.rows[column], *long.rows[column]]
        return Lengths(float(mean), max(map(len, rows)))

    scratch = len(tokenizer) if recipe.model.from_scratch is not None else None
    return lengths("prompt_ids"), lengths("completion_ids"), kept, scratch, how


def _estimate(words: Sequence[int], limit: int) -> Lengths:
    tokens = np.minimum(np.array(words) * TOKENS_PER_WORD + 1, limit)
    return Lengths(float(tokens.mean()), int(tokens.max()))


def _by_the_card(recipe: Recipe, card: Card) -> Counts:
    """Rows by the card, each with its own prompt; lengths at the recipe's limits."""
    options = recipe.data
    known = {**card.about, **card.rows}
    for split in ("train", recipe.evaluation.split):
        if split not in known:
            raise UserError(
                f"data.card {card.name}: found no number of rows of split {split}, and the data is "
                f"not local; expected about: {{{split}: ROWS}} in the card, or data.path"
            )
    used = known["train"] * options.share
    rest = used * (1.0 - options.held_out)
    apart = options.reward_data == "disjoint"
    rows = {
        "sft": round(rest * (1.0 - options.reward_share)) if apart else round(rest),
        "reward": round(rest * options.reward_share) if apart else round(rest),
        "held_out": round(used * options.held_out),
        "evaluation": known[recipe.evaluation.split],
    }
    longest = Lengths(options.max_prompt_tokens, options.max_prompt_tokens)
    answer = Lengths(options.max_completion_tokens, options.max_completion_tokens)
    how = "rows by the data card, every text as long as the recipe allows: an upper bound"
    return Counts(rows, dict(rows), longest, answer, None, how)
