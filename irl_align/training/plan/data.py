"""Rows and tokens of a recipe's data: counted where it is local, by the card where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from irl_align.config.schema import Recipe
from irl_align.data.cards import Card, load_card
from irl_align.data.encoding import encode_demonstrations, training_texts
from irl_align.data.loading import load_demonstrations
from irl_align.data.rows import Demonstration, prompt_key, prompt_text
from irl_align.data.splits import divide
from irl_align.data.tokenizer import prepare_tokenizer, train_tokenizer
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer
from irl_align.training.keys import derive_seed

SAMPLED = 1000  # rows that are encoded: some evenly spaced, and the longest ones
TRAINED = 5000  # rows that a tokenizer from scratch is tried out on
TOKENS_PER_WORD = 1.4  # of English, where no tokenizer is in reach


@dataclass(frozen=True)
class Lengths:
    """Tokens of a text: on average, and at most."""

    mean: float
    longest: int


@dataclass(frozen=True)
class Counts:
    """What a run reads."""

    rows: dict[str, int]
    """Part (sft, reward, held_out, evaluation) -> demonstrations."""
    prompts: dict[str, int]
    """Part -> distinct prompts."""
    prompt: Lengths
    completion: Lengths
    vocabulary: int | None
    """Tokens of a tokenizer that was trained for the count."""
    local: bool
    """Whether the data was there to be counted."""
    how: str
    """How rows and tokens are known, in words."""


def count_data(recipe: Recipe) -> Counts:
    """Counts of a recipe's data. Raises UserError where they cannot be known."""
    card = load_card(recipe.data.card)
    if card.is_task or recipe.data.path is not None or card.source is None:
        return _counted(recipe, card)
    return _by_the_card(recipe, card)


def _counted(recipe: Recipe, card: Card) -> Counts:
    options = recipe.data

    def load(split: str) -> list[Demonstration]:
        return load_demonstrations(card, split, options.path, options.task, recipe.seed)

    division = divide(load("train"), options, derive_seed(recipe.seed, "data"))
    parts = {
        "sft": division.sft,
        "reward": division.reward,
        "held_out": division.held_out,
        "evaluation": load(recipe.evaluation.split),
    }
    prompt, completion, kept, vocabulary, how = _lengths(recipe, card, division.sft)
    return Counts(
        {part: round(len(rows) * kept) for part, rows in parts.items()},
        {part: round(_distinct(rows) * kept) for part, rows in parts.items()},
        prompt,
        completion,
        vocabulary,
        True,
        f"rows counted; tokens {how}",
    )


def _distinct(rows: Sequence[Demonstration]) -> int:
    return len({prompt_key(row["prompt"]) for row in rows})


def _lengths(
    recipe: Recipe, card: Card, rows: Sequence[Demonstration]
) -> tuple[Lengths, Lengths, float, int | None, str]:
    """Lengths of prompts and completions, the share of rows that fit, and how that is known."""
    words = np.array([len(prompt_text(r["prompt"])) + len(r["completion"]) for r in rows])
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
            prepare_tokenizer(tokenizer)
            how = "by the model's tokenizer, of some of them"
        some = encode_demonstrations([rows[i] for i in evenly], tokenizer, card, limits)
        most = encode_demonstrations([rows[i] for i in longest], tokenizer, card, limits)
    except UserError:
        if recipe.model.from_scratch is not None:
            raise
        how = f"as {TOKENS_PER_WORD} a word: the model's tokenizer is not in reach"
        own = recipe.data
        prompts = [len(prompt_text(row["prompt"]).split()) for row in rows]
        answers = [len(row["completion"].split()) for row in rows]
        return (
            _estimate(prompts, own.max_prompt_tokens),
            _estimate(answers, own.max_completion_tokens),
            1.0,
            None,
            how,
        )
    kept = 1.0 - some.dropped / len(evenly)

    def of(column: str) -> Lengths:
        both = [[len(ids) for ids in part.rows[column]] for part in (some, most)]
        return Lengths(float(np.mean(both[0])), max(both[0] + both[1]))

    scratch = len(tokenizer) if recipe.model.from_scratch is not None else None
    return of("prompt_ids"), of("completion_ids"), kept, scratch, how


def _estimate(words: Sequence[int], limit: int) -> Lengths:
    tokens = np.minimum(np.array(words) * TOKENS_PER_WORD + 1, limit)
    return Lengths(float(tokens.mean()), int(tokens.max()))


def _by_the_card(recipe: Recipe, card: Card) -> Counts:
    """Rows by the card, each taken to have a prompt of its own; lengths at the recipe's limits."""
    options = recipe.data
    found = {**card.about, **card.rows}
    for split in ("train", recipe.evaluation.split):
        if split not in found:
            raise UserError(
                f"data.card {card.name}: found no number of rows of split {split}, and the data is "
                f"not local; expected about: {{{split}: ROWS}} in the card, or data.path"
            )
    used = found["train"] * options.share
    rest = used * (1.0 - options.held_out)
    apart = options.reward_data == "disjoint"
    rows = {
        "sft": round(rest * (1.0 - options.reward_share)) if apart else round(rest),
        "reward": round(rest * options.reward_share) if apart else round(rest),
        "held_out": round(used * options.held_out),
        "evaluation": found[recipe.evaluation.split],
    }
    longest = Lengths(options.max_prompt_tokens, options.max_prompt_tokens)
    answer = Lengths(options.max_completion_tokens, options.max_completion_tokens)
    how = "rows by the data card, every text as long as the recipe allows: an upper bound"
    return Counts(rows, dict(rows), longest, answer, None, False, how)
