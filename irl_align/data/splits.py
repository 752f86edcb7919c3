"""The division of rows by prompt: each prompt's part depends only on a hash of it and the seed.

Prompts that a model cannot tell apart, such as two of different case under `lowercase`, are one
prompt: they have one key, the smallest of theirs.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from irl_align.config.data import DataOptions
from irl_align.data.cards import Card
from irl_align.data.rows import Demonstration, Preference, Prompt, opening, prompt_key, prompt_text
from irl_align.errors import UserError

_PARTS = (("sft", "share"), ("held_out", "held_out"), ("reward", "reward_share"))
"""Part of a division -> the option of `data` that sets its size."""
NONE_MERGED: Mapping[str, str] = MappingProxyType({})
Row = TypeVar("Row", Demonstration, Preference)


@dataclass(frozen=True)
class Division:
    """Training demonstrations by use. No prompt of held_out is in sft or reward."""

    sft: list[Demonstration]
    """For supervised fine-tuning."""
    reward: list[Demonstration]
    """For fitting the reward: the rows of sft, or rows of other prompts."""
    held_out: list[Demonstration]
    """For measuring and selecting rewards."""

    def counts(self, same: Mapping[str, str] = NONE_MERGED) -> dict[str, int]:
        """Rows and distinct prompts of each part; `same` as in `divide`."""
        numbers = {}
        for part, rows in vars(self).items():
            keys = {prompt_key(row["prompt"]) for row in rows}
            numbers[f"{part}_rows"] = len(rows)
            numbers[f"{part}_prompts"] = len({same.get(key, key) for key in keys})
        return numbers


def divide(
    rows: Sequence[Demonstration],
    options: DataOptions,
    seed: int,
    same: Mapping[str, str] = NONE_MERGED,
) -> Division:
    """Divide demonstrations by prompt.

    same: key of an opening -> the key that it shares with the openings that the model reads as
    the same (`merged_keys`). The order of the rows does not matter. A part of a smaller share is a
    subset of the same part of a larger one. Raises UserError where a part is empty.
    """
    for starts in _starts(rows):
        division = _divided(rows, starts, options, seed, same)
        empty = [(part, option) for part, option in _PARTS if not getattr(division, part)]
        if not empty:
            return division
    part, option = empty[0]
    raise UserError(
        f"data.{option}: of {len(rows)} demonstrations none is left for {part}; "
        f"expected at least one: give more demonstrations or change data.{option}"
    )


def _starts(rows: Sequence[Row]) -> tuple[list[Prompt], list[Prompt]]:
    """What divides rows: the openings of conversations; or whole prompts, if openings leave a part
    empty because many conversations open alike."""
    prompts: list[Prompt] = [row["prompt"] for row in rows]
    return [opening(prompt) for prompt in prompts], prompts


def _divided(
    rows: Sequence[Demonstration],
    starts: Sequence[Prompt],
    options: DataOptions,
    seed: int,
    same: Mapping[str, str],
) -> Division:
    """Demonstrations divided by a hash of their starts."""
    sft: list[Demonstration] = []
    reward: list[Demonstration] = []
    held_out: list[Demonstration] = []
    disjoint = options.reward_data == "disjoint"
    for row, start in zip(rows, starts, strict=True):
        key = prompt_key(start)
        key = same.get(key, key)
        if unit_hash(seed, "share", key) >= options.share:
            continue
        if unit_hash(seed, "held_out", key) < options.held_out:
            held_out.append(row)
        elif disjoint and unit_hash(seed, "reward", key) < options.reward_share:
            reward.append(row)
        else:
            sft.append(row)
    return Division(sft, reward if disjoint else sft, held_out)


def merged_keys(prompts: Iterable[Prompt], read: Iterable[Hashable]) -> dict[str, str]:
    """Key of a prompt -> the smallest key of the prompts that are read as the same; only where
    that is another key.

    read: what the model reads of each prompt, such as its token ids.
    """
    keys = list(map(prompt_key, prompts))
    smallest: dict[Hashable, str] = {}
    read = list(read)
    for key, what in zip(keys, read, strict=True):
        smallest[what] = min(key, smallest.get(what, key))
    return {k: smallest[what] for k, what in zip(keys, read, strict=True) if smallest[what] != k}


def carve(card: Card, split: str, rows: list[Row]) -> list[Row]:
    """The rows of `split` among those of the split that it is carved from.

    Each carved split has an interval of the hashes, and its base split has the rest. The tokenizer
    is not known here, so prompts that differ only in case, white space or Unicode's form are one.
    """
    base = card.splits[split].carved_from or split
    bounds: dict[str, tuple[float, float]] = {}
    taken = 0.0
    for name, part in card.carved(base).items():
        assert part.share is not None
        bounds[name] = (taken, taken + part.share)
        taken += part.share
    if not bounds:
        return rows
    intervals = {**bounds, base: (taken, 1.0)}
    for starts in _starts(rows):
        same = merged_keys(starts, map(_plain, starts))
        hashes = [unit_hash(0, "carve", same.get(k, k)) for k in map(prompt_key, starts)]
        parts = {
            name: [row for row, number in zip(rows, hashes, strict=True) if low <= number < high]
            for name, (low, high) in intervals.items()
        }
        if all(parts.values()):
            break
    return parts[split]


def _plain(prompt: Prompt) -> str:
    """A prompt without differences of case, white space and Unicode's form."""
    text = unicodedata.normalize("NFKC", prompt_text(prompt)).casefold()
    return " ".join(text.split())


def choose_prompts(keys: Iterable[str], count: int | None, seed: int) -> set[str]:
    """`count` distinct prompt keys by hash, or all if it is None; fewer are a subset of more."""
    distinct = set(keys)
    if count is None or count >= len(distinct):
        return distinct
    return set(sorted(distinct, key=lambda key: (unit_hash(seed, "choose", key), key))[:count])


def data_checksum(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows' content in their order, wherever they were read.

    The order of a row's keys does not matter.
    """
    digest = hashlib.sha256()
    for row in rows:
        content = {name: value for name, value in row.items() if name != "place"}
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def unit_hash(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that looks random and depends only on the arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
