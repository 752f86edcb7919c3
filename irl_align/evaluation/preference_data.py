"""Preference sets for evaluation: a card's split, restricted to subsets, as a model's token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card, load_card
from irl_align.data.columns import column
from irl_align.data.encoding import encode_preferences
from irl_align.data.loading import load_preferences
from irl_align.data.rows import Preference, prompt_key
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer
from irl_align.reward.conversations import encode_conversations
from irl_align.reward.settings import CONFIG_KEY, own_template
from irl_align.utils.files import read_json

UNLIMITED = 2**31 - 1  # tokens; `fits` finds the pairs that are too long for a model


@dataclass(frozen=True)
class PreferenceSet:
    """A card's split with its rows."""

    card: Card
    split: str
    rows: list[Preference]
    only: tuple[str, ...] = ()
    """Subsets that it was restricted to; empty for all."""


def load_set(spec: str, split: str | None = None) -> PreferenceSet:
    """The pairs of `CARD` or `CARD=PATH`; the default split is test, or the card's only one."""
    name, _, path = spec.partition("=")
    card = load_card(name)
    if split is None:
        split = "test" if "test" in card.split_names else card.split_names[0]
    return PreferenceSet(card, split, load_preferences(card, split, path or None))


def restricted(pairs: PreferenceSet, names: Sequence[str]) -> PreferenceSet:
    """The pairs of any of these subsets; all pairs where no name is given.

    Where several columns make the subset (SFRES/quality), the value of one column is a name too
    (SFRES, or quality). Raises UserError: the set has no such subset.
    """
    if not names:
        return pairs
    subsets = [row["subset"] for row in pairs.rows]
    axes = axes_of(pairs.card, subsets)
    named = [set(values) for values in zip(subsets, *axes.values(), strict=True)]
    known = [*sorted(set(subsets) - {""}), *(v for one in axes.values() for v in sorted(set(one)))]
    for name in names:
        if name not in known:
            expected = f"expected one of {', '.join(known)}" if known else "and it has no subsets"
            raise UserError(
                f"--subset: {pairs.card.name}, {pairs.split}: found no subset {name!r}, {expected}"
            )
    rows = [row for row, own in zip(pairs.rows, named, strict=True) if own & set(names)]
    return replace(pairs, rows=rows, only=tuple(dict.fromkeys(names)))


def axes_of(card: Card, subsets: Sequence[str]) -> dict[str, list[str]]:
    """Column -> its value in each row, where the card joins several columns into the subset."""
    columns = [name for name in card.columns.get("subset", "").split("+") if name]
    parts = [subset.split("/") for subset in subsets]
    # If a value itself holds a slash, nothing says where the value ends.
    if len(columns) < 2 or any(len(one) != len(columns) for one in parts):
        return {}
    return {column: [one[at] for one in parts] for at, column in enumerate(columns)}


def encode(
    pairs: PreferenceSet, path: Path, is_reward: bool, template: str | None = None
) -> Dataset:
    """The pairs as token ids of the model in a folder, by the template that it was made with.

    A model that was not made here reads its own chat template, or `template`; without both, the
    card's template.
    """
    tokenizer, own = load_tokenizer(path), _saved_template(path, is_reward)
    changed: dict[str, Any] = {k: own[k] for k in ("template", "lowercase") if own and k in own}
    if own is None and (template is not None or tokenizer.chat_template):
        changed = {"template": own_template(path, tokenizer.chat_template, template)}
        if is_reward and changed["template"] == "chat":
            return _encode_conversations(pairs, tokenizer, model_config(path).get("pad_token_id"))
    card = pairs.card.model_copy(update=changed)
    limits = DataOptions(
        card=card.name, max_prompt_tokens=UNLIMITED, max_completion_tokens=UNLIMITED
    )
    return encode_preferences(pairs.rows, tokenizer, card, limits).rows


def is_foreign(path: Path, is_reward: bool) -> bool:
    """Whether the model in a folder was not made by irl-align, as a reward or as a policy."""
    return _saved_template(path, is_reward) is None


def _saved_template(path: Path, is_reward: bool) -> dict[str, Any] | None:
    saved: dict[str, Any] | None = model_config(path).get(CONFIG_KEY if is_reward else "irl_prompt")
    return saved


def _encode_conversations(
    pairs: PreferenceSet, tokenizer: PreTrainedTokenizerBase, pad: int | None
) -> Dataset:
    """The pairs as a reward of another project reads them."""
    rows, every = pairs.rows, [True] * len(pairs.rows)
    prompts = [row["prompt"] for row in rows]
    better, worse = (
        encode_conversations(prompts, side, every, tokenizer, pad)
        for side in ([row["chosen"] for row in rows], [row["rejected"] for row in rows])
    )
    # Both sides are divided at the first token that either answer changes.
    at = [min(len(one), len(two)) for one, two in zip(better[0], worse[0], strict=True)]

    def after(side: tuple[list[list[int]], list[list[int]]]) -> list[list[int]]:
        return [[*p, *c][n:] for p, c, n in zip(*side, at, strict=True)]

    return Dataset.from_dict(
        {
            "prompt_ids": [ids[:n] for ids, n in zip(better[0], at, strict=True)],
            "chosen_ids": after(better),
            "rejected_ids": after(worse),
            "prompt_key": [prompt_key(prompt) for prompt in prompts],
            "subset": [row["subset"] for row in rows],
            "margin": [row["margin"] for row in rows],
        }
    )


def fits(rows: Dataset, path: Path, echo: bool = False) -> np.ndarray:
    """Which pairs fit with both completions into the context of the model in a folder: (B,) bool.

    A reward with the setting echo, or `echo` here, reads the prompt and an EOS again after each
    completion.
    """
    config = model_config(path)
    text: Mapping[str, Any] = config.get("text_config") or config  # of a multimodal model
    limit = text.get("max_position_embeddings") or text.get("n_positions") or UNLIMITED
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in column(rows, name)])
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    again = prompt + 1 if echo or (config.get("irl_reward") or {}).get("echo") else 0
    fitting: np.ndarray = prompt + np.maximum(chosen, rejected) + again <= limit
    return fitting


def model_config(path: Path) -> dict[str, Any]:
    """config.json of the model in a folder."""
    return read_json(path / "config.json", "a model's config", "give a run or a model's folder")
