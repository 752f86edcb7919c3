"""Prompts that differ as texts and are the same token ids share a key."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from transformers import PreTrainedTokenizerBase

from irl_align.data.cards import Card
from irl_align.data.encoding import cased, encode_prompts
from irl_align.data.rows import Prompt, prompt_key, prompt_text
from irl_align.data.splits import merged_keys
from irl_align.errors import UserError


def same_prompts(
    prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase | None, card: Card
) -> dict[str, str]:
    """Key of a prompt -> the key that it shares with prompts of the same ids (`merged_keys`).

    tokenizer: None stands for one that keeps every difference of rendered texts, as one that is
    trained from scratch does. A prompt that the template cannot render is like no other prompt.
    """
    distinct = list({prompt_key(prompt): prompt for prompt in prompts}.values())
    if tokenizer is None:
        return merged_keys(distinct, (cased(prompt_text(prompt), card) for prompt in distinct))
    read: Iterable[Hashable]
    try:
        read = map(tuple, encode_prompts(distinct, tokenizer, card))
    except UserError:
        read = [_ids_or_key(prompt, tokenizer, card) for prompt in distinct]
    return merged_keys(distinct, read)


def _ids_or_key(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, card: Card) -> Hashable:
    try:
        return tuple(encode_prompts([prompt], tokenizer, card)[0])
    except UserError:  # encoding the rows reports it
        return prompt_key(prompt)
