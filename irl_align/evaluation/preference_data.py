"""Preference sets for evaluation: a card's split, restricted to subsets, as a model's token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card, load_card
from irl_align.data.columns import column
from irl_align.data.encoding import encode_preferences
from irl_align.data.loading import load_preferences
from irl_align.data.rows import Preference
from irl_align.errors import UserError
from irl_align.models.loading import load_tokenizer
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


def encode(pairs: PreferenceSet, path: Path, is_reward: bool) -> Dataset:
    """The pairs as token ids of the model in a folder, by the prompt template that the model was
    trained with; by the card's template if the model's config has none."""
    own = model_config(path).get("irl_reward" if is_reward else "irl_prompt") or {}
    changed = {k: own[k] for k in ("template", "lowercase") if k in own}
    card = pairs.card.model_copy(update=changed)
    limits = DataOptions(
        card=card.name, max_prompt_tokens=UNLIMITED, max_completion_tokens=UNLIMITED
    )
    return encode_preferences(pairs.rows, load_tokenizer(path), card, limits).rows


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
