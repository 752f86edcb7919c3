"""Prompts without demonstrations for the policy level: edits of the data's own, or a file of them.

An explicit reward scores any prompt, so the policy may be improved where nobody demonstrated. The
implicit reward has nothing to compare there, so SPIN cannot use them.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from irl_align.config.policy_update import PolicyPromptOptions
from irl_align.data.cards import Card, import_object
from irl_align.data.columns import column
from irl_align.data.encoding import encode_prompts
from irl_align.data.loading import load_prompts
from irl_align.data.rows import Demonstration, Prompt, last_text, prompt_key, with_last_text
from irl_align.errors import UserError
from irl_align.policy import Demonstrations
from irl_align.tasks.gold import PromptEdit
from irl_align.training.iteration import Data
from irl_align.training.keys import checksum

logger = logging.getLogger(__name__)
PromptsByIds = dict[tuple[int, ...], Prompt]
"""Prompts by their token ids, in the order in which they are used."""


def extra_prompts(options: object, card: Card, own: Iterable[Prompt], seed: int) -> list[Prompt]:
    """The prompts that a policy update's options add to the data's own; [] if they add none.

    Raises UserError: the card has no edit, or the file has no prompts.
    """
    if not isinstance(options, PolicyPromptOptions):
        return []
    prompts: list[Prompt] = []
    if options.edited_prompts:
        prompts += _edited(own, card, options.edited_prompts, seed)
    if options.prompts_from is not None:
        prompts += load_prompts(card, options.prompts_from)
    return prompts


def unread_prompts(
    card: Card, read: Collection[str], load: Callable[[str], Iterable[Demonstration]]
) -> list[Prompt]:
    """Prompts of the card's other splits; a split that cannot be loaded is skipped with a warning.

    read: splits that the run reads.
    """
    prompts: list[Prompt] = []
    for split in card.split_names:
        if split in read:
            continue
        try:
            prompts += [row["prompt"] for row in load(split)]
        except UserError as error:  # nobody can evaluate on this split either
            logger.warning(
                "policy_update.edited_prompts, prompts_from: prompts of split %s cannot be left "
                "out: %s",
                split,
                error,
            )
    return prompts


def encoded_prompts(
    data: Data, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> PromptsByIds:
    """The extra prompts that leave room for a sample and are in none of the data's splits.

    So training uses neither held-out nor evaluation prompts. Raises UserError: no prompt is new.
    """
    known = {
        tuple(ids)
        for part in (data.sft, data.reward, data.held_out, data.evaluation)
        for ids in column(part, "prompt_ids")
    }
    known |= set(map(tuple, encode_prompts(data.raw.unread_prompts, tokenizer, data.card)))
    encoded = encode_prompts(data.raw.extra_prompts, tokenizer, data.card)
    longest = data.context - max_new_tokens if data.context is not None else None
    new: PromptsByIds = {}
    for ids, prompt in zip(encoded, data.raw.extra_prompts, strict=True):
        if tuple(ids) not in known and (longest is None or len(ids) <= longest):
            new.setdefault(tuple(ids), prompt)
    if not new:
        raise UserError(
            "policy_update.edited_prompts, prompts_from: found no prompt that is new, expected one "
            f"at least: all {len(encoded)} are in the data or too long"
        )
    return new


def with_prompts(demonstrations: Demonstrations, extra: PromptsByIds) -> Demonstrations:
    """The demonstrations, with these prompts for the policy level."""
    if not extra:
        return demonstrations
    prompts = [list(ids) for ids in extra]
    key = f"{demonstrations.checksum}/{checksum(prompts)}"
    return replace(demonstrations, extra_prompts=prompts, checksum=key)


def _edited(own: Iterable[Prompt], card: Card, edits: int, seed: int) -> list[Prompt]:
    """Every distinct prompt after so many edits in a row, of a conversation's last turn."""
    if card.edit is None:
        raise UserError(
            f"policy_update.edited_prompts: found {edits}, but card {card.name} names no edit"
        )
    edit: PromptEdit = import_object(card.edit, "edit")
    prompts: list[Prompt] = []
    for key, prompt in {prompt_key(prompt): prompt for prompt in own}.items():
        rng = random.Random(f"{seed}/edited-prompt/{key}")
        for _ in range(edits):
            prompt = with_last_text(prompt, edit(last_text(prompt), rng))
        prompts.append(prompt)
    return prompts
